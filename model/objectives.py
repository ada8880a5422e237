"""The losses, pure functions in fp32, and what they share. A loss is compute_<name> here and a row of
utils.losses.LOSSES."""

import functools
import inspect

import torch
import torch.nn.functional as F


def same_person(pids):
    """pids: [B]. Returns [B, B] floats, 1 where row and column show the same person."""
    return (pids[:, None] == pids[None, :]).float()


def row_kl(logits, log_true):
    """mean_i Σ_j p_ij (log p_ij − log q_ij): KL(softmax of a row || true row). logits, log_true: [B, B]."""
    log_predicted = F.log_softmax(logits, dim=1)
    return (log_predicted.exp() * (log_predicted - log_true)).sum(dim=1).mean()


def compute(name, given):
    """The loss of that name, of what its function asks for. given: see model.irra.IRRA.compare."""
    return globals()[f"compute_{name}"](**{argument: given[argument] for argument in needs(name)})


@functools.cache
def needs(name):
    """The arguments of compute_<name> that have no default."""
    parameters = inspect.signature(globals()[f"compute_{name}"]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)


def normalised(image_features, text_features):
    return F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)


def compute_sdm(image_features, text_features, pids, logit_scale, image_ids=None, factor=0.3, epsilon=1e-8):
    """Similarity distribution matching, arXiv 2303.12501: KL(predicted || true) over rows, both directions.

    image_features, text_features: [B, D], not normalised. pids: [B]. logit_scale: 1 / temperature.
    Two samples match when they show the same person, so a row may have several matches. With image_ids [B]
    another image of the same person counts only `factor`.
    """
    true = same_person(pids)
    if image_ids is not None:
        same_image = same_person(image_ids)
        true = (true - same_image) * factor + same_image
    log_true = torch.log(true / true.sum(dim=1, keepdim=True) + epsilon)
    image, text = normalised(image_features, text_features)
    logits = logit_scale * text @ image.t()  # [B texts, B images]
    return row_kl(logits, log_true) + row_kl(logits.t(), log_true)


def compute_itc(image_features, text_features, logit_scale):
    """Image-text contrastive loss (InfoNCE, arXiv 1807.03748, as in CLIP): the pair is the only match.

    image_features, text_features: [B, D], not normalised. logit_scale: 1 / temperature.
    """
    image, text = normalised(image_features, text_features)
    logits = logit_scale * image @ text.t()
    pair = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.t(), pair)) / 2


def compute_cmpm(image_features, text_features, pids, epsilon=1e-8):
    """Cross-modal projection matching (Zhang and Lu, ECCV 2018), as the published code has it.

    image_features, text_features: [B, D], not normalised. Unlike in sdm there is no temperature, one side
    stays unnormalised, and a row of labels is divided by its L2 norm, not by its sum.
    """
    true = same_person(pids)
    log_true = torch.log(true / true.norm(dim=1, keepdim=True) + epsilon)
    image, text = normalised(image_features, text_features)
    return row_kl(image_features @ text.t(), log_true) + row_kl(text_features @ image.t(), log_true)


def compute_id(image_logits, text_logits, pids):
    """Which training person is it? image_logits, text_logits: [B, K]. Mean of the two cross entropies."""
    return (F.cross_entropy(image_logits, pids) + F.cross_entropy(text_logits, pids)) / 2


def compute_mlm(scores, labels, count=None):
    """Masked language modelling. scores: [n, V]. labels: [n], 0 where nothing was masked; those are ignored.

    count: what the sum is divided by, where these are a part of a batch with that many labels.
    A batch without a label gives 0, not 0/0.
    """
    total = F.cross_entropy(scores, labels, ignore_index=0, reduction="sum")
    return total / ((labels != 0).sum() if count is None else count).clamp(min=1)
