"""Losses over a batch that does not fit into memory: GradCache, arXiv 2101.06983.

Contrastive losses look at all pairs of a batch, so gradients of its parts cannot just be added up. But they
depend on the samples through features only: first all features without activations, then the loss and its
gradient for each feature, then each part again with activations, with that gradient put in.
"""

import torch

from utils.dist import average_gradients, process_sum, world_size
from utils.losses import is_loss


def backward_in_parts(model, parts):
    """Leave in the parameters' .grad what one backward pass of the whole batch would; returns its report.

    model: an IRRA, not wrapped. parts: the batch in planned parts (utils.batch); one has activations at a
    time. Exact but for rounding, since nothing in a ViT looks across a batch (a ResNet's normalisation does).
    """
    with torch.no_grad():
        of_parts = [model.features(part)[0] for part in parts]
    found = {name: torch.cat([of[name] for of in of_parts]).requires_grad_() for name in of_parts[0]}
    of_samples = [part.known() for part in parts]
    known = {name: torch.cat([of[name] for of in of_samples]) for name in of_samples[0]}
    report = model.compare(found, known)
    losses = [value for name, value in report.items() if is_loss(name)]
    if losses:
        sum(losses).backward()  # the features' gradients, and the classifier's
    mlm = "mlm" in model.loss_names
    if mlm:
        labelled = float(sum(len(part.mlm_rows) for part in parts))
        count = process_sum(torch.full((), labelled, device=parts[0].pids.device))
        words = []
    sizes = [len(part.pids) for part in parts]
    of_each = [
        dict(zip(found, part, strict=True))
        for part in zip(*(grads(x, sizes) for x in found.values()), strict=True)
    ]
    for part, gradients in zip(parts, of_each, strict=True):
        features, masked = model.features(part, words=mlm)
        surrogate = sum((features[name] * gradient).sum() for name, gradient in gradients.items())
        if mlm:
            words.append(model.fill_in(*masked, count))
            surrogate = surrogate + world_size() * words[-1]["mlm_loss"]  # gradients are averaged below
        surrogate.backward()
    if mlm:
        report.update({name: process_sum(sum(w[name].detach() for w in words)) for name in words[0]})
    average_gradients(model)
    return {name: value.detach() for name, value in report.items()}


def grads(features, sizes):
    """What the losses ask of each part's features; zeros where no loss compares any (mlm alone)."""
    gradient = torch.zeros_like(features) if features.grad is None else features.grad
    return gradient.split(sizes)
