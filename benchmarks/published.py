"""What the published code does, restated plainly: the arm that every benchmark and tests/test_exactness.py
hold ours against. It works on our modules' weights and shares none of the shortcuts.

Written from its behaviour (SPEC of this project, https://github.com/anosorae/IRRA, MIT), not copied.
"""

import random

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from datasets.tokenizer import MASK, SimpleTokenizer, tokenize
from datasets.transforms import MEAN, STD
from model.clip_model import at_least_fp32
from solver.build import lr_and_decay
from utils.batch import Batch

# ---- model: sequence first, nn.MultiheadAttention, a mask of -inf, every position to the end ----


def run_blocks(blocks, x, mask=None):
    """x: (L, B, W)."""
    for block in blocks:
        normed = block.ln_1(x)
        if mask is not None:
            mask = mask.to(x.dtype)
        x = x + block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        hidden = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    return x


def encode_image(clip, images):
    """Every token, (B, N, D)."""
    visual = clip.visual
    x = visual.conv1(images.to(clip.dtype))
    x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
    room = torch.zeros(x.shape[0], 1, x.shape[-1], dtype=x.dtype, device=x.device)
    x = torch.cat([visual.class_embedding.to(x.dtype) + room, x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding.to(x.dtype))
    x = run_blocks(visual.transformer.resblocks, x.permute(1, 0, 2)).permute(1, 0, 2)
    return visual.ln_post(x) @ visual.proj


def encode_text(clip, ids):
    """Every position, (B, L, D)."""
    x = clip.token_embedding(ids).to(clip.dtype) + clip.positional_embedding.to(clip.dtype)
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), device=ids.device).triu_(1)
    x = run_blocks(clip.transformer.resblocks, x.permute(1, 0, 2), mask).permute(1, 0, 2)
    return clip.ln_final(x).to(clip.dtype) @ clip.text_projection


def cross_former(model, text, image):
    query, image = model.ln_pre_t(text), model.ln_pre_i(image)
    x = model.cross_attn(query, image, image, need_weights=False)[0]
    x = run_blocks(model.cross_modal_transformer.resblocks, x.permute(1, 0, 2)).permute(1, 0, 2)
    return model.ln_post(x)


def sdm(image, text, pids, logit_scale, epsilon=1e-8):
    pids = pids.reshape(-1, 1)
    labels = ((pids - pids.t()) == 0).float()
    labels = labels / labels.sum(dim=1)
    image = image / image.norm(dim=1, keepdim=True)
    text = text / text.norm(dim=1, keepdim=True)
    total = 0
    for logits in (logit_scale * text @ image.t(), logit_scale * image @ text.t()):
        difference = F.log_softmax(logits, dim=1) - torch.log(labels + epsilon)
        total = total + torch.mean(torch.sum(F.softmax(logits, dim=1) * difference, dim=1))
    return total


SWITCHES = ("labelled positions", "one text pass", "attention")  # of forward


def forward(model, batch, switches=()):
    """Losses sdm, id and mlm, and accuracies, of a batch. switches: shortcuts of ours to take anyway."""
    clip, ids = model.base_model, batch["caption_ids"]
    image_of, text_of, cross = encode_image, encode_text, cross_former
    if "attention" in switches:
        image_of, text_of = type(clip).encode_image, type(clip).encode_text
        cross = type(model).cross_former
    images, texts = image_of(clip, batch["images"]), text_of(clip, ids)
    image = at_least_fp32(images[:, 0, :])
    text = at_least_fp32(texts[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)])
    report = {"temperature": 1 / torch.tensor(model.logit_scale)}
    report["sdm_loss"] = sdm(image, text, batch["pids"], model.logit_scale)
    weight = model.classifier.weight
    logits = [at_least_fp32(model.classifier(x.to(weight.dtype))) for x in (image, text)]
    report["id_loss"] = sum(F.cross_entropy(x, batch["pids"]) for x in logits) / 2
    for name, x in zip(("img_acc", "txt_acc"), logits, strict=True):
        report[name] = (x.argmax(dim=1) == batch["pids"]).float().mean()
    same = "one text pass" in switches
    masked = texts if same else text_of(clip, batch["mlm_ids"])
    if "labelled positions" in switches:
        ids_of = {key: value.cpu() for key, value in batch.items() if key != "images"}
        plan = Batch.of(ids_of).planned().to(ids.device)
        scores, labels = model.predict_masked(masked, images, plan)
    else:
        head = model.mlm_head
        x = head.dense(cross(model, masked, images))
        x = head.fc(head.ln(x * torch.sigmoid(1.702 * x)))
        scores, labels = at_least_fp32(x).reshape(-1, x.shape[-1]), batch["mlm_labels"].reshape(-1)
    report["mlm_loss"] = F.cross_entropy(scores, labels, ignore_index=0)
    found, where = scores.max(1)[1], torch.nonzero(labels)
    report["mlm_acc"] = (found[where] == labels[where]).float().mean()
    return report


# ---- the step ----


def optimizer_of(args, model):
    """Adam with a group for each parameter."""
    groups = []
    for name, parameter in model.named_parameters():
        lr, decay = lr_and_decay(name, args)
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return torch.optim.Adam(groups, lr=args.lr, betas=(args.alpha, args.beta), eps=1e-3, foreach=False)


class Meter:
    def __init__(self):
        self.sum, self.count = 0, 0

    def update(self, value, n=1):
        self.sum += value * n
        self.count += n


METERS = ("loss", "sdm_loss", "itc_loss", "id_loss", "mlm_loss", "img_acc", "txt_acc", "mlm_acc")


def train_step(model, optimizer, batch, device, meters, switches=()):
    """batch: on the host. The loss is waited for in every step; the other meters keep what they are given."""
    batch = {key: value.to(device) for key, value in batch.items()}
    report = forward(model, batch, switches)
    loss = sum(value for name, value in report.items() if "loss" in name)
    n = len(batch["pids"])
    if "no waits" in switches:
        meters["loss"].update(loss.detach(), n)
    else:
        meters["loss"].update(loss.item(), n)
    for name in METERS[1:]:
        meters[name].update(report.get(name, 0), 1 if name == "mlm_acc" else n)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ---- data ----


def transform(img_size, img_aug=True, training=True):
    from torchvision import transforms as T

    H, W = img_size
    chain = [T.Resize((H, W))]
    if training:
        chain.append(T.RandomHorizontalFlip(0.5))
    if training and img_aug:
        chain += [T.Pad(10), T.RandomCrop((H, W))]
    chain += [T.ToTensor(), T.Normalize(MEAN, STD)]
    if training and img_aug:
        chain.append(T.RandomErasing(scale=(0.02, 0.4), value=MEAN))
    return T.Compose(chain)


def masked(ids, vocabulary):
    """BERT's masking token by token; ids, a numpy array, is changed in place."""
    candidates, labels = list(range(1, vocabulary - 3)), []
    for i, token in enumerate(ids):
        label = 0
        if 0 < token < MASK:
            draw = random.random()
            if draw < 0.15:
                draw /= 0.15
                if draw < 0.8:
                    ids[i] = MASK
                elif draw < 0.9:
                    ids[i] = random.choice(candidates)
                label = token
        labels.append(label)
    if all(label == 0 for label in labels):
        labels[1], ids[1] = ids[1], MASK
    return torch.tensor(ids), torch.tensor(labels)


class PairDataset(Dataset):
    """Training pairs: each image decoded and transformed in floats, each caption tokenised, each time."""

    def __init__(self, samples, img_size, text_length=77):
        self.samples, self.text_length = samples, text_length
        self.transform, self.tokenizer = transform(img_size), SimpleTokenizer()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        from PIL import Image

        pid, image_id, path, caption = self.samples[index]
        image = self.transform(Image.open(path).convert("RGB"))
        ids = tokenize(caption, self.tokenizer, self.text_length)
        mlm_ids, mlm_labels = masked(ids.cpu().numpy(), len(self.tokenizer.encoder))
        batch = {"pids": pid, "image_ids": image_id, "images": image, "caption_ids": ids}
        return {**batch, "mlm_ids": mlm_ids, "mlm_labels": mlm_labels}


# ---- evaluation ----


@torch.no_grad()
def evaluate(model, img_loader, txt_loader, device):
    """(cmc, mAP, mINP, indices) of text-to-image retrieval. Loaders: (pids, images), (pids, ids)."""
    model.eval()
    clip, q_pids, g_pids, queries, gallery = model.base_model, [], [], [], []
    for pids, ids in txt_loader:
        ids = ids.to(device)
        x = encode_text(clip, ids)[torch.arange(len(ids), device=device), ids.argmax(dim=-1)].float()
        q_pids.append(pids.view(-1))
        queries.append(x)
    for pids, images in img_loader:
        g_pids.append(pids.view(-1))
        gallery.append(encode_image(clip, images.to(device))[:, 0, :].float())
    queries = F.normalize(torch.cat(queries), p=2, dim=1)
    gallery = F.normalize(torch.cat(gallery), p=2, dim=1)
    return rank(queries @ gallery.t(), torch.cat(q_pids), torch.cat(g_pids))


def rank(similarity, q_pids, g_pids, max_rank=10):
    """The whole matrix sorted, and copies of it."""
    indices = torch.argsort(similarity, dim=1, descending=True)
    matches = g_pids[indices.cpu()].eq(q_pids.view(-1, 1))  # [Q, G]
    cmc = matches[:, :max_rank].cumsum(1)
    cmc[cmc > 1] = 1
    cmc = cmc.float().mean(0) * 100
    number, found = matches.sum(1), matches.cumsum(1)
    last = [(row, line.nonzero()[-1]) for row, line in enumerate(matches)]
    mINP = torch.cat([found[row][place] / (place + 1.0) for row, place in last]).mean() * 100
    precision = [found[:, i] / (i + 1.0) for i in range(found.shape[1])]
    precision = torch.stack(precision, 1) * matches
    mAP = (precision.sum(1) / number).mean() * 100
    return cmc, mAP, mINP, indices
