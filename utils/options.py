"""Every option of every program, a row each: defaults < --config_file < command line, one Namespace.

Neither torch nor the rooms above are imported here, so that `--help` and a mistyped option answer at once.
The names that an option may take stand here; a test holds them against the tables that use them.
"""

import math
import re
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from pathlib import Path

from utils.config_file import read_options, run_file
from utils.data_sets import DATA_SETS, DEFAULT, absolute, check_data_options, name_of, options_over
from utils.errors import InputError
from utils.losses import named, names_of
from utils.option_types import Parser, nearest, number, number_list, one_of, path
from utils.run_folders import output_dir_in
from utils.settings import RESNETS, check

DATASETS = tuple(DATA_SETS)
OPTIMIZERS = ("Adam", "SGD", "AdamW")
SCHEDULES = ("step", "exp", "poly", "cosine", "linear")
ACTIVATIONS = ("auto", "quick_gelu", "gelu")
PRECISIONS = ("fp16", "bf16", "fp32")
INDEX_TYPES = ("flat", "ivf", "hnsw")
WORDS_BY = ("relevance", "attention")
FORMATS = ("safetensors", "onnx", "open_clip", "transformers")
CLIP_MODELS = (*RESNETS, "ViT-B/32", "ViT-B/16", "ViT-L/14")
ARCHITECTURE = (
    "embed_dim image_resolution vision_layers vision_width vision_patch_size "
    "context_length vocab_size transformer_width transformer_layers"
).split()


# ---- what an option may be ----

from_1 = number(int, "a whole number of at least 1", lambda n: 1 <= n < 2**63)
from_0 = number(int, "a whole number of at least 0", lambda n: 0 <= n < 2**64)
integer = number(int, "a whole number", lambda n: True)
from_2 = number(int, "a whole number of at least 2", lambda n: 2 <= n < 2**31)
port = number(int, "a port from 0 to 65535 (0: a free one)", lambda n: 0 <= n <= 65535)
positive = number(float, "a number above 0", lambda x: math.isfinite(x) and x > 0)
not_negative = number(float, "a number of at least 0", lambda x: math.isfinite(x) and x >= 0)
fraction = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
fraction_above_0 = number(float, "a number above 0, at most 1", lambda x: 0 < x <= 1)
fraction_below_1 = number(float, "a number from 0 up to, not including, 1", lambda x: 0 <= x < 1)
split = one_of("test", "val", "train")


def loss_list(text):
    names = [name.strip() for name in str(text).split("+")]
    for name in names:
        if name not in named():
            known = f"{', '.join(named())}; joined as sdm+mlm+id"
            raise ArgumentTypeError(f'"{name}" is not a loss ({known}){nearest(name, named())}')
    if len(set(names)) < len(names):
        raise ArgumentTypeError(f'"{text}" names a loss twice')
    return str(text)


def device_name(text):
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(text)):
        raise ArgumentTypeError(f'"{text}" is not auto, cpu, cuda or cuda:N')
    return str(text)


def clip_size(text):
    name, _, value = str(text).partition("=")
    if name not in ARCHITECTURE:
        wanted = f"name=number, names being {', '.join(ARCHITECTURE)}"
        raise ArgumentTypeError(f'"{text}" is not {wanted}{nearest(name, ARCHITECTURE)}')
    return name, from_1(value)


clip_size.word, absolute.word = "K=N", "PATH"

# ---- the options ----

PATHS = ("FILE", "FOLDER", "RUN", "CLIP", "DIR|ram|off")  # words that stand for, or may be, a path
REQUIRED = object()  # no default: must be given
OF_RUN = SUPPRESS  # no default: what the run's configs.yaml says holds
TOOLS = "test search visualize demo"  # the programs that read a run and a data set
DATA, EVERY = f"train {TOOLS}", f"train {TOOLS} export"

# A row: name, {programs that have it: default}, type, help, and what else argparse is to know. A type is a
# function that checks, bool for a switch, or for any text the WORD that --help shows in its place.
# fmt: off
OPTIONS = {
"run": [
    ("--config_file", {"train visualize": None, "test search demo": REQUIRED}, "FILE",
        "YAML file of options; a run's, or its folder"),
    ("config_file", {"export": None}, "RUN", "the run's folder or configs.yaml"),
    ("--checkpoint", {f"{TOOLS} export": None}, "FILE", "instead of the best.pth in the run's folder"),
    ("--name", {"train": "baseline"}, "NAME", "end of the name of the run's folder"),
    ("--output_dir", {"train": "logs"}, "FOLDER", "a run is kept in OUTPUT_DIR/DATASET/TIME_NAME"),
    ("--log_period", {"train": 100}, from_1, "batches between two log lines"),
    ("--eval_period", {"train": 1}, from_1, "epochs between two evaluations"),
    ("--val_dataset", {"train": "test"}, one_of("test", "val"), "picks best.pth; val is the clean choice"),
    ("--resume", {"train": False}, bool, "go on with the newest run of this name"),
    ("--resume_ckpt_file", {"train": ""}, "FILE", "what --resume goes on with instead: checkpoint or folder"),
    ("--save_period", {"train": 0}, from_0, "batches between saves of last.pth within an epoch"),
    ("--keep", {"train": 0}, from_0, "newest epochs whose numbered checkpoints are kept"),
    ("--seed", {"train": 1, "visualize": OF_RUN}, from_0, "of order, augmentation, masks, new weights"),
    ("--local_rank --local-rank", {"train": 0}, integer, "set by launchers; kept for published scripts"),
    ("--test", {"train": True}, bool, "kept from the published code: see test.py", {"dest": "training"})],
"data": [
    ("--dataset_name", {"train": DEFAULT, TOOLS: OF_RUN}, one_of(*DATASETS), "data set"),
    ("--root_dir", {"train": "./data", TOOLS: OF_RUN}, "FOLDER", "folder that holds the data sets' folders"),
    ("--annotations", {"train": None, TOOLS: OF_RUN}, absolute,
        "instead of a name: JSON, JSON lines, CSV or TSV file"),
    ("--images", {"train": None, TOOLS: OF_RUN}, absolute, "where its image paths start; or beside it"),
    ("--split", {"test visualize": "test", "search demo": None}, split, "split to look at or to search"),
    ("--noisy_rate", {"train": 0.0}, fraction, "share of training captions to exchange"),
    ("--noisy_file", {"train": None}, "FILE", ".npy file: sample i gets the caption of sample FILE[i]"),
    ("--plain_captions", {"train": False}, bool, 'sentences are read without .!"()*#:;~ (TBPS-CLIP)'),
    ("--text_aug", {"train": False}, bool, "mask, exchange and drop words (RDE), whatever the losses"),
    ("--text_drop", {"train": 0.0}, fraction, "share of training captions' words to leave out"),
    ("--back_translation", {"train": 0.0}, fraction, "share of captions exchanged for their captions_bt"),
    ("--second_caption", {"train": False}, bool, "a second caption, of diversity_captions (RDA)"),
    ("--two_of_six", {"train": False}, bool, "two of six augmentations of images instead (TBPS-CLIP)"),
    ("--second_view", {"train": False}, bool, "nitc: the mean over two views of each image (MVS)"),
    ("--img_aug", {"train": False}, bool, "random crop and erasing besides the flip, as in the recipe"),
    ("--sampler", {"train": "random"}, one_of("random", "identity"), "order of the training samples"),
    ("--num_instance", {"train": 4}, from_1, "identity sampler: samples of each person in a batch"),
    ("--batch_size", {"train": 128}, from_1, "samples in a training batch; the recipe's is 64"),
    ("--on_bad_image", {"train": "stop"}, one_of("stop", "skip"), "at an unreadable image; skip lists it")],
"losses": [
    ("--loss_names", {"train": "sdm+id+mlm"}, loss_list, "losses joined by +; see above"),
    ("--mlm_loss_weight", {"train": 1.0}, not_negative, "factor of the mlm loss"),
    ("--id_loss_weight", {"train": 1.0}, not_negative, "factor of the id loss"),
    ("--citc_loss_weight", {"train": 0.1}, not_negative, "factor of the citc loss"),
    ("--simclr_loss_weight", {"train": 0.4}, not_negative, "factor of the simclr loss"),
    ("--soft_label", {"train": 0.5}, fraction, "nitc: share of its labels that are the model's own"),
    ("--tau", {"train": 0.015}, positive, "tal, trl: temperature"),
    ("--margin", {"train": 0.1}, not_negative, "tal, trl: by how much a match is to lie above the rest"),
    ("--token_selection", {"train": False}, bool, "a second embedding, of the tokens attended to most (RDE)"),
    ("--select_ratio", {"train": 0.3}, fraction_above_0, "share of the tokens that it selects"),
    ("--tse_norm", {"train": "eval"}, one_of("eval", "train"), "its normalisation, as in RDE's paper"),
    ("--division", {"train": False}, bool, "leave out pairs that look wrong, each epoch anew (CCD)"),
    ("--MLM", {"train": False}, bool, "mask training captions; comes with mlm among the losses"),
    ("--mask_by_similarity", {"train": False}, bool, "MLM masks what the image shows least (NAM)"),
    ("--clean_captions", {"train": False}, bool, "only mlm sees masked captions; published: every loss"),
    ("--cmt_depth", {"train": 4}, from_1, "blocks of the cross-modal transformer"),
    ("--masked_token_rate", {"train": 0.8}, fraction, "share of chosen tokens that become <|mask|>"),
    ("--masked_token_unchanged_rate", {"train": 0.1}, fraction, "share of chosen tokens left as they are")],
"model": [
    ("--pretrain_choice", {"train": "ViT-B/16"}, "CLIP",
        "OpenAI's name, a path, hf-hub:ORG/NAME or random"),
    ("--activation", {"train": "auto"}, one_of(*ACTIVATIONS), "auto: as its files say"),
    ("--position_grid", {"train": None}, from_1,
        "rows, columns of the file's image positions", {"nargs": 2}),
    ("--keep_heads", {"train": False}, bool, "the file's heads too, but no classifier"),
    ("--clip_architecture", {"train": None}, clip_size,
        "sizes of random weights that differ from ViT-B/16's", {"nargs": "+"}),
    ("--temperature", {"train": 0.02}, positive, "of sdm, itc, …: the logit scale is 1/TEMPERATURE"),
    ("--learn_temperature", {"train": False}, bool, "begin with that one and learn it, down to 0.01"),
    ("--img_size", {"train": [384, 128]}, from_1, "height and width of an image in pixels", {"nargs": 2}),
    ("--stride_size", {"train": 16}, from_1, "stride of the patch embedding in pixels"),
    ("--text_length", {"train": 77}, from_2, "caption length in tokens; longer captions are cut"),
    ("--vocab_size", {"train": 49408}, from_1, "size of CLIP's vocabulary; no other one exists")],
"optimiser": [
    ("--optimizer", {"train": "Adam"}, one_of(*OPTIMIZERS), "AdamW: eps 1e-8, so not in fp16"),
    ("--lr", {"train": 1e-5}, positive, "base learning rate"),
    ("--bias_lr_factor", {"train": 2.0}, not_negative, "factor of LR for biases"),
    ("--lr_factor", {"train": 5.0}, not_negative, "factor of LR for the heads of mlm and id"),
    ("--momentum", {"train": 0.9}, fraction_below_1, "of SGD"),
    ("--weight_decay", {"train": 4e-5}, not_negative, "weight decay"),
    ("--weight_decay_bias", {"train": 0.0}, not_negative, "weight decay of biases"),
    ("--max_grad_norm", {"train": None}, positive, "scale larger gradients down to this norm"),
    ("--ema", {"train": 0.0}, fraction_below_1, "decay of averaged weights beside the others; 0: none"),
    ("--alpha", {"train": 0.9}, fraction_below_1, "Adam's first beta"),
    ("--beta", {"train": 0.999}, fraction_below_1, "Adam's second beta")],
"schedule": [
    ("--num_epoch", {"train": 60}, from_1, "epochs"),
    ("--lr_per", {"train": "epoch"}, one_of("epoch", "step"), "how often LR changes; published: epoch"),
    ("--lrscheduler", {"train": "cosine"}, one_of(*SCHEDULES), "after the warm-up"),
    ("--warmup_epochs", {"train": 5}, from_0, "epochs of warm-up"),
    ("--warmup_factor", {"train": 0.1}, not_negative, "the warm-up starts at LR times this"),
    ("--warmup_method", {"train": "linear"}, one_of("linear", "constant"), "shape of the warm-up"),
    ("--milestones", {"train": [20, 50]}, from_1, "step: epochs at which LR falls", {"nargs": "+"}),
    ("--gamma", {"train": 0.1}, positive, "step: factor at each milestone"),
    ("--target_lr", {"train": 0}, not_negative, "cosine, poly: where LR ends"),
    ("--power", {"train": 0.9}, positive, "exp, poly: the base of the power")],
"gallery": [
    ("--gallery", {"search demo": None}, "FOLDER", "folder of pictures, sub-folders included; or --split"),
    ("--index", {"search demo": None}, "FOLDER", "where features are kept; default: the run's search/"),
    ("--index_type", {"search demo": None}, one_of(*INDEX_TYPES), "flat is exact and the first choice"),
    ("--rebuild", {"search demo": False}, bool, "encode every picture anew, whatever the index holds")],
"sentences and pictures": [
    ("--query", {"search": []}, "TEXT", "a sentence: who is looked for; several can be given"),
    ("--query_file", {"search": None}, "FILE", "a text file, one sentence a line"),
    ("--words", {"visualize": None}, "SENTENCE", "where its words look in --image"),
    ("--words_by", {"visualize": WORDS_BY[0]}, one_of(*WORDS_BY), "attention needs a model with mlm"),
    ("--image", {"search": [], "visualize": None}, "FILE", "picture: find similar persons, or see --words"),
    ("--example", {"demo": []}, "TEXT", "a sentence offered for a click; several can be given")],
"queries of a split, one picture each": [
    ("--queries", {"visualize": None}, number_list, "by number, from 0, e.g. 0,17 or 0-5"),
    ("--worst", {"visualize": 0}, from_0, "whose first right image comes last"),
    ("--best", {"visualize": 0}, from_0, "found with the largest margin"),
    ("--random", {"visualize": 0}, from_0, "drawn by --seed")],
"result": [
    ("--i2t", {"test": False}, bool, "image-to-text too"),
    ("--chance", {"test": False}, bool, "add a row for random order"),
    ("--all_embeddings", {"test": False}, bool, "a row for each of a run's embeddings too"),
    ("--picture", {"test": None}, "FILE", "draw a few queries with their ten best images"),
    ("--cmc", {"visualize": False}, bool, "CMC curve on the split, text to image and image to text"),
    ("--curves", {"visualize": []}, "RUN", "training curves of one or several runs", {"action": "store"}),
    ("--top_k", {"search": 10, "demo": 12}, from_1, "pictures shown for a sentence"),
    ("--duplicates", {"search demo": False}, bool, "list all copies of a picture, not one and their number"),
    ("--save", {"search": None}, "FILE", "draw the result, e.g. result.png"),
    ("--json", {"search": False}, bool, "print JSON instead of tables"),
    ("--format", {"export": REQUIRED}, one_of(*FORMATS), "what is written"),
    ("--output", {"test visualize export": None}, "FOLDER", "default: in the run's folder")],
"page": [
    ("--host", {"demo": "127.0.0.1"}, "ADDRESS", "to listen on; 0.0.0.0 lets every machine in"),
    ("--port", {"demo": 7860}, port, "0 takes a free one"),
    ("--max_upload", {"demo": 20}, from_1, "MB of the largest picture that can be uploaded"),
    ("--max_pictures", {"demo": 500}, from_1, "most pictures in an uploaded folder")],
"device, speed and memory": [
    ("--device", {DATA: "auto"}, device_name, "auto (CUDA where there is one), cpu, cuda or cuda:N"),
    ("--precision", {DATA: None}, one_of(*PRECISIONS), "fp16 on CUDA, else and for AdamW fp32"),
    ("--compile", {"train": False}, bool, "torch.compile the encoders: a slow start, then faster steps"),
    ("--micro_batch", {"train": None}, from_1, "samples in memory at a time: the same losses, slower"),
    ("--grad_checkpointing", {"train": False}, bool, "compute activations twice: less memory, slower"),
    ("--test_batch_size", {"train": 512, "test visualize": OF_RUN}, from_1, "images or captions at once"),
    ("--encode_batch", {"search demo": 64}, from_1, "pictures encoded at once"),
    ("--num_workers", {"train": 8, "test visualize": OF_RUN, "search demo": 4}, from_0,
        "loading processes or threads; batches do not depend on it"),
    ("--image_cache", {"train test": "off"}, "DIR|ram|off", "decode once and keep the pixels there")],
"help": [
    ("--debug", {EVERY: False}, bool, "print the traceback of an input error too"),
    ("-h --help", {EVERY: False}, bool, "this list", {"action": "help"})],
}
# fmt: on

# ---- the programs ----

STOPPED = 3  # a signal came; everything is saved
EXIT_STATUS = "Exit status: 0 done; 2 something to mend in the input, one sentence says what; 130 interrupted"
SPECIAL = "<|mask|> and <|endoftext|>, typed in a sentence, are the special tokens, not text."

# fmt: off
PROGRAMS = {  # a command line that will do, and what the program does
    "train": ("--config_file configs/irra.yaml",
        "Train IRRA (text-to-image person retrieval, arXiv 2303.12501). The paper's recipe: --img_aug "
        "--batch_size 64 --MLM --loss_names sdm+mlm+id --num_epoch 60. Exit status 3: stopped by SIGTERM, "
        f"SIGINT or SIGHUP after the running batch, everything saved; --resume goes on. Losses: "
        f"{', '.join(named())}."),
    "test": ("--config_file RUN",
        "Evaluate a run: reads its configs.yaml and the best.pth beside it, prints the table and writes "
        "results.json. Published pairs of configs.yaml and best.pth work too."),
    "search": ("--config_file RUN --gallery FOLDER --query TEXT",
        "Find persons in a folder of pictures by a sentence. The folder is encoded once; next time only new "
        f"and changed pictures are. Without a query it just does that. {SPECIAL}"),
    "visualize": ("--config_file RUN --worst 20",
        "Pictures of a run: what queries of a split find, its CMC curve, training curves, and where the "
        f"words of a sentence look in an image. {SPECIAL}"),
    "demo": ("--config_file RUN --gallery FOLDER",
        "A page in the browser: a sentence in, the persons out, and where its words look. It listens on this "
        f"machine only, and nothing leaves it. {SPECIAL}"),
    "export": ("RUN --format safetensors",
        "The two encoders of a run for other programs, with tokeniser settings and a model card; checked "
        "against the run before it is said to be done."),
}
# fmt: on


def parser_of(program):
    """The parser of train, test, search, visualize, demo or export: its rows of the table."""
    call, does = PROGRAMS[program]
    usage = f"{program}.py {call} [option ...]"
    parser = Parser(prog=f"{program}.py", usage=usage, description=does, epilog=EXIT_STATUS)
    for heading, rows in OPTIONS.items():
        group = parser.add_argument_group(heading)
        for name, programs, kind, text, *more in rows:
            defaults = {one: default for names, default in programs.items() for one in names.split()}
            if program in defaults:
                known = _for_argparse(defaults[program], kind, text) | dict(*more)
                group.add_argument(*name.split(), **known)
    return parser


def _for_argparse(default, kind, text):
    """A row as arguments of add_argument; its help ends with the names to choose from and the default."""
    if kind is bool:
        return {"action": "store_false" if default else "store_true", "help": text}
    is_text = isinstance(kind, str)
    type = (path if kind in PATHS else None) if is_text else kind
    known = {"type": type, "metavar": kind if is_text else getattr(kind, "word", "NAME")}
    if hasattr(kind, "names"):
        text += f" ({', '.join(kind.names)})"
    if default is REQUIRED:
        return known | {"required": True, "help": text}
    if default == []:  # several after one flag, and the flag several times
        known |= {"nargs": "+", "action": "extend"}
    shown = str(default)
    if isinstance(default, list):  # a list of its own for each parser: who gets it may change it
        default, shown = list(default), " ".join(map(str, default))
    if shown not in ("None", ""):
        text += f" [{shown}]".replace(OF_RUN, "the run's")
    return known | {"default": default, "help": text}


# ---- what the scripts call ----


def get_args(argv=None):
    """The options of train.py. A bad one ends the program with one sentence and status 2."""
    parser = parser_of("train")
    options, typed = vars(parser.parse_args([])), parser.typed(argv)
    try:
        if typed.get("config_file") is not None:
            of_file = read_options(typed["config_file"], parser)
            if "output_dir" in of_file:
                of_file["output_dir"] = output_dir_in(of_file["output_dir"])
            options.update(of_file)
        if "pretrain_choice" in typed:
            options["activation"] = parser.get_default("activation")  # a config's is of its own weights
        args = Namespace(**options_over(options, typed))
        if isinstance(args.clip_architecture, list):
            args.clip_architecture = dict(args.clip_architecture)
        reconcile(args)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return args


def reconcile(args):
    """Bring options that depend on one another into agreement, or say why that cannot be."""
    check_data_options(args)
    check(args)
    args.MLM = args.MLM or args.mask_by_similarity or "mlm" in names_of(args)
    if args.masked_token_rate + args.masked_token_unchanged_rate > 1 + 1e-9:
        raise InputError("--masked_token_rate and --masked_token_unchanged_rate add up to more than 1")
    if args.two_of_six and args.img_aug:
        raise InputError("--two_of_six and --img_aug are two ways to augment an image: choose one")
    if args.sampler == "identity" and args.batch_size % args.num_instance:
        raise InputError(
            f"--sampler identity needs a --batch_size ({args.batch_size}) that --num_instance "
            f"({args.num_instance}) divides"
        )
    if args.on_bad_image == "skip" and args.image_cache != "off":
        raise InputError("--on_bad_image skip goes with --image_cache off: a cache is made of all images")
    if args.clip_architecture and args.pretrain_choice != "random":
        raise InputError(
            "--clip_architecture describes random weights: it goes with --pretrain_choice random"
        )
    if args.pretrain_choice == "random" and (args.keep_heads or args.position_grid):
        raise InputError("--keep_heads and --position_grid are about a file's weights, not random ones")
    if args.vocab_size != 49408:
        raise InputError(
            f"--vocab_size {args.vocab_size}: the tokeniser has 49408 entries and no other size exists"
        )


def get_test_args(argv=None):
    """The options of test.py over those of the run that it evaluates; see tool_args."""
    return tool_args(parser_of("test"), argv)


def tool_args(parser, argv=None):
    """The options of a tool over those of the run that it names: a Namespace, with `run_dir` added.

    run_dir is the folder of the run's file, whatever that is called. Without --config_file, where a tool
    allows that, it is None and the tool's options are all.
    """
    given = parser.parse_args(argv)
    if given.config_file is None:
        given.run_dir = None
        return given
    config_file = run_file(given.config_file)
    args = read_run_options(config_file, vars(given))
    vars(args).update(options_over(vars(args), vars(given)), training=False, run_dir=str(config_file.parent))
    check_data_options(args)
    if not args.checkpoint and (numbered := numbered_best(args)):
        args.checkpoint = str(numbered)
    return args


def numbered_best(args):
    """Of a run that has no best.pth but the best for each data set (best0.pth to best2.pth, as programs of
    this family leave them), the one for the data set asked for, or the only one; else None."""
    run = Path(args.run_dir)
    if (run / "best.pth").exists():
        return None
    named = not args.annotations and args.dataset_name in DATASETS
    own = DATASETS.index(args.dataset_name) if named else None
    there = sorted(run.glob("best[0-9].pth"))
    return next((path for path in there if path.name == f"best{own}.pth" or len(there) == 1), None)


AT_TEST = (  # options of train.py alone that testing depends on
    "img_size stride_size text_length vocab_size temperature cmt_depth activation pretrain_choice "
    "select_ratio tse_norm plain_captions"
).split()


def read_run_file(config_file, given=()):
    """({option: value}, {name: value} of what no option is, or a word for another program's training) of a
    run's configs.yaml, ours or a published one. given: names of options that others replace."""
    parser, foreign = parser_of("train"), {}
    of_tools = {action.dest for action in parser_of("test").options().values()}

    def forgive(key, value):
        foreign[key] = value
        return key not in parser.options() or key in given or key not in (*AT_TEST, *of_tools)

    return read_options(config_file, parser, forgive), foreign


def read_run_options(config_file, given=()):
    """The options that a run's configs.yaml holds, the others at their default. given: see read_run_file."""
    options, foreign = read_run_file(config_file, given)
    if "loss_names" in foreign:
        options["loss_names"] = "sdm"  # which loss it was, nothing here depends on
    if "dataset_name" in foreign:
        options["dataset_name"] = str(foreign["dataset_name"])
    if not {"loss_names", "dataset_name"} <= options.keys():
        raise InputError(
            f"{config_file} is not the configs.yaml of a run: it names no loss_names and dataset_name"
        )
    args = parser_of("train").parse_args([])
    vars(args).update(options)
    reconcile(args)
    return args


def other_set(args):
    """'_NAME' of the data set that a tool looks at, where its run was trained on another one; else ''."""
    trained = read_run_options(args.config_file, given=("dataset_name",))
    own = args.annotations == trained.annotations and name_of(args) == name_of(trained)
    return "" if own else f"_{name_of(args)}"


def passed_over(config_file, given):
    """A sentence about what a run's configs.yaml says that testing does not need, or None."""
    _, foreign = read_run_file(config_file, given)
    shown = ", ".join(f"{key}: {value}" for key, value in foreign.items())
    return f"{run_file(config_file)}: passed over, since testing does not need it: {shown}" if shown else None
