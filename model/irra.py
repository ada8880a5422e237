"""IRRA: CLIP's two encoders, a classifier of persons, and masked words predicted with the image's help."""

from collections import OrderedDict
from contextlib import nullcontext

import torch
from torch import nn

from model import objectives
from model.clip_model import LayerNorm, QuickGELU, Transformer, at_least_fp32, attend
from model.clip_resnet import ModifiedResNet
from utils.dist import gather, share_sizes, total
from utils.errors import InputError

LENGTH_STEP = 16  # clean captions are encoded at a length that is a multiple of this, or whole


class IRRA(nn.Module):
    """arXiv 2303.12501. Legend: B batch, L text length, N image tokens, D width, K persons, V vocabulary."""

    def __init__(
        self,
        clip,
        loss_names,
        num_classes,
        temperature=0.02,
        cmt_depth=4,
        id_loss_weight=1.0,
        mlm_loss_weight=1.0,
    ):
        """clip: a model.clip_model.CLIP. loss_names: of sdm, itc, cmpm, id, mlm; the last two bring heads."""
        super().__init__()
        self.loss_names = tuple(loss_names)
        self.loss_weights = {"id": id_loss_weight, "mlm": mlm_loss_weight}
        self.logit_scale = 1 / temperature  # a constant, not a parameter
        self.register_buffer("temperature", torch.tensor(1 / self.logit_scale), persistent=False)  # to report
        self.autocast_dtype = None  # set by model.build for --precision bf16
        self.compiled = None  # set by compile_encoders: training's encode_image and encode_text
        self.base_model = clip
        D = clip.text_projection.shape[1]
        if "id" in self.loss_names:
            self.classifier = nn.Linear(D, num_classes)
        if "mlm" in self.loss_names:
            if isinstance(clip.visual, ModifiedResNet):
                raise InputError(
                    "mlm needs image tokens, and a ResNet gives one pooled vector: choose a ViT or drop mlm"
                )
            self.cross_attn = nn.MultiheadAttention(D, D // 64, batch_first=True)
            self.cross_modal_transformer = Transformer(D, cmt_depth, D // 64)
            self.ln_pre_t = LayerNorm(D)
            self.ln_pre_i = LayerNorm(D)
            self.ln_post = LayerNorm(D)
            vocab_size = clip.token_embedding.num_embeddings
            self.mlm_head = nn.Sequential(
                OrderedDict(
                    dense=nn.Linear(D, D), gelu=QuickGELU(), ln=LayerNorm(D), fc=nn.Linear(D, vocab_size)
                )
            )
        initialise_heads(self, D, cmt_depth)

    # ---- encoders ----

    def encode_image(self, images):
        """(B, 3, H, W), normalised pixels, to (B, D) fp32, not L2-normalised."""
        with self.autocast(images.device):
            return pooled(self.base_model.encode_image(images, class_only=True))

    def encode_text(self, ids):
        """(B, L) token ids to (B, D) fp32, not L2-normalised: the feature at EOT."""
        with self.autocast(ids.device):
            return at_eot(self.base_model.encode_text(ids), ids)

    def compile_encoders(self, **options):
        """Train with encoders that torch.compile makes; evaluation, whose sizes vary, goes without.

        Functions are compiled, not modules: state-dict keys stay. Sizes that vary in training are marked, so
        that nothing is compiled again. options: torch.compile's.
        """
        encode_image = torch.compile(self.base_model.encode_image, **options)
        encode_words = torch.compile(self.base_model.encode_words, **options)

        def image(images, class_only):
            torch._dynamo.maybe_mark_dynamic(images, 0)  # the last batch of an epoch is smaller
            return encode_image(images, class_only)

        def text(ids):
            # PyTorch 2.6 compiles the look-up into wrong gradients (on a CPU; later versions do not)
            words = self.base_model.token_embedding(ids)
            torch._dynamo.maybe_mark_dynamic(words, (0, 1))
            return encode_words(words)

        self.compiled = image, text

    def autocast(self, device):
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast_dtype)

    def cross_former(self, text, image, pick=None):
        """Text tokens (B, L, D) ask image tokens (B, N, D). Returns (B, L, D), or (B, M, D) of those picked.

        Padding takes part as in the published code; there is no residual around the cross attention.
        """
        image = self.ln_pre_i(image)
        x = attend(self.cross_attn, self.ln_pre_t(text), image, image)
        return self.ln_post(self.cross_modal_transformer(x, pick))

    # ---- training ----

    @staticmethod
    def plan(batch):
        """What forward must know of a batch's ids to waste nothing; found on the host.

        same_caption: whether every loss sees the masked caption (then one text pass serves all).
        text_length: up to the last EOT; a causal encoder does not see what follows. Rounded up, so that a GPU
        meets few lengths.
        mlm_at (B, M): the positions with a label, filled up with others.
        mlm_rows (n,): where, in (B · M), there is a label.
        """
        ids, labels = batch["caption_ids"], batch.get("mlm_labels")
        longest = max((ids.argmax(dim=1) + 1).tolist(), default=1)  # a process's share may be empty
        plan = {"text_length": min(-(-longest // LENGTH_STEP) * LENGTH_STEP, ids.shape[1])}
        if labels is not None:
            labelled = labels != 0
            most = max(labelled.sum(dim=1).tolist(), default=1) or 1
            at = labelled.int().argsort(dim=1, descending=True, stable=True)[:, :most]
            plan["mlm_at"] = at
            plan["mlm_rows"] = labelled.gather(1, at).flatten().nonzero()[:, 0]
            plan["same_caption"] = torch.equal(ids, batch["mlm_ids"])
        return plan

    def forward(self, batch):
        """A training batch to named numbers: <name>_loss for each loss asked for, weighted, and img_acc,
        txt_acc, mlm_acc, temperature. batch: pids, images, caption_ids; with mlm also mlm_ids, mlm_labels.

        Under torchrun the batch is this process's share, and the numbers are those of the whole batch.
        """
        image_features, text_features, masked = self.encode(batch)
        report = self.compare(image_features, text_features, batch["pids"])
        if masked:
            count = total(torch.full((), float(len(masked[1])), device=image_features.device))
            report.update({name: total(part) for name, part in self.fill_in(*masked, count).items()})
        return report

    def encode(self, batch):
        """(B, D) and (B, D) fp32 features, and with mlm the (n, V) scores and (n,) labels of masked words."""
        if "text_length" not in batch:
            batch = {**batch, **self.plan(batch)}
        caption_ids, mlm = batch["caption_ids"], "mlm" in self.loss_names
        plain = self.base_model.encode_image, self.base_model.encode_text
        encode_image, encode_text = self.compiled or plain
        with self.autocast(caption_ids.device):
            image_tokens = encode_image(batch["images"], class_only=not mlm)  # (B, N, D)
            if mlm and batch["same_caption"]:
                masked_tokens = text_tokens = encode_text(caption_ids)  # (B, L, D)
            else:
                caption_ids = caption_ids[:, : batch["text_length"]]
                text_tokens = encode_text(caption_ids)
                masked_tokens = encode_text(batch["mlm_ids"]) if mlm else None
            masked = None
            if mlm:
                masked = self.predict_masked(
                    masked_tokens, image_tokens, batch["mlm_labels"], batch["mlm_at"], batch["mlm_rows"]
                )
        return pooled(image_tokens), at_eot(text_tokens, caption_ids), masked

    def features(self, batch):
        """The two features that encode gives, without what only masked words need. batch: planned."""
        return self.encode_image(batch["images"]), self.encode_text(
            batch["caption_ids"][:, : batch["text_length"]]
        )

    def compare(self, image_features, text_features, pids):
        """The losses and accuracies that need features only, over the whole batch of all processes."""
        sizes = share_sizes(len(pids), pids.device)
        image_features, text_features = gather(image_features, sizes), gather(text_features, sizes)
        pids = gather(pids, sizes)
        report = {"temperature": self.temperature}
        if "itc" in self.loss_names:
            report["itc_loss"] = objectives.compute_itc(image_features, text_features, self.logit_scale)
        if "sdm" in self.loss_names:
            report["sdm_loss"] = objectives.compute_sdm(image_features, text_features, pids, self.logit_scale)
        if "cmpm" in self.loss_names:
            report["cmpm_loss"] = objectives.compute_cmpm(image_features, text_features, pids)
        if "id" in self.loss_names:
            image_logits, text_logits = self.classify(image_features), self.classify(text_features)
            id_loss = objectives.compute_id(image_logits, text_logits, pids)
            report["id_loss"] = id_loss * self.loss_weights["id"]
            report["img_acc"] = accuracy(image_logits, pids)
            report["txt_acc"] = accuracy(text_logits, pids)
        return report

    def classify(self, features):
        """(B, D) features to (B, K) logits, fp32; the classifier sees them in its own precision."""
        with self.autocast(features.device):
            return at_least_fp32(self.classifier(features.to(self.classifier.weight.dtype)))

    def fill_in(self, scores, labels, count):
        """What these masked words add to the batch's mlm loss and accuracy. scores: (n, V). labels: (n,).
        count: the labels of the whole batch, of which these may be a part."""
        loss = objectives.compute_mlm(scores, labels, count) * self.loss_weights["mlm"]
        right = (scores.detach().argmax(dim=1) == labels).float().sum()
        return {"mlm_loss": loss, "mlm_acc": right / count.clamp(min=1)}

    def predict_masked(self, text, image, labels, at, rows):
        """Scores over the vocabulary, fp32, and labels, at the n labelled positions only: (n, V), (n,).

        The published code scores all L positions and ignores the rest in the loss: the same value.
        """

        def pick(x):
            return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[-1]))

        x = self.cross_former(text, image, pick)  # (B, M, D)
        x = x.flatten(0, 1)[rows]  # (n, D)
        return at_least_fp32(self.mlm_head(x)), labels.gather(1, at).flatten()[rows]


def pooled(image_tokens):
    """The class token of (B, N, D), or a ResNet's pooled (B, D) itself; fp32."""
    return at_least_fp32(image_tokens[:, 0] if image_tokens.ndim == 3 else image_tokens)


def at_eot(text_tokens, ids):
    """(B, L, D) to (B, D), fp32: EOT has the largest id, and the first one counts."""
    return at_least_fp32(text_tokens[torch.arange(ids.shape[0], device=ids.device), ids.argmax(dim=-1)])


@torch.no_grad()
def accuracy(logits, labels):
    """Share of rows of [B, classes] whose largest entry is the label."""
    return (logits.argmax(dim=1) == labels).float().mean()


@torch.no_grad()
def initialise_heads(model, D, cmt_depth):
    """The new layers' starting weights; what is not named here keeps PyTorch's."""
    std, out_std, fc_std = D**-0.5, D**-0.5 * (2 * cmt_depth) ** -0.5, (2 * D) ** -0.5
    if "id" in model.loss_names:
        nn.init.normal_(model.classifier.weight, std=0.001)
        nn.init.zeros_(model.classifier.bias)
    if "mlm" in model.loss_names:
        nn.init.normal_(model.cross_attn.in_proj_weight, std=std)
        nn.init.normal_(model.cross_attn.out_proj.weight, std=out_std)
        for block in model.cross_modal_transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=std)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=fc_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=out_std)
        nn.init.normal_(model.mlm_head.dense.weight, std=fc_std)
        nn.init.normal_(model.mlm_head.fc.weight, std=out_std)
