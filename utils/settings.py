"""What is, made once of what was typed, and the rules that ask it.

Options hold words; the device, the precision and the number of processes are known when PyTorch is there,
the architecture when the weights are read. PyTorch is loaded only where a device is picked, so that the
options ask the same rules at once.
"""

from dataclasses import dataclass
from typing import Any

from utils.errors import InputError
from utils.losses import LOSSES, named, names_of

RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
EPS = {  # of each optimiser that has one
    "Adam": 1e-3,  # part of the recipe: in fp16 most second moments round to 0, which leaves momentum SGD
    "AdamW": 1e-8,
}
SMALLEST_EPS = 1e-4  # in fp16 a smaller one rounds coarsely, under 3e-8 to 0: then a step divides by 0


@dataclass(frozen=True)
class Settings:
    """What the rooms below go by, instead of options."""

    device: Any  # a torch.device
    precision: str  # fp16, bf16 or fp32
    processes: int  # that share each batch


def resolve(args):
    """The Settings of these options, here. Raises InputError where a rule of `check` is broken."""
    from utils.device import pick_device
    from utils.dist import world_size

    device = pick_device(args.device)
    settings = Settings(device, pick_precision(args, device), world_size())
    check(args, settings.precision, settings.processes, device.type)
    return settings


def check(args, precision=None, processes=1, device_type=None, resnet=None, context_length=None):
    """Raises InputError where what was asked for cannot be had with what is. A fact that is not known yet is
    None; whether the images' encoder is a ResNet is known of OpenAI's names before a file is read."""
    if resnet is None:
        resnet = args.pretrain_choice in RESNETS
    check_losses(args, resnet)
    normalises = args.token_selection and args.tse_norm == "train" and args.training
    if normalises and (args.micro_batch or (processes > 1 and device_type == "cpu")):
        what = "--micro_batch" if args.micro_batch else "training on CPUs by several processes"
        raise InputError(
            f"{what} is not exact with --tse_norm train, which normalises over the samples at hand: choose "
            "--tse_norm eval"
        )
    if resnet and args.micro_batch and args.training:
        raise InputError(
            f"--micro_batch is exact for a ViT only: {args.pretrain_choice} is a ResNet and normalises over "
            "the samples at hand"
        )
    if context_length and args.text_length > context_length:
        raise InputError(
            f"--text_length {args.text_length}: the text encoder has {context_length} positions, so that is "
            "the most"
        )
    if precision == "fp16" and args.training and _eps(args) < SMALLEST_EPS:
        raise InputError(
            f"--precision fp16 with --optimizer {args.optimizer}: {why_not_fp16(args)}; use --precision bf16 "
            "or fp32, or Adam"
        )
    if args.training and args.batch_size % processes:
        raise InputError(
            f"--batch_size {args.batch_size} is for all {processes} processes together, and they cannot "
            f"share it evenly: choose a multiple of {processes}"
        )


NEEDS = {  # options that a loss has to heed: what they do, and whether a row of LOSSES heeds that
    "token_selection": ("gives a second embedding to a loss of features", lambda row: row.of == "features"),
    "second_caption": ("gives a second caption to a loss of features", lambda row: row.of == "features"),
    "second_view": ("gives a second view of each image to a loss that takes one", lambda row: row.views),
    "division": ("weighs samples for a loss that heeds that", lambda row: row.each),
    "learn_temperature": ("learns the temperature of a loss that has one", lambda row: row.scaled),
}


def check_losses(args, resnet):
    """Raises InputError where losses, or what they are to heed, do not go together or not with a ResNet."""
    losses = names_of(args)
    if resnet:
        check_tokens(args, losses)
    if all(LOSSES[name].of == "strong" for name in losses):
        raise InputError(
            f"--loss_names {args.loss_names} compares images alone and trains no text: add a loss of both, "
            "such as nitc"
        )
    for option, (purpose, heeds) in NEEDS.items():
        if vars(args)[option] and not any(heeds(LOSSES[name]) for name in losses):
            raise InputError(
                f"--{option} {purpose}, and --loss_names {args.loss_names} has none: add one of "
                f"{', '.join(name for name in named() if heeds(LOSSES[name]))}"
            )
    if args.learn_temperature and args.temperature < 0.01:
        raise InputError(
            f"--temperature {args.temperature:g} with --learn_temperature: what is learnt stays at 0.01 or "
            "more, as in CLIP; start from 0.01"
        )
    changing = [name for name in ("text_aug", "text_drop", "back_translation") if vars(args)[name]]
    if args.mask_by_similarity and changing:
        raise InputError(
            f"--mask_by_similarity keeps a number for each word of a caption from epoch to epoch, and "
            f"--{changing[0]} changes the words: leave one of them out"
        )


def check_tokens(args, losses):
    """Raises InputError where image tokens are needed, which a ResNet does not give."""
    needing = {name: LOSSES[name].switches for name in losses if LOSSES[name].tokens}
    needing = [f"--{switches[0]}" if switches else name for name, switches in needing.items()]
    needing += ["--mask_by_similarity"] * args.mask_by_similarity
    if needing:
        where = "" if needing[0].startswith("--") else " of --loss_names"
        raise InputError(
            f"{needing[0]} needs image tokens, and {args.pretrain_choice} gives one pooled vector: leave "
            f"{needing[0]} out{where} or choose a ViT"
        )


# ---- precision ----


def pick_precision(args, device):
    """fp16, bf16 or fp32: what --precision names, or by itself fp32 on a CPU and on an accelerator fp16, as
    published, unless the run cannot train in it. The same rule for training and for testing the run."""
    return args.precision or ("fp32" if device.type == "cpu" or why_not_fp16(args) else "fp16")


def _eps(args):
    return EPS.get(args.optimizer, 1.0)


def why_not_fp16(args):
    """What keeps this run from training in fp16 as published, without loss scaling; None if nothing does."""
    if _eps(args) < SMALLEST_EPS:
        return (
            f"{args.optimizer}'s eps of {_eps(args):g} rounds to 0 in fp16, and weights to NaN in the second "
            "step"
        )
    if args.pretrain_choice == "random":
        return "fp16 without loss scaling is for fine-tuning, and these weights start at random"
    return None


def precision_line(args, device):
    """What a training logs about its precision, with the reason where it is not the published one."""
    precision, reason = pick_precision(args, device), why_not_fp16(args)
    if precision == "fp16" and reason:
        return f"Precision: fp16, as asked for; but {reason}: --precision bf16 or fp32 is safer"
    if args.precision or device.type == "cpu" or not reason:
        return f"Precision: {precision}"
    return f"Precision: {precision}, since {reason}; --precision bf16 is quicker where the GPU has it"
