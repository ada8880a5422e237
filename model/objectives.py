"""The losses, pure functions in fp32. Each is compute_<name> here and a row of utils.losses.LOSSES.

image_features, text_features: [B, D], not normalised. pids: [B]. logit_scale: 1 / temperature. weights: [B],
what a sample's rows count for. each_<name> gives each sample's share, [B].
"""

import functools
import inspect

import torch
import torch.nn.functional as F

from utils.losses import LOSSES


def same_person(pids):
    """pids: [B]. Returns [B, B] floats, 1 where row and column show the same person."""
    return (pids[:, None] == pids[None, :]).float()


def row_kls(logits, log_true):
    """Σ_j p_ij (log p_ij − log q_ij) of each row i: KL(softmax || truth). logits, log_true: [B, B]."""
    log_predicted = F.log_softmax(logits, dim=1)
    return (log_predicted.exp() * (log_predicted - log_true)).sum(dim=1)


def row_kl(logits, log_true):
    return row_kls(logits, log_true).mean()


def log_label(true, epsilon):
    """log(q_ij + epsilon), q a row of the labels true, [B, B], divided by its sum."""
    return torch.log(true / true.sum(dim=1, keepdim=True) + epsilon)


def normalised(image_features, text_features):
    return F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)


def cosines(image_features, text_features):
    """[B texts, B images]."""
    image, text = normalised(image_features, text_features)
    return text @ image.t()


def weighted_mean(losses, weights):
    """Σ y_i l_i / Σ y_i; 0 where every weight is 0. weights: None where all are 1."""
    if weights is None:
        return losses.mean()
    return (weights * losses).sum() / weights.sum().clamp(min=1e-12)


def weighted_sum(losses, weights):
    return losses.sum() if weights is None else (weights * losses).sum()


# ---- the losses ----


def compute_sdm(
    image_features, text_features, pids, logit_scale, image_ids=None, factor=0.3, epsilon=1e-8, weights=None
):
    """Similarity distribution matching, arXiv 2303.12501: KL(predicted || true) over rows, both directions.

    Two samples match when they show the same person, so a row may have several matches. With image_ids [B]
    another image of the same person counts only `factor`.
    """
    true = same_person(pids)
    if image_ids is not None:
        same_image = same_person(image_ids)
        true = (true - same_image) * factor + same_image
    log_true = log_label(true, epsilon)
    image, text = normalised(image_features, text_features)
    logits = logit_scale * text @ image.t()  # [B texts, B images]
    if weights is None:
        return row_kl(logits, log_true) + row_kl(logits.t(), log_true)
    return weighted_mean(row_kls(logits, log_true) + row_kls(logits.t(), log_true), weights)


def each_sdm(image_features, text_features, pids, logit_scale, epsilon=1e-8):
    log_true = log_label(same_person(pids), epsilon)
    logits = logit_scale * cosines(image_features, text_features)
    return row_kls(logits, log_true) + row_kls(logits.t(), log_true)


def compute_itc(image_features, text_features, logit_scale, weights=None):
    """Image-text contrastive loss (InfoNCE, arXiv 1807.03748, as in CLIP): the pair is the only match."""
    if weights is not None:
        return weighted_mean(each_itc(image_features, text_features, logit_scale), weights)
    image, text = normalised(image_features, text_features)
    logits = logit_scale * image @ text.t()
    pair = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.t(), pair)) / 2


def each_itc(image_features, text_features, logit_scale):
    logits = logit_scale * cosines(image_features, text_features)
    pair = torch.arange(len(logits), device=logits.device)
    sides = [F.cross_entropy(side, pair, reduction="none") for side in (logits, logits.t())]
    return sum(sides) / 2


def compute_cmpm(image_features, text_features, pids, epsilon=1e-8):
    """Cross-modal projection matching (Zhang and Lu, ECCV 2018), as the published code has it: unlike in sdm
    there is no temperature, one side stays unnormalised, and a row of labels is divided by its L2 norm, not
    by its sum."""
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


def compute_tal(image_features, text_features, pids, tau, margin, weights=None):
    """Triplet alignment (RDE, arXiv 2308.09911): each row's matches, softly averaged, are to lie `margin`
    above the soft maximum of all that do not match. Summed over the batch, as published, not averaged.

    tau: the temperature of both softmaxes. With log-sum-exp, so that no tau overflows; a row in which all
    show the same person adds nothing (published: a gradient of NaN).
    """
    return weighted_sum(each_tal(image_features, text_features, pids, tau, margin), weights)


def each_tal(image_features, text_features, pids, tau, margin):
    same = pids[:, None] == pids[None, :]
    has_negative = ~same.all(dim=1)

    def one_direction(similarity):
        scaled = similarity / tau
        alpha = scaled.detach().masked_fill(~same, -torch.inf).softmax(dim=1)
        positive = (alpha * similarity).sum(dim=1)
        # a row without negatives would be a log of 0: its entries are put in, and its loss left out
        negative = tau * scaled.masked_fill(same & has_negative[:, None], -torch.inf).logsumexp(dim=1)
        return (margin + negative - positive).clamp(min=0) * has_negative

    similarity = cosines(image_features, text_features)
    return one_direction(similarity) + one_direction(similarity.t())


def compute_trl(image_features, text_features, pids, tau, margin, weights=None):
    """compute_tal with the hardest negative instead of the soft maximum. As published the same person's
    entries count as 0 among them, not as absent."""
    return weighted_sum(each_trl(image_features, text_features, pids, tau, margin), weights)


def each_trl(image_features, text_features, pids, tau, margin):
    same = same_person(pids)

    def one_direction(similarity):
        alpha = (similarity.detach() / tau).masked_fill(same == 0, -torch.inf).softmax(dim=1)
        hardest = (similarity * (1 - same)).max(dim=1).values
        return (margin + hardest - (alpha * similarity).sum(dim=1)).clamp(min=0)

    similarity = cosines(image_features, text_features)
    return one_direction(similarity) + one_direction(similarity.t())


def gap_to_first(similarity, same):
    """[B]: how far each row's best entry is above that of its first match. same: [B, B], 1 for matches."""
    return similarity.max(dim=1).values - similarity.gather(1, same.argmax(dim=1, keepdim=True))[:, 0]


def compute_asdm(image_features, text_features, pids, logit_scale, strength=0.1, epsilon=1e-8):
    """Adaptive similarity distribution matching (FMFA, arXiv 2509.13754): sdm whose rows weigh more the
    farther their best image is above their first match, in cosines. The gradient flows through that too.

    As published the first sample of the person counts as the match, whichever the pair is.
    """
    true = same_person(pids)
    log_true = log_label(true, epsilon)

    def one_direction(similarity):
        gap = gap_to_first(similarity, true)
        return ((1 + strength * gap) * row_kls(logit_scale * similarity, log_true)).mean()

    similarity = cosines(image_features, text_features)
    return one_direction(similarity) + one_direction(similarity.t())


def compute_nitc(
    image_features,
    text_features,
    pids,
    logit_scale,
    soft_label,
    epochs_done,
    weights=None,
    view_features=None,
):
    """Normalised image-text contrastive loss (TBPS-CLIP, arXiv 2308.10045): each row's cross entropy with its
    matches, which share the label, and with the model's own similarities, without gradient.

    soft_label: the similarities' share of the label. epochs_done: in the first epoch it grows to that from 0.
    view_features: [B, D], of second views of the images: the loss is then the mean of both (MVS).
    """
    views = [image_features] if view_features is None else [image_features, view_features]
    given = (text_features, pids, logit_scale, soft_label, epochs_done)
    losses = sum(each_nitc(view, *given) for view in views) / len(views)
    return weighted_mean(losses, weights)


def each_nitc(image_features, text_features, pids, logit_scale, soft_label, epochs_done):
    true = same_person(pids)
    true = true / true.sum(dim=1, keepdim=True)
    soft = soft_label * min(1, epochs_done)

    def one_direction(logits):
        log_predicted = F.log_softmax(logits, dim=1)
        label = soft * log_predicted.detach().exp() + (1 - soft) * true
        return -(label * log_predicted).sum(dim=1)

    logits = logit_scale * cosines(image_features, text_features)
    return (one_direction(logits) + one_direction(logits.t())) / 2


def compute_ritc(image_features, text_features, pids, logit_scale, epsilon=1e-2, weights=None):
    """Reversed image-text contrastive loss (TBPS-CLIP, arXiv 2308.10045): half of sdm, with another epsilon,
    so that what does not match counts less."""
    sdm = compute_sdm(image_features, text_features, pids, logit_scale, epsilon=epsilon, weights=weights)
    return sdm / 2


def each_ritc(image_features, text_features, pids, logit_scale, epsilon=1e-2):
    return each_sdm(image_features, text_features, pids, logit_scale, epsilon) / 2


def compute_citc(image_features, text_features):
    """Cyclic image-text contrastive loss (CyCLIP, arXiv 2205.14459, as in TBPS-CLIP): two images are to be as
    similar as their texts, and an image and another's text as that image and the first's text. In cosines:
    the published scale cancels."""
    image, text = normalised(image_features, text_features)
    within = image @ image.t() - text @ text.t()
    across = image @ text.t() - text @ image.t()
    return (within.square().mean() + across.square().mean()) / 4


def compute_simclr(strong_views, softness=0.1):
    """NT-Xent (SimCLR, arXiv 2002.05709, as in TBPS-CLIP): among all views each is to find the other one of
    its image. strong_views: [B, 2, D], not normalised. softness: its temperature."""
    views = F.normalize(strong_views.transpose(0, 1).flatten(0, 1), dim=1)  # [2B, D]
    logits = (views @ views.t() / softness).fill_diagonal_(-torch.inf)
    B = len(strong_views)
    return F.cross_entropy(logits, torch.arange(2 * B, device=logits.device).roll(B))


def compute_efa(text_tokens, image_patches, text_margin=0.1, image_margin=0.9):
    """Explicit fine-grained alignment (FMFA, arXiv 2509.13754): each word gathers the patches that it agrees
    with most, and words and patches are to find their own pair's gathered ones.

    text_tokens: [B, L, D], padding included, as published. image_patches: [B, N, D]. Neither normalised.
    """
    gathered = agreement_weights(text_tokens, image_patches) @ image_patches  # [B, L, D], one for each word
    return efa_side(text_tokens, gathered, text_margin) + efa_side(image_patches, gathered, image_margin)


def agreement_weights(text_tokens, image_patches):
    """[B, L, N]: the patches' shares in each word's row, of sum 1; those that agree less than 1/N are out."""
    agreement = text_tokens @ image_patches.transpose(1, 2)  # (B, L, N)
    low, high = agreement.amin(dim=2, keepdim=True), agreement.amax(dim=2, keepdim=True)
    weights = (agreement - low) / (high - low).clamp(min=1e-12)
    weights = weights.masked_fill(weights <= 1 / image_patches.shape[1], 0)
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-12)


def efa_side(tokens, gathered, margin):
    """tokens: [B, X, D]. gathered: [B, L, D]. As published both sums run over the first index."""
    x, c = F.normalize(tokens, dim=2), F.normalize(gathered, dim=2)
    # (B, X, D) against each (L, D): one row of the batch at a time would be slower, all at once B·B·X·L
    best = torch.einsum("ixd,jld->ijxl", x, c).amax(dim=3)  # (B, B, X)
    h = F.normalize(best.logsumexp(dim=2), dim=1)
    others = 1 - torch.eye(len(h), device=h.device, dtype=h.dtype)
    own = h.diagonal()
    pairs = own[:, None], own[None, :]
    return sum(((h - pair + margin) * others).logsumexp(dim=0).mean() for pair in pairs)


def compute_tse(image_selected, text_selected, compared):
    """RDE's second term: the losses of features, of the selected tokens' embeddings instead, [B, E] each.
    compared: takes the two to the sum of those losses."""
    return compared(image_selected, text_selected)


def compute_second(image_features, second_features, second_factor, compared):
    """RDA's term (ICL, CVPR 2025): the losses of features, of the images and their second captions instead.
    second_factor: [B], one number, by which it is multiplied. compared: see compute_tse."""
    return second_factor[0] * compared(image_features, second_features)


def compute_tse_second(image_selected, second_selected, second_factor, compared):
    """compute_second, of the selected tokens' embeddings."""
    return second_factor[0] * compared(image_selected, second_selected)


# ---- by name ----


def compute(name, given, kind="compute"):
    """The loss of that name, of what its function asks for; what has a default there may be missing.

    given: see model.irra.IRRA.compare. kind "each": the loss of each sample, [B], of those that have it.
    """
    function = globals()[f"{kind}_{name}"]
    needed, optional = needs(function)
    asked = [*needed, *(argument for argument in optional if argument in given)]
    return function(**{argument: given[argument] for argument in asked})


@functools.cache
def needs(function):
    """The names of its arguments without a default, and of those with one."""
    parameters = inspect.signature(function).parameters.values()
    needed = tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)
    return needed, tuple(parameter.name for parameter in parameters if parameter.name not in needed)


def check(name, given, options):
    """Raises KeyError where the loss asks for what nobody gives, or would keep its default of an option that
    is on the command line. given: names of what there is. options: {name: value} of the command line."""
    needed, optional = needs(globals()[f"compute_{name}"])
    known = {*given, *LOSSES[name].options}
    if unknown := [argument for argument in needed if argument not in known]:
        raise KeyError(
            f"compute_{name} asks for {unknown[0]}, and there is {', '.join(sorted(known))}; an option's "
            f"value comes with options=({unknown[0]!r},) in its row of LOSSES (utils/losses.py); anything "
            "else has a name in GIVEN (model/irra.py), and Batch.known (of samples), IRRA.features (of the "
            "model's outputs) or IRRA.gathered (the same for all) gives it"
        )
    if kept := [argument for argument in optional if argument in options and argument not in known]:
        raise KeyError(
            f"compute_{name} would never see --{kept[0]}: give its row of LOSSES (utils/losses.py) "
            f"options=({kept[0]!r},)"
        )
