"""Optimiser and schedule: the published rules for each parameter's rate, in a handful of groups."""

import math
from bisect import bisect_right
from inspect import signature

import torch
from torch.optim.lr_scheduler import LRScheduler

from solver.skip import skips_by_itself, skips_on_device
from utils.errors import InputError
from utils.settings import EPS

OPTIMIZERS = {  # how: of HOW
    "Adam": lambda groups, args, how: torch.optim.Adam(
        groups, lr=args.lr, betas=(args.alpha, args.beta), eps=EPS["Adam"], **how
    ),
    "SGD": lambda groups, args, how: torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, **how),
    "AdamW": lambda groups, args, how: torch.optim.AdamW(
        groups, lr=args.lr, betas=(args.alpha, args.beta), eps=EPS["AdamW"], **how
    ),
}
# In fp16 the roundings of the published step are part of the recipe: a chain of fp16 operations, each of
# which rounds, so that the second moment is stored as 0 below |g| = 5.5e-3. `foreach` rounds as that chain
# does. A fused step computes in fp32 and rounds once: the same for fp32 weights, another recipe for fp16.
HOW = {"fp32": {"fused": True, "foreach": False}, "fp16": {"fused": False, "foreach": True}}


def lr_and_decay(name, args, parts=None):
    """The published rules, read top to bottom; a later rule overrides an earlier one.

    parts: the model's, by name (model.irra.PARTS); one with a rate or a factor of its own goes by that alone.
    """
    if parts is not None:
        part = name.split(".")[0]
        if part not in parts:
            raise KeyError(f"{name} has no learning rate: give {part} a row in PARTS (model/irra.py)")
        row = parts[part]
        if row.lr is not None or row.lr_factor is not None:
            decay = args.weight_decay_bias if name.endswith("bias") else args.weight_decay
            decay = decay if row.decays else 0.0
            return args.lr * row.lr_factor if row.lr is None else row.lr, decay
    lr, decay = args.lr, args.weight_decay
    if "cross" in name:  # the interaction encoder starts from random weights
        lr = args.lr * args.lr_factor
    if "bias" in name:  # also the encoder's biases: this rule wins over the one above
        lr, decay = args.lr * args.bias_lr_factor, args.weight_decay_bias
    if "classifier" in name or "mlm_head" in name:  # their biases keep weight_decay_bias
        lr = args.lr * args.lr_factor
    return lr, decay


def param_groups(args, model):
    """One group for each rate, decay and way to compute, in the order in which the parameters meet them.

    The published code makes a group of each parameter, which triples the host time of a step.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stored = "fp16" if parameter.element_size() == 2 else "fp32"
            rule = lr_and_decay(name, args, getattr(model, "parts", None))
            groups.setdefault((*rule, stored), []).append(parameter)
    grouped = sum(len(parameters) for parameters in groups.values())
    assert grouped == sum(p.requires_grad for p in model.parameters())
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay, **HOW[stored]}
        for (lr, decay, stored), parameters in groups.items()
    ]


def build_optimizer(args, model):
    """The optimiser that --optimizer names. It heeds `found_inf`, by which the device leaves a step out."""
    groups = param_groups(args, model)
    how = HOW["fp32" if all(group["fused"] for group in groups) else "fp16"]
    optimizer = OPTIMIZERS[args.optimizer](groups, args, how)
    return optimizer if skips_by_itself(optimizer) else skips_on_device(optimizer)


def base_lr(optimizer):
    """The rate that --lr has become by now, to show: the first group may be of a head with a rate of its
    own."""
    groups, base = optimizer.param_groups, optimizer.defaults["lr"]
    return next((g["lr"] for g in groups if g.get("initial_lr", g["lr"]) == base), groups[0]["lr"])


def lr_at(
    epoch,
    base_lr,
    num_epoch,
    lrscheduler="cosine",
    warmup_epochs=5,
    warmup_factor=0.1,
    warmup_method="linear",
    milestones=(20, 50),
    gamma=0.1,
    target_lr=0,
    power=0.9,
):
    """Rate of the epoch (the first is 0) for a group whose rate is base_lr; the published formulas. Within
    an epoch, of a fraction: 1.5 is half-way through the second.

    `poly` is power^(1 − r), not (1 − r)^power, and `linear` ignores target_lr: both as published. target_lr
    is the same for every group, whatever its factor.
    """
    if epoch < warmup_epochs:
        if warmup_method == "constant":
            return base_lr * warmup_factor
        done = epoch / warmup_epochs
        return base_lr * (warmup_factor * (1 - done) + done)
    if lrscheduler == "step":
        return base_lr * gamma ** bisect_right(sorted(milestones), epoch)
    r = (epoch - warmup_epochs) / max(num_epoch - warmup_epochs, 1)  # a run may end within its warm-up
    if lrscheduler == "exp":
        return base_lr * power**r
    if lrscheduler == "linear":
        return base_lr * (1 - r)
    if lrscheduler == "poly":
        return target_lr + (base_lr - target_lr) * power ** (1 - r)
    if lrscheduler == "cosine":
        return target_lr + (base_lr - target_lr) * (1 + math.cos(math.pi * r)) / 2
    raise InputError(f"no schedule is called {lrscheduler}")


class EpochSchedule(LRScheduler):
    """Sets each group's rate to lr_at(epoch, its own rate, **settings); stepped once an epoch.

    per: "step" for a rate of each step's own, which `within_epoch` sets before it; it follows from where the
    step is, so that nothing of it is kept in a checkpoint.
    """

    def __init__(self, optimizer, num_epoch, per="epoch", **settings):
        self.num_epoch, self.per, self.settings = num_epoch, per, settings
        super().__init__(optimizer)

    def within_epoch(self, done):
        """With a rate per step, set that of the step before which this fraction of the epoch is done."""
        if self.per == "step":
            self._set(self.last_epoch + done)

    def _set(self, epoch):
        self._last_lr = self.rates(epoch)
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def rates(self, epoch):
        return [lr_at(epoch, lr, self.num_epoch, **self.settings) for lr in self.base_lrs]

    def get_lr(self):
        return self.rates(self.last_epoch)

    def state_dict(self):
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state):
        self.last_epoch = state["last_epoch"]
        self._set(self.last_epoch)


def build_lr_scheduler(args, optimizer):
    """lr_at's settings are the options of those names."""
    names = [name for name in signature(lr_at).parameters if name not in ("epoch", "base_lr", "num_epoch")]
    return EpochSchedule(
        optimizer, args.num_epoch, per=args.lr_per, **{name: vars(args)[name] for name in names}
    )


# ---- what a step moves ----

SAMPLED = 16  # one weight in so many


def sampled_weights(model):
    """A copy of every 16th weight of the parameters that are trained, to be compared after a step."""
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    return [p.flatten()[::SAMPLED].clone() for p in trained]


def frac_unmoved(model, before):
    """Fraction of sampled_weights that a step left exactly as they were; a tensor, read at log time.

    In fp16, as published, most updates are smaller than half the distance to a weight's neighbour.
    """
    same = [(x == y).sum() for x, y in zip(sampled_weights(model), before, strict=True)]
    return torch.stack(same).sum() / sum(x.numel() for x in before)
