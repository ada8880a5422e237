"""From options to a model on its device, in its precision."""

import os

import torch
from torch import nn

from model import objectives
from model.clip_model import Transformer
from model.clip_resnet import ModifiedResNet
from model.irra import GIVEN, IRRA, PARTS, Values
from model.pretrained import architecture, image_grid, load_start, new_clip
from model.weights import read_facts
from model.weights_config import OPENAIS
from utils.checkpoint import load_weights
from utils.errors import InputError, first_line
from utils.losses import LOSSES, names_of
from utils.settings import check, resolve


def build_model(args, num_classes, clip=None):
    """The IRRA that training starts with: pretrained CLIP, new heads; on its device and in its precision.

    clip: where a training goes on, a CLIP of its sizes; its weights and the heads' are yet to be put in.
    """
    settings = resolve(args)
    model = on_device(new_model(args, num_classes, clip), settings)
    if args.compile:
        check_compiler(settings.device)
        model.compile_encoders()
    return model


def check_compiler(device):
    """torch.compile makes code at the first step only, after all is loaded: whether it can is tried before.
    The size is another one each time, for which no earlier code is kept."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(1 + os.getpid(), device=device))
    except Exception as error:  # of its many parts, each with kinds of its own
        needs = "a C++ compiler (g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        raise InputError(
            f"--compile cannot be used here ({first_line(error)}): torch.compile "
            f"needs {needs} on {device.type}; install what is missing, or train without --compile"
        ) from error


def new_model(args, num_classes, clip=None):
    """build_model's IRRA, in fp32 and not on its device yet."""
    starts = clip is None
    if starts:
        clip, heads = load_start(
            args.pretrain_choice,
            args.img_size,
            args.stride_size,
            args.clip_architecture,
            args.activation,
            args.position_grid,
        )
    model = _with_heads(args, clip, names_of(args), num_classes, args.cmt_depth, args.learn_temperature)
    if args.keep_heads and starts:
        keep_heads(model, heads, args.pretrain_choice)
    if args.grad_checkpointing:
        for module in model.modules():
            if isinstance(module, Transformer):
                module.checkpointing = True
    return model


def keep_heads(model, heads, source):
    """Take the heads of a file over; a classifier never, whose rows are other persons."""
    own = model.state_dict()
    wanted = {name for name, row in PARTS.items() if row.loss and not row.of_persons}
    wanted = {key for key in own if key.split(".")[0] in wanted}
    missing = sorted(wanted - heads.keys())
    if not wanted or missing:
        what = f"{source} lacks {', '.join(missing[:3])}" if wanted else "no loss of this run has one to keep"
        raise InputError(f"--keep_heads: {what}; leave it out, and heads start anew")
    load_weights(model, {**own, **{key: heads[key] for key in wanted}}, source)


def facts_to_keep(model):
    """{"clip": what shapes do not tell of its encoders}, for a checkpoint; nothing where that is as in
    OpenAI's, so that it has the published parts."""
    return {} if model.base_model.facts == OPENAIS else {"clip": model.base_model.facts}


def build_trained_model(args, weights, source, facts=None):
    """The IRRA of a checkpoint's "model" part. Sizes are read off the weights: no pretrained file is needed.

    facts: the checkpoint's "clip" part. Raises InputError where the options' image size is not the weights'.
    """
    clip = clip_for(args, weights, source, read_facts(facts, source))
    begun = {key.split(".")[0] for key in weights}  # a head of which a key is missing is still one
    check_parts(begun, args, source)
    with_heads, there = {row.loss for row in PARTS.values()}, {PARTS[part].loss for part in begun}
    loss_names = [name for name in names_of(args) if name not in with_heads]
    loss_names += [name for name in LOSSES if name in there]
    of_persons = [len(value) for key, value in weights.items() if PARTS[key.split(".")[0]].of_persons]
    blocks = {key.split(".")[2] for key in weights if key.startswith("cross_modal_transformer.")}
    model = _with_heads(
        args,
        clip,
        loss_names,
        num_classes=max(of_persons, default=0),
        cmt_depth=len(blocks) or args.cmt_depth,
        learn_temperature="logit_scale_log" in begun,
    )
    load_weights(model, weights, source)
    return on_device(model, resolve(args))


def clip_for(args, weights, source, facts):
    """A CLIP of the sizes that a checkpoint's "model" part has, whose weights are yet to be put in.

    facts: of OPENAIS, those that differ. Raises InputError where the options' image size is not the weights'.
    """
    encoders = {
        key[len("base_model.") :]: value for key, value in weights.items() if key.startswith("base_model.")
    }
    sizes = {**architecture(encoders, source), **facts}
    rows, columns = image_grid(sizes, args.img_size, args.stride_size)
    if 1 + rows * columns != sizes["vision_positions"]:
        raise InputError(
            f"{source} has {sizes['vision_positions'] - 1} patches an image, options say {rows * columns} "
            f"(img_size {args.img_size[0]} {args.img_size[1]}, stride_size {args.stride_size})"
        )
    return new_clip(sizes, args.img_size, args.stride_size, source)


def clip_to_resume(args, state, source):
    """The CLIP of a training that goes on from a checkpoint: the weights that it began with may be gone."""
    facts = read_facts(state.get("clip"), source)
    if args.activation != "auto":
        facts["activation"] = args.activation
    return clip_for(args, state["model"], source, facts)


def check_parts(begun, args, source):
    """InputError where a checkpoint has parts that no IRRA has, or lacks one that its features need."""
    if foreign := sorted(begun - PARTS.keys()):
        raise InputError(f"{source} needs layers that this code lacks: {', '.join(foreign[:5])}")
    needed = [part for part, row in PARTS.items() if row.encodes and row.loss in names_of(args)]
    if lacking := [part for part in needed if part not in begun]:
        loss = PARTS[lacking[0]].loss
        asked = " ".join(f"--{switch}" for switch in LOSSES[loss].switches) or f"--loss_names {loss}"
        raise InputError(
            f"{source} holds no {', '.join(lacking)}, which the options ask for ({asked}): another run's?"
        )


def _with_heads(args, clip, loss_names, num_classes, cmt_depth, learn_temperature):
    resnet = isinstance(clip.visual, ModifiedResNet)  # whatever the weights' file is called
    check(args, resnet=resnet, context_length=len(clip.positional_embedding))
    for name in loss_names:
        objectives.check(name, GIVEN, vars(args))
    values = Values(
        temperature=args.temperature,
        learn_temperature=learn_temperature,
        weights={name: vars(args)[row.weight] for name, row in LOSSES.items() if row.weight},
        constants={name: vars(args)[name] for row in LOSSES.values() for name in row.options},
        select_ratio=args.select_ratio,
        tse_norm=args.tse_norm,
        text_length=args.text_length,
    )
    return IRRA(clip, loss_names, num_classes, cmt_depth, values)


def on_device(model, settings):
    """Set the precision and move to the device; in this order, so it is never there in fp32 for fp16."""
    return in_precision(model, settings.precision).to(settings.device)


def in_precision(model, precision):
    """The one place where the precision takes effect.

    fp16, as published: convolutions, linear layers, attention and projections in half precision, the new
    heads too; embeddings and normalisations in fp32; no loss scaling. bf16: fp32 weights under autocast.
    """
    if precision == "fp16":
        model.apply(_to_half)
    elif precision == "bf16":
        model.autocast_dtype = torch.bfloat16
    return model


def _to_half(module):
    if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.half()
    for name in ("text_projection", "proj"):  # CLIP's and VisionTransformer's
        if isinstance(parameter := getattr(module, name, None), nn.Parameter):
            parameter.data = parameter.data.half()
