"""IRRA: CLIP's two encoders, a classifier of persons, and masked words predicted with the image's help."""

import functools
import math
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import objectives
from model.clip_model import LayerNorm, QuickGELU, Transformer, at_least_fp32, attend, take
from model.token_selection import EMBEDDING, SelectedPatches, SelectedWords
from utils.batch import PLAN, Batch
from utils.dist import gather, process_sum, share_sizes
from utils.losses import LOSSES


class Part(NamedTuple):
    """What stands at the top of IRRA, and what others must know of it."""

    loss: str | None  # that brings it: a head; None: no head
    lr_factor: float | None = None  # of its rate; None: the published rule, which reads parameters' names
    lr: float | None = None  # its rate, whatever --lr is
    encodes: bool = False  # features depend on it, so a search index is of these weights
    decays: bool = True  # towards 0, by --weight_decay
    of_persons: bool = False  # the first dimension of its parameters counts the training persons


PARTS = {  # a parameter of a part without a row here has no learning rate: that is an error
    "base_model": Part(None, encodes=True),
    "classifier": Part("id", of_persons=True),
    "cross_attn": Part("mlm"),
    "cross_modal_transformer": Part("mlm"),
    "ln_pre_t": Part("mlm"),
    "ln_pre_i": Part("mlm"),
    "ln_post": Part("mlm"),
    "mlm_head": Part("mlm"),
    "simclr_mlp": Part("simclr", lr_factor=1.0),
    "visul_emb_layer": Part("tse", lr=1e-3, encodes=True),
    "texual_emb_layer": Part("tse", lr=1e-3, encodes=True),
    "logit_scale_log": Part(None, lr_factor=1.0, decays=False),  # of --learn_temperature
}
LARGEST_SCALE = 100  # that is learnt, as in CLIP


GIVEN = (  # what a loss may ask for by the name of an argument; see IRRA.compare
    *("image_features", "text_features", "pids", "logit_scale", "weights", "image_logits", "text_logits"),
    *("image_patches", "text_tokens", "image_selected", "text_selected", "compared"),
    *("second_features", "second_selected", "second_factor"),
    *("view_features", "strong_views"),
    *("scores", "labels", "count"),  # of mlm
    "epochs_done",  # of the training, with a fraction
)


class Values(NamedTuple):
    """What of the options goes into a model's arithmetic."""

    temperature: float = 0.02  # of cosines
    learn_temperature: bool = False  # that one is where a parameter starts
    weights: Mapping = {}  # {name of a loss: factor}, of those that have one
    constants: Mapping = {}  # what losses ask for by the name of an argument
    select_ratio: float = 0.3  # this and the next: see model.token_selection
    tse_norm: str = "eval"
    text_length: int = 77


class IRRA(nn.Module):
    """arXiv 2303.12501. Legend: B batch, L text length, N image tokens, D width, K persons, V vocabulary."""

    parts = PARTS

    def __init__(self, clip, loss_names, num_classes, cmt_depth=4, values=None):
        """clip: a model.clip_model.CLIP. loss_names: of utils.losses; some bring heads. values: of Values."""
        super().__init__()
        self.loss_names, values = tuple(loss_names), values or Values()
        self.loss_weights, self.constants = dict(values.weights), dict(values.constants)
        self.constant_scale = 1 / values.temperature
        start = torch.tensor(math.log(self.constant_scale))
        self.register_parameter("logit_scale_log", nn.Parameter(start) if values.learn_temperature else None)
        temperature = torch.tensor(1 / self.constant_scale)
        self.register_buffer("temperature", temperature, persistent=False)  # to report
        self.epochs_done = math.inf  # the loop sets it before each step
        self.autocast_dtype = None  # set by model.build for --precision bf16
        self.compiled = None  # set by compile_encoders, see `encoders`
        self.base_model = clip
        self.width = D = clip.text_projection.shape[1]  # of a feature
        self.uses_tokens = any(LOSSES[name].of == "tokens" for name in self.loss_names)
        if "id" in self.loss_names:
            self.classifier = nn.Linear(D, num_classes)
        if "mlm" in self.loss_names:
            self.cross_attn = nn.MultiheadAttention(D, D // 64, batch_first=True)
            self.cross_modal_transformer = Transformer(D, cmt_depth, D // 64)
            self.ln_pre_t = LayerNorm(D)
            self.ln_pre_i = LayerNorm(D)
            self.ln_post = LayerNorm(D)
            V = clip.token_embedding.num_embeddings
            head = OrderedDict(dense=nn.Linear(D, D), gelu=QuickGELU(), ln=LayerNorm(D), fc=nn.Linear(D, V))
            self.mlm_head = nn.Sequential(head)
        initialise_heads(self, D, cmt_depth)
        if "simclr" in self.loss_names:
            self.simclr_mlp = nn.Sequential(nn.Linear(D, 128), nn.ReLU(), nn.Linear(128, D))
        self.selects = "tse" in self.loss_names
        if self.selects:
            patches = len(clip.visual.positional_embedding) - 1
            self.visul_emb_layer = SelectedPatches(D, patches, values.select_ratio, values.tse_norm)
            words = values.text_length - 2
            self.texual_emb_layer = SelectedWords(D, words, values.select_ratio, values.tse_norm)
            self.width = D + EMBEDDING

    @property
    def logit_scale(self):
        """1 / temperature: a number, or where it is learnt a tensor with a gradient."""
        if self.logit_scale_log is None:
            return self.constant_scale
        scale = self.logit_scale_log.exp()
        return scale + (scale.clamp(max=LARGEST_SCALE) - scale).detach()  # as published it can come back

    # ---- encoders ----

    def encode_image(self, images):
        """(B, 3, H, W), normalised pixels, to (B, width) fp32. The class token's feature, not L2-normalised;
        with token selection both embeddings, of equal norms, so that a cosine is the mean of the two."""
        with self.autocast(images.device):
            feature, tokens, row = self.image_side(images, attention=self.selects)
            return side_by_side(feature, self.visul_emb_layer(tokens, row)) if self.selects else feature

    def encode_text(self, ids):
        """(B, L) token ids to (B, width) fp32, the feature at EOT; see encode_image."""
        with self.autocast(ids.device):
            feature, tokens, row = self.text_side(ids, attention=self.selects)
            return side_by_side(feature, self.texual_emb_layer(tokens, row, ids)) if self.selects else feature

    def embeddings(self):
        """{name: columns} of the embeddings that encode_image and encode_text put side by side."""
        D = self.base_model.text_projection.shape[1]
        return {"global": slice(0, D), "selected": slice(D, None)} if self.selects else {}

    def encoders(self):
        """CLIP's encode_image and encode_text; those of torch.compile where gradients are wanted."""
        if self.compiled and torch.is_grad_enabled():
            return self.compiled
        return self.base_model.encode_image, self.base_model.encode_text

    def image_side(self, images, all_tokens=False, attention=False):
        """(B, D) features, the tokens they are read from, (B, N, D) or the class token's (B, 1, D), and with
        attention how much each counts for that, (B, N), else None. With attention and without all_tokens they
        are the class token's and the selected ones."""
        encode_image, _ = self.encoders()
        with self.autocast(images.device):
            if not attention:
                tokens, row = encode_image(images, class_only=not all_tokens), None
            else:
                most = None if all_tokens else self.visul_emb_layer.k
                tokens, row = encode_image(images, class_only=False, attention=True, most=most)
            return pooled(tokens), tokens, row

    @torch.no_grad()
    def word_similarities(self, images, ids):
        """(B, L): each word's largest cosine with a patch of its image, of what all but the last two blocks
        give, projected as what the last gives is; as in NAM's pretraining (arXiv 2405.04940)."""
        with self.autocast(images.device):
            patches = self.base_model.encode_image(images, skip=2)[:, 1:]
            words = self.base_model.encode_text(ids, skip=2)
        patches, words = (F.normalize(at_least_fp32(x), dim=2) for x in (patches, words))
        return (words @ patches.transpose(1, 2)).amax(dim=2)

    def text_side(self, ids, attention=False):
        """(B, D) features, the tokens (B, L, D) that they are read from, and with attention how much each
        counts for that, (B, L), else None."""
        _, encode_text = self.encoders()
        with self.autocast(ids.device):
            if not attention:
                tokens, row = encode_text(ids), None
            else:
                tokens, row = encode_text(ids, at=ids.argmax(dim=1))
            return at_eot(tokens, ids), tokens, row

    def features(self, batch, words=False, second=True):
        """The one way from a planned batch, whole or a part, to what its losses compare: {name: (B, …)}.

        words: also the (n, V) scores and (n,) labels of its masked words; else None. second: also its
        further_features.
        """
        all_tokens = words or self.uses_tokens
        with self.autocast(batch.caption_ids.device):
            image, image_tokens, image_row = self.image_side(batch.images, all_tokens, self.selects)
            shared = words and batch.same_caption
            # padding takes part in the mlm head, in efa, and where a batch normalises its selected tokens
            whole = shared or self.uses_tokens or (self.selects and self.texual_emb_layer.norm == "train")
            ids = batch.caption_ids if whole else batch.caption_ids[:, : batch.text_length]
            text, text_tokens, text_row = self.text_side(ids, self.selects)
            found = {"image_features": image, "text_features": text}
            if self.selects:
                found["image_selected"] = self.visul_emb_layer(image_tokens, image_row)
                found["text_selected"] = self.texual_emb_layer(text_tokens, text_row, ids)
            if self.uses_tokens:
                found["image_patches"] = at_least_fp32(image_tokens[:, 1:])
                found["text_tokens"] = at_least_fp32(text_tokens)
            if second:
                found.update(self.further_features(batch))
            masked = None
            if words:
                masked_tokens = text_tokens if shared else self.text_side(batch.mlm_ids)[1]
                masked = self.predict_masked(masked_tokens, image_tokens, batch)
        return found, masked

    def further_features(self, batch):
        """What the losses compare of a planned batch's second captions, and of its images' other views:
        {name: (B, …)}."""
        found = {}
        if "second" in self.loss_names:
            ids = batch.second_caption_ids
            if not (self.selects and self.texual_emb_layer.norm == "train"):  # see `features`
                ids = ids[:, : batch.second_length]
            found["second_features"], tokens, row = self.text_side(ids, self.selects)
            if self.selects:
                found["second_selected"] = self.texual_emb_layer(tokens, row, ids)
        if batch.second_images is not None and any(LOSSES[name].views for name in self.loss_names):
            found["view_features"] = self.image_side(batch.second_images)[0]
        if "simclr" in self.loss_names:
            features = self.image_side(batch.strong_images.flatten(0, 1))[0]  # (2B, D)
            features = self.simclr_mlp(features.to(self.simclr_mlp[0].weight.dtype))
            found["strong_views"] = at_least_fp32(features).unflatten(0, (-1, 2))
        return found

    def compile_encoders(self, **options):
        """Train with encoders that torch.compile makes; evaluation, whose sizes vary, goes without.

        Functions are compiled, not modules: state-dict keys stay. Sizes that vary in training are marked, so
        that nothing is compiled again. options: torch.compile's.
        """
        encode_image = torch.compile(self.base_model.encode_image, **options)
        encode_words = torch.compile(self.base_model.encode_words, **options)

        def image(images, class_only, **attention):
            torch._dynamo.maybe_mark_dynamic(images, 0)  # the last batch of an epoch is smaller
            return encode_image(images, class_only, **attention)

        def text(ids, at=None):
            # PyTorch 2.6 compiles the look-up into wrong gradients (on a CPU; later versions do not)
            words = self.base_model.token_embedding(ids)
            torch._dynamo.maybe_mark_dynamic(words, (0, 1))
            if at is not None:
                torch._dynamo.maybe_mark_dynamic(at, 0)
            return encode_words(words, at)

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
        x = attend(self.cross_attn, self.ln_pre_t(text), image)
        return self.ln_post(self.cross_modal_transformer(x, pick))

    # ---- training ----

    @staticmethod
    def plan(batch):
        """What Batch.planned finds of a dict, as a dict: for a loop of one's own that moves a dict to the
        device, forward(moved({**batch, **model.plan(batch)}))."""
        planned = Batch.of(batch).planned()
        return {key: value for key, value in planned.items() if key in PLAN}

    def forward(self, batch):
        """A training batch to named numbers: <name>_loss for each loss asked for, weighted, and img_acc,
        txt_acc, mlm_acc, temperature. batch: a utils.batch.Batch, or a dict with its keys.

        Under torchrun the batch is this process's share, and the numbers are those of the whole batch.
        """
        batch = Batch.of(batch).planned()
        found, masked = self.features(batch, words="mlm" in self.loss_names)
        report = self.compare(found, batch.known())
        if masked:
            count = process_sum(torch.full((), float(len(masked[1])), device=batch.pids.device))
            report.update({name: process_sum(part) for name, part in self.fill_in(*masked, count).items()})
        return report

    def compare(self, found, known):
        """The losses and accuracies that need features only, over the whole batch of all processes.

        found: {name: (B, …)} as `features` gives it, not normalised. known: as Batch.known gives it.
        What the losses' functions may ask for, by the name of an argument, stands in `given`.
        """
        given = self.gathered(found, known)
        # of a copy: a dict that held itself would stay, features and all, until Python looks for such
        given["compared"] = functools.partial(self.sum_of_pairs, dict(given))
        learnt = self.logit_scale_log is not None
        report = {"temperature": 1 / given["logit_scale"].detach() if learnt else self.temperature}
        of_batch = [name for name in LOSSES if name in self.loss_names and LOSSES[name].of != "words"]
        for name in sorted(of_batch, key=lambda name: name != "itc"):  # first, as published: sums round so
            if name == "id":
                for side in ("image", "text"):
                    given[f"{side}_logits"] = self.classify(given[f"{side}_features"])  # (B, K), fp32
                report["img_acc"] = accuracy(given["image_logits"], given["pids"])
                report["txt_acc"] = accuracy(given["text_logits"], given["pids"])
            report[f"{name}_loss"] = self.weighted(name, objectives.compute(name, given))
        return report

    def gathered(self, found, known):
        """What every loss may ask for, by name: features and what is known of the samples, (B, …) of all
        processes, and what is the same for all."""
        sizes = share_sizes(len(known["pids"]), known["pids"].device)
        given = {name: gather(values, sizes) for name, values in {**found, **known}.items()}
        return {**given, **self.constants, "logit_scale": self.logit_scale, "epochs_done": self.epochs_done}

    def losses_of_samples(self, batch):
        """((B,) indices, (kinds, B) losses): what each sample of a planned batch loses, of its first caption,
        in the losses of two features: of the global ones and, with token selection, of the selected ones."""
        found, _ = self.features(batch, second=False)
        given = self.gathered(found, {"pids": batch.pids, "indices": batch.indices})
        sides = [(given["image_features"], given["text_features"])]
        sides += [(given["image_selected"], given["text_selected"])] if self.selects else []
        names = [name for name in self.loss_names if LOSSES[name].each]
        losses = []
        for image, text in sides:
            given.update(image_features=image, text_features=text)
            each = {name: objectives.compute(name, given, kind="each") for name in names}
            losses.append(sum(self.weighted(name, loss) for name, loss in each.items()))
        return given["indices"], torch.stack(losses)

    def sum_of_pairs(self, given, image_features, text_features):
        """What the losses of two features alone give for these features, which have no second view."""
        given = {**given, "image_features": image_features, "text_features": text_features}
        given.pop("view_features", None)
        names = [name for name in self.loss_names if LOSSES[name].of == "features"]
        return sum(self.weighted(name, objectives.compute(name, given)) for name in names)

    def weighted(self, name, loss):
        return loss * self.loss_weights[name] if name in self.loss_weights else loss

    def classify(self, features):
        """(B, D) features to (B, K) logits, fp32; the classifier sees them in its own precision."""
        with self.autocast(features.device):
            return at_least_fp32(self.classifier(features.to(self.classifier.weight.dtype)))

    def fill_in(self, scores, labels, count):
        """What these masked words add to the batch's mlm loss and accuracy. scores: (n, V). labels: (n,).
        count: the labels of the whole batch, of which these may be a part."""
        loss = self.weighted("mlm", objectives.compute_mlm(scores, labels, count))
        right = (scores.detach().max(dim=1).indices == labels).float().sum()
        return {"mlm_loss": loss, "mlm_acc": right / count.clamp(min=1)}

    def predict_masked(self, text, image, batch):
        """Scores over the vocabulary, fp32, and labels, at the n labelled positions only: (n, V), (n,).

        The published code scores all L positions and ignores the rest in the loss: the same value.
        """
        at, rows = batch.mlm_at, batch.mlm_rows
        x = self.cross_former(text, image, functools.partial(take, at))  # (B, M, D)
        x = x.flatten(0, 1)[rows]  # (n, D)
        return at_least_fp32(self.mlm_head(x)), batch.mlm_labels.gather(1, at).flatten()[rows]


def pooled(image_tokens):
    """The class token of (B, N, D), or a ResNet's pooled (B, D) itself; fp32."""
    return at_least_fp32(image_tokens[:, 0] if image_tokens.ndim == 3 else image_tokens)


def side_by_side(feature, selected):
    """(B, D + E), of norm 1: the inner product with another is the mean of the two cosines."""
    return torch.cat([F.normalize(feature, dim=1), F.normalize(selected, dim=1)], dim=1) * 0.5**0.5


def at_eot(text_tokens, ids):
    """(B, L, D) to (B, D), fp32: EOT has the largest id, and the first one counts."""
    return at_least_fp32(text_tokens[torch.arange(ids.shape[0], device=ids.device), ids.argmax(dim=-1)])


@torch.no_grad()
def accuracy(logits, labels):
    """Fraction of rows of [B, classes] whose largest entry is the label."""
    return (logits.max(dim=1).indices == labels).float().mean()


@torch.no_grad()
def initialise_heads(model, D, cmt_depth):
    """The new layers' starting weights; what is not named here keeps PyTorch's."""
    if "id" in model.loss_names:
        nn.init.normal_(model.classifier.weight, std=0.001)
        nn.init.zeros_(model.classifier.bias)
    if "mlm" in model.loss_names:
        out_std = D**-0.5 * (2 * cmt_depth) ** -0.5
        nn.init.normal_(model.cross_attn.in_proj_weight, std=D**-0.5)
        nn.init.normal_(model.cross_attn.out_proj.weight, std=out_std)
        model.cross_modal_transformer.initialise(D)
        nn.init.normal_(model.mlm_head.dense.weight, std=(2 * D) ** -0.5)
        nn.init.normal_(model.mlm_head.fc.weight, std=out_std)
