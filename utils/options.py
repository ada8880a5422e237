"""Every option of train.py and test.py: defaults < --config_file < command line, one Namespace.

This file imports neither torch nor the rooms above it, so that `--help` and a mistyped option answer at
once. The names that an option may take stand here; a test holds them against the tables that use them.
"""

import argparse
import re
import sys
from pathlib import Path

from utils.config_file import check_options, read_yaml
from utils.data_sets import DATA_SETS, absolute, check_data_options, options_over
from utils.errors import InputError
from utils.losses import LOSSES
from utils.option_types import (
    Parser,
    count,
    count_or_0,
    momentum,
    nearest,
    not_negative,
    number,
    one_of,
    positive,
    share,
    whole,
)

DATASETS = tuple(DATA_SETS)
OPTIMIZERS = ("Adam", "SGD", "AdamW")
SCHEDULES = ("step", "exp", "poly", "cosine", "linear")
SAMPLERS = ("random", "identity")
PRECISIONS = ("fp16", "bf16", "fp32")
RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
CLIP_MODELS = (*RESNETS, "ViT-B/32", "ViT-B/16", "ViT-L/14")
RUN_FOLDER = re.compile(r"\d{8}_\d{6}_")  # <YYYYmmdd_HHMMSS>_<name>


# ---- types of their own ----


def loss_list(text):
    names = [name.strip() for name in str(text).split("+")]
    for name in names:
        if name not in LOSSES:
            raise argparse.ArgumentTypeError(
                f'"{name}" is not a loss ({", ".join(LOSSES)}; joined as sdm+mlm+id){nearest(name, LOSSES)}'
            )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f'"{text}" names a loss twice')
    return str(text)


def device_name(text):
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(text)):
        raise argparse.ArgumentTypeError(f'"{text}" is not auto, cpu, cuda or cuda:N')
    return str(text)


ARCHITECTURE = (
    "embed_dim image_resolution vision_layers vision_width vision_patch_size "
    "context_length vocab_size transformer_width transformer_layers"
).split()


def architecture_item(text):
    name, _, value = str(text).partition("=")
    if name not in ARCHITECTURE:
        raise argparse.ArgumentTypeError(
            f'"{text}" is not name=number, names being {", ".join(ARCHITECTURE)}{nearest(name, ARCHITECTURE)}'
        )
    return name, count(value)


# ---- the parsers ----

STOPPED = 3  # a signal came; everything is saved
EXIT_STATUS = (
    "Exit status: 0 done; 2 something to mend in the input, one sentence says what; 3 stopped by SIGTERM or "
    "SIGINT "
    "after the running batch, everything saved, --resume goes on; 130 interrupted at once (a second Ctrl-C)."
)


def train_parser():
    parser = Parser(
        prog="train.py",
        description="Train IRRA (text-to-image person retrieval, arXiv 2303.12501). The paper's recipe: "
        "--img_aug --batch_size 64 --MLM --loss_names sdm+mlm+id --num_epoch 60, the rest default.",
        epilog=EXIT_STATUS,
    )
    add = parser.add_argument_group("run").add_argument
    add(
        "--config_file",
        metavar="FILE",
        help="YAML file of options, e.g. configs/irra.yaml; the command line wins",
    )
    add("--name", default="baseline", type=str, help="name of the run: the end of its folder's name")
    add("--output_dir", default="logs", help="runs are kept in OUTPUT_DIR/DATASET/TIME_NAME")
    add("--log_period", default=100, type=count, help="batches between two log lines")
    add("--eval_period", default=1, type=count, help="epochs between two evaluations")
    add(
        "--val_dataset",
        default="test",
        type=one_of("test", "val"),
        help="split that picks best.pth: test as published, val is the clean choice",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the newest run of this name, or with --resume_ckpt_file",
    )
    add("--save_period", default=0, type=count_or_0, help="batches between saves of last.pth within an epoch")
    add("--keep", default=0, type=count_or_0, help="newest epochs of which a numbered checkpoint is kept")
    add("--resume_ckpt_file", default="", help="checkpoint or run folder that --resume goes on with")
    add(
        "--seed", default=1, type=count_or_0, help="order, augmentation, masks and new weights follow from it"
    )
    add(
        "--device",
        default="auto",
        type=device_name,
        help="auto (CUDA where there is one), cpu, cuda or cuda:N",
    )
    add(
        "--precision",
        default=None,
        type=one_of(*PRECISIONS),
        help="fp16: as published, the default on CUDA where the run can train in it; bf16: autocast over "
        "fp32 weights, another recipe; fp32: the default on a CPU, for AdamW and for random weights",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the encoders for training: a minute or more at the start, then faster steps",
    )
    add("--debug", action="store_true", help="print the traceback of an input error too")
    add(
        "--local_rank",
        "--local-rank",
        default=0,
        type=whole,
        help="set by launchers; kept for published scripts",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrain_choice",
        default="ViT-B/16",
        help=f"OpenAI CLIP by name ({', '.join(CLIP_MODELS)}), a file (TorchScript archive, state dict, "
        "safetensors), or random",
    )
    add(
        "--clip_architecture",
        nargs="+",
        type=architecture_item,
        default=None,
        metavar="NAME=N",
        help="with --pretrain_choice random: sizes that differ from ViT-B/16's",
    )
    add("--temperature", default=0.02, type=positive, help="of sdm and itc: the logit scale is 1/TEMPERATURE")
    add(
        "--img_size", nargs=2, default=[384, 128], type=count, metavar=("H", "W"), help="image size in pixels"
    )
    add("--stride_size", default=16, type=count, help="stride of the patch embedding in pixels")
    add(
        "--text_length",
        default=77,
        type=number(int, "a whole number of at least 2", lambda n: 2 <= n < 2**31),
        help="caption length in tokens; longer captions are cut",
    )
    add("--vocab_size", default=49408, type=count, help="size of CLIP's vocabulary; no other one exists")

    add = parser.add_argument_group("losses").add_argument
    add(
        "--loss_names",
        default="sdm+id+mlm",
        type=loss_list,
        help=f"losses joined by +, of {', '.join(LOSSES)}",
    )
    add("--mlm_loss_weight", default=1.0, type=not_negative, help="factor of the mlm loss")
    add("--id_loss_weight", default=1.0, type=not_negative, help="factor of the id loss")
    add("--MLM", action="store_true", help="mask training captions; comes with mlm among the losses")
    add(
        "--clean_captions",
        action="store_true",
        help="only mlm sees the masked caption; off as published: every loss sees it",
    )
    add("--cmt_depth", default=4, type=count, help="blocks of the cross-modal transformer")
    add("--masked_token_rate", default=0.8, type=share, help="share of chosen tokens that become <|mask|>")
    add(
        "--masked_token_unchanged_rate",
        default=0.1,
        type=share,
        help="share of chosen tokens left as they are",
    )

    add = parser.add_argument_group("optimiser").add_argument
    add(
        "--optimizer",
        default="Adam",
        type=one_of(*OPTIMIZERS),
        help="Adam (eps 1e-3), SGD or AdamW (eps 1e-8: not with fp16)",
    )
    add("--lr", default=1e-5, type=positive, help="base learning rate")
    add("--bias_lr_factor", default=2.0, type=not_negative, help="factor of LR for biases")
    add("--lr_factor", default=5.0, type=not_negative, help="factor of LR for the new layers")
    add("--momentum", default=0.9, type=momentum, help="of SGD")
    add("--weight_decay", default=4e-5, type=not_negative, help="weight decay")
    add("--weight_decay_bias", default=0.0, type=not_negative, help="weight decay of biases")
    add("--max_grad_norm", default=None, type=positive, help="scale larger gradients down to this norm")
    add("--alpha", default=0.9, type=momentum, help="Adam's first beta")
    add("--beta", default=0.999, type=momentum, help="Adam's second beta")

    add = parser.add_argument_group("schedule").add_argument
    add("--num_epoch", default=60, type=count, help="epochs")
    add("--lrscheduler", default="cosine", type=one_of(*SCHEDULES), help="after the warm-up, by epoch")
    add("--warmup_epochs", default=5, type=count_or_0, help="epochs of warm-up")
    add("--warmup_factor", default=0.1, type=not_negative, help="the warm-up starts at LR times this")
    add("--warmup_method", default="linear", type=one_of("linear", "constant"), help="shape of the warm-up")
    add("--milestones", nargs="+", default=[20, 50], type=count, help="step: epochs at which LR falls")
    add("--gamma", default=0.1, type=positive, help="step: factor at each milestone")
    add("--target_lr", default=0, type=not_negative, help="cosine, poly: where LR ends")
    add("--power", default=0.9, type=positive, help="exp, poly: the base of the power")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", default="CUHK-PEDES", type=one_of(*DATASETS), help="data set")
    add("--root_dir", default="./data", help="folder that holds the data sets' folders")
    add_by_path(add, default=None)
    add("--img_aug", action="store_true", help="random crop and erasing besides the flip, as in the recipe")
    add("--sampler", default="random", type=one_of(*SAMPLERS), help="order of the training samples")
    add("--num_instance", default=4, type=count, help="identity sampler: samples of each person in a batch")
    add("--batch_size", default=128, type=count, help="training batch; the recipe's is 64")
    add(
        "--micro_batch",
        default=None,
        type=count,
        help="samples in memory at a time: the whole batch's losses all the same, in slower steps",
    )
    add("--grad_checkpointing", action="store_true", help="less memory, slower: compute activations twice")
    add("--test_batch_size", default=512, type=count, help="batch of images or captions in evaluation")
    add(
        "--num_workers", default=8, type=count_or_0, help="loading processes; the batches do not depend on it"
    )
    add(
        "--image_cache",
        default="off",
        metavar="DIR|ram|off",
        help="decode each image once and keep its pixels (147 kB at 384x128) in a file in DIR, or in memory",
    )
    add(
        "--on_bad_image",
        default="stop",
        type=one_of("stop", "skip"),
        help="an image that cannot be read: stop and name it, or leave it out, count and list it",
    )
    add(
        "--test",
        dest="training",
        action="store_false",
        default=True,
        help="kept from the published code: see test.py",
    )
    return parser


def add_by_path(add, default=argparse.SUPPRESS):
    """A data set by path, of train.py and of tools that read a run's; kept absolute, for other folders."""
    add(
        "--annotations",
        default=default,
        type=absolute,
        metavar="FILE",
        help="instead of a data set's name: a JSON, JSON lines, CSV or TSV file (README.md, Data)",
    )
    add(
        "--images",
        default=default,
        type=absolute,
        metavar="DIR",
        help="where the image paths in FILE start; default: the folder of FILE",
    )


def test_parser():
    parser = Parser(
        prog="test.py",
        description="Evaluate a run: reads its configs.yaml and the best.pth beside it, prints the table and "
        "writes results.json. Published pairs of configs.yaml and best.pth work too.",
        epilog="Exit status: 0 done; 2 something to mend in the input (one sentence); 130 interrupted.",
    )
    add = parser.add_argument
    add("--config_file", required=True, metavar="FILE", help="configs.yaml of a run, or the run's folder")
    add("--checkpoint", default=None, metavar="FILE", help="instead of the best.pth beside the configs.yaml")
    add("--root_dir", default=argparse.SUPPRESS, help="folder that holds the data sets' folders")
    add(
        "--dataset_name",
        default=argparse.SUPPRESS,
        type=one_of(*DATASETS),
        help="test on another data set than the run's",
    )
    add_by_path(add)
    add("--split", default="test", type=one_of("test", "val", "train"), help="split to evaluate")
    add("--i2t", action="store_true", help="image-to-text too")
    add("--test_batch_size", default=argparse.SUPPRESS, type=count, help="batch of images or captions")
    add("--num_workers", default=argparse.SUPPRESS, type=count_or_0, help="loading processes")
    add(
        "--image_cache",
        default="off",
        metavar="DIR|ram|off",
        help="where decoded images are kept",
    )
    add(
        "--device",
        default="auto",
        type=device_name,
        help="auto (CUDA where there is one), cpu, cuda or cuda:N",
    )
    add(
        "--precision",
        default=None,
        type=one_of(*PRECISIONS),
        help="default: fp16 on CUDA, as published (fp32 for AdamW and for random weights), fp32 on a CPU",
    )
    add("--chance", action="store_true", help="add a row for random order")
    add("--picture", default=None, metavar="FILE", help="draw a few queries with their ten best images")
    add("--debug", action="store_true", help="print the traceback of an input error too")
    return parser


# ---- what the scripts call ----


def get_args(argv=None):
    """The options of train.py. A bad one ends the program with one sentence and status 2.

    `args.notes` holds sentences about options that were reconciled, to be logged once there is a log.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = train_parser()
    first = Parser(prog=parser.prog, add_help=False)
    first.add_argument("--config_file")
    for name in ("dataset_name", "annotations", "images"):
        first.add_argument(f"--{name}", default=argparse.SUPPRESS)
    try:
        typed = {} if {"-h", "--help"} & set(argv) else vars(first.parse_known_args(argv)[0])
        config_file = typed.pop("config_file", None)
        before = {} if config_file is None else _as_defaults(config_file, parser)
        parser.set_defaults(**before)
        args = parser.parse_args(argv)
        before = {name: before.get(name) for name in ("annotations", "images")}
        vars(args).update(options_over(before, {name: vars(args)[name] for name in typed}))
        if isinstance(args.clip_architecture, list):
            args.clip_architecture = dict(args.clip_architecture)
        reconcile(args)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return args


def _as_defaults(config_file, parser):
    options = check_options(read_yaml(config_file), parser, config_file)
    folder = Path(options.get("output_dir", ""))
    if RUN_FOLDER.match(folder.name):  # a run's configs.yaml names its own folder; a new run gets a new one
        options["output_dir"] = str(folder.parent.parent)
    return options


def losses(args):
    return str(args.loss_names).split("+")


def reconcile(args):
    """Bring options that depend on one another into agreement, or say why that cannot be."""
    args.notes = []
    args.distributed = False
    check_data_options(args)
    if "mlm" in losses(args) and not args.MLM:
        args.MLM = True
        args.notes.append("mlm is among the losses: training captions are masked, as with --MLM")
    elif args.MLM and "mlm" not in losses(args):
        args.notes.append(
            "--MLM without mlm: training captions are masked, but no loss predicts the masked words"
        )
    if "mlm" in losses(args) and args.pretrain_choice in RESNETS:
        raise InputError(
            f"mlm needs image tokens, and {args.pretrain_choice} gives one pooled vector: leave mlm out of "
            "--loss_names or choose a ViT"
        )
    if args.masked_token_rate + args.masked_token_unchanged_rate > 1 + 1e-9:
        raise InputError("--masked_token_rate and --masked_token_unchanged_rate add up to more than 1")
    if args.sampler == "identity" and args.batch_size % args.num_instance:
        raise InputError(
            f"--sampler identity needs a --batch_size ({args.batch_size}) that --num_instance "
            f"({args.num_instance}) divides"
        )
    if args.micro_batch and args.pretrain_choice in RESNETS:
        raise InputError(
            f"--micro_batch is exact for a ViT only: {args.pretrain_choice} normalises over the samples at "
            f"hand"
        )
    if args.on_bad_image == "skip" and args.image_cache != "off":
        raise InputError("--on_bad_image skip goes with --image_cache off: a cache is made of all images")
    if args.clip_architecture and args.pretrain_choice != "random":
        raise InputError(
            "--clip_architecture describes random weights: it goes with --pretrain_choice random"
        )
    if args.vocab_size != 49408:
        raise InputError(
            f"--vocab_size {args.vocab_size}: the tokeniser has 49408 entries and no other size exists"
        )


def get_test_args(argv=None):
    """The options of test.py over those of the run: a Namespace as get_args gives, plus test.py's own.

    Adds `run_dir`, the folder that holds the configs.yaml.
    """
    parser = test_parser()
    given = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    config_file = Path(given.config_file)
    if config_file.is_dir():
        config_file = config_file / "configs.yaml"
    args = read_run_options(config_file)
    vars(args).update(options_over(vars(args), vars(given)))
    check_data_options(args)
    args.training, args.run_dir = False, str(config_file.parent)
    return args


def read_run_options(config_file):
    """The options that a run's configs.yaml holds, ours or a published one, the others at their default."""
    parser = train_parser()
    options = check_options(read_yaml(config_file), parser, config_file)
    if "loss_names" not in options or "dataset_name" not in options:
        raise InputError(
            f"{config_file} is not the configs.yaml of a run: it names no loss_names and dataset_name"
        )
    args = parser.parse_args([])
    vars(args).update(options)
    reconcile(args)
    return args
