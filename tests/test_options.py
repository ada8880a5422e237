"""Flags, config files and what is said about wrong ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from datasets import annotations
from model import clip_model, fetch, objectives, pretrained
from solver import build as solver
from tests.conftest import PATIENCE
from utils import options
from utils.errors import InputError
from utils.losses import LOSSES
from utils.options import get_args, get_test_args

ROOT = Path(__file__).parent.parent
PUBLISHED_CONFIG = Path(__file__).parent / "reference" / "configs.yaml"

FLAGS = [  # every flag of the published code: its default, another value as typed, and what that is read as
    ("local_rank", 0, "3", 3),
    ("name", "baseline", "irra", "irra"),
    ("output_dir", "logs", "runs", "runs"),
    ("log_period", 100, "10", 10),
    ("eval_period", 1, "5", 5),
    ("val_dataset", "test", "val", "val"),
    ("resume_ckpt_file", "", "last.pth", "last.pth"),
    ("pretrain_choice", "ViT-B/16", "clip.pt", "clip.pt"),
    ("temperature", 0.02, "0.07", 0.07),
    ("cmt_depth", 4, "2", 2),
    ("masked_token_rate", 0.8, "0.7", 0.7),
    ("masked_token_unchanged_rate", 0.1, "0.05", 0.05),
    ("lr_factor", 5.0, "2", 2.0),
    ("loss_names", "sdm+id+mlm", "mlm+itc", "mlm+itc"),
    ("mlm_loss_weight", 1.0, "0.5", 0.5),
    ("id_loss_weight", 1.0, "0", 0.0),
    ("img_size", [384, 128], "256 64", [256, 64]),
    ("stride_size", 16, "12", 12),
    ("text_length", 77, "64", 64),
    ("vocab_size", 49408, "49408", 49408),
    ("optimizer", "Adam", "SGD", "SGD"),
    ("lr", 1e-5, "3e-4", 3e-4),
    ("bias_lr_factor", 2.0, "1", 1.0),
    ("momentum", 0.9, "0.8", 0.8),
    ("weight_decay", 4e-5, "0", 0.0),
    ("weight_decay_bias", 0.0, "1e-3", 1e-3),
    ("alpha", 0.9, "0.85", 0.85),
    ("beta", 0.999, "0.95", 0.95),
    ("num_epoch", 60, "7", 7),
    ("milestones", [20, 50], "5 10 15", [5, 10, 15]),
    ("gamma", 0.1, "0.5", 0.5),
    ("warmup_factor", 0.1, "0.2", 0.2),
    ("warmup_epochs", 5, "0", 0),
    ("warmup_method", "linear", "constant", "constant"),
    ("lrscheduler", "cosine", "poly", "poly"),
    ("target_lr", 0, "1e-6", 1e-6),
    ("power", 0.9, "0.5", 0.5),
    ("dataset_name", "CUHK-PEDES", "RSTPReid", "RSTPReid"),
    ("sampler", "random", "identity", "identity"),
    ("num_instance", 4, "2", 2),
    ("root_dir", "./data", "elsewhere", "elsewhere"),
    ("batch_size", 128, "64", 64),
    ("test_batch_size", 512, "32", 32),
    ("num_workers", 8, "0", 0),
]
SWITCHES = ["resume", "img_aug", "MLM"]  # off by default


def plain(args):
    return dict(vars(args))


@pytest.fixture
def refused(capsys):
    """A function: give it a command line, get the one line on stderr that it ends with, at status 2."""

    def run(*argv, parse=get_args):
        with pytest.raises(SystemExit) as end:
            parse(list(argv))
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file and gives its path."""

    def write(content, name="config.yaml"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


# ---- the command line ----


def test_defaults_are_the_published_ones():
    args = vars(get_args([]))
    for name, default, _, _ in FLAGS:
        assert args[name] == default and type(args[name]) is type(default), name
    assert args["training"] is True
    assert not args["resume"] and not args["img_aug"]
    assert not vars(get_args(["--loss_names", "sdm+id"]))["MLM"]


def test_the_published_configs_yaml_holds_no_option_that_the_table_lacks():
    published = {line.split(":")[0] for line in PUBLISHED_CONFIG.read_text().splitlines() if ":" in line}
    assert published == {name for name, *_ in FLAGS} | {*SWITCHES, "training", "distributed"}


@pytest.mark.parametrize(("name", "default", "typed", "value"), FLAGS, ids=[row[0] for row in FLAGS])
def test_every_flag_is_settable_and_changes_nothing_else(name, default, typed, value):
    args, defaults = plain(get_args([f"--{name}", *typed.split()])), plain(get_args([]))
    assert args[name] == value and type(args[name]) is type(value)
    assert {**args, name: default} == defaults


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_turn_on_and_nothing_else_changes(name):
    base = ["--loss_names", "sdm+id"]
    args, off = plain(get_args([*base, f"--{name}"])), plain(get_args(base))
    assert args[name] is True and off[name] is False
    assert {**args, name: False} == off


@pytest.mark.parametrize("seed", [0, 2**31, 2**53 + 1, 12345678901234567891])
def test_a_seed_may_be_any_whole_number(seed):
    assert get_args(["--seed", str(seed)]).seed == seed


def test_the_test_switch_sets_training_off():
    assert get_args(["--test"]).training is False


@pytest.mark.parametrize("typed", ["--local_rank 2", "--local-rank 2", "--local_rank=2", "--local-rank=2"])
def test_local_rank_is_read_in_both_spellings(typed):
    assert get_args(typed.split()).local_rank == 2


@pytest.mark.parametrize("typed", ["AdamW", "Adamw", "adamw", "ADAMW"])
def test_adamw_is_read_in_any_case(typed):
    assert get_args(["--optimizer", typed]).optimizer == "AdamW"


def test_the_recipe_of_the_paper_is_read():
    args = get_args("--img_aug --batch_size 64 --MLM --loss_names sdm+mlm+id --num_epoch 60".split())
    assert (args.img_aug, args.batch_size, args.MLM, args.num_epoch) == (True, 64, True, 60)


WRONG = [  # typed, words of the message
    ("--batchsize 64", ["--batchsize", "did you mean --batch_size?"]),
    ("--learning_rat 1", ["--learning_rat"]),
    ("--img-aug", ["--img-aug", "did you mean --img_aug?"]),
    ("--optim Adam", ["--optim", "did you mean --optimizer?"]),  # no abbreviations either
    ("stray", ["stray"]),
    ("--loss_names sdm+idd", ['"idd"', "did you mean id?", "sdm, itc, cmpm, id, mlm"]),
    ("--loss_names sdm,id", ['"sdm,id"']),
    ("--loss_names sdm+sdm", ["sdm+sdm", "twice"]),
    ("--loss_names", ["--loss_names"]),
    ("--sampler identitiy", ['"identitiy"', "did you mean identity?"]),
    ("--optimizer Adma", ['"Adma"', "did you mean Adam?"]),
    ("--dataset_name CUHK-PEDS", ['"CUHK-PEDS"', "did you mean CUHK-PEDES?", "RSTPReid"]),
    ("--dataset_name market", ['"market"', "ICFG-PEDES"]),
    ("--lrscheduler cosin", ['"cosin"', "did you mean cosine?"]),
    ("--warmup_method linaer", ['"linaer"', "did you mean linear?"]),
    ("--val_dataset train", ['"train"', "test, val"]),
    ("--temperature 0", ["--temperature", '"0"', "above 0"]),
    ("--temperature nan", ["--temperature", '"nan"']),
    ("--lr -1", ["--lr", '"-1"', "above 0"]),
    ("--lr=-1e-5", ["--lr", '"-1e-5"', "above 0"]),
    ("--lr inf", ["--lr", '"inf"']),
    ("--lr fast", ["--lr", '"fast"']),
    ("--weight_decay -0.1", ["--weight_decay", "at least 0"]),
    ("--batch_size 0", ["--batch_size", '"0"', "at least 1"]),
    ("--batch_size 1.5", ["--batch_size", '"1.5"', "whole number"]),
    ("--num_epoch 0", ["--num_epoch", "at least 1"]),
    ("--num_workers -1", ["--num_workers", "at least 0"]),
    ("--masked_token_rate 1.2", ["--masked_token_rate", "from 0 to 1"]),
    ("--masked_token_rate 0.95", ["--masked_token_rate", "--masked_token_unchanged_rate", "more than 1"]),
    ("--momentum 1", ["--momentum"]),
    ("--img_size 384", ["--img_size", "2"]),
    ("--img_size 384 0", ["--img_size", '"0"']),
    ("--img_size 384 128 64", ["64"]),
    ("--milestones", ["--milestones"]),
    ("--vocab_size 30522", ["--vocab_size 30522", "49408"]),
    ("--device gpu", ["--device", '"gpu"', "cuda"]),
    ("--precision fp8", ['"fp8"', "fp16"]),
    ("--sampler identity --batch_size 10 --num_instance 4", ["--batch_size (10)", "--num_instance (4)"]),
    ("--clip_architecture vision_width=128", ["--clip_architecture", "--pretrain_choice random"]),
    ("--pretrain_choice random --clip_architecture width=128", ['"width=128"', "vision_width"]),
    ("--config_file", ["--config_file"]),
]


@pytest.mark.parametrize(("typed", "words"), WRONG, ids=[typed for typed, _ in WRONG])
def test_a_wrong_command_line_ends_with_status_2_and_one_line_that_says_what_is_wrong(refused, typed, words):
    message = refused(*typed.split())
    for word in words:
        assert word in message


# ---- options that depend on one another ----


def test_of_many_processes_the_first_says_what_is_wrong(refused, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "--lr" in refused("--lr", "fast")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(SystemExit) as stopped:
        get_args(["--lr", "fast"])
    assert stopped.value.code == 2 and capsys.readouterr() == ("", "")


def test_mlm_among_the_losses_switches_the_masking_on():
    assert get_args(["--loss_names", "sdm+mlm"]).MLM is True


def test_masking_without_the_mlm_loss_stays_on():
    args = get_args(["--MLM", "--loss_names", "sdm+id"])
    assert args.MLM is True and args.loss_names == "sdm+id"


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"])
def test_mlm_with_a_resnet_is_refused_and_the_other_losses_are_not(refused, name):
    message = refused("--pretrain_choice", name, "--loss_names", "sdm+mlm")
    assert "mlm" in message and name in message
    assert get_args(["--pretrain_choice", name, "--loss_names", "sdm+id"]).pretrain_choice == name


# ---- config files ----


def test_a_config_file_wins_over_defaults_and_the_command_line_over_the_file(config):
    path = config({"batch_size": 64, "num_epoch": 3, "img_aug": True, "img_size": [256, 128]})
    args = get_args(["--num_epoch", "9", "--config_file", path])
    assert (args.batch_size, args.num_epoch, args.lr) == (64, 9, 1e-5)
    assert args.img_aug is True and args.img_size == [256, 128]
    assert get_args([f"--config_file={path}"]).batch_size == 64
    assert get_args(["--config_file", path, "--img_size", "96", "32"]).img_size == [96, 32]


def test_numbers_in_scientific_notation_are_numbers_with_or_without_a_point(config):
    path = config(
        "lr: 1e-5\nweight_decay: 4.0e-05\ntarget_lr: 1E-6\ntemperature: 2.e-2\nmilestones: [1, 2]\n"
    )
    args = get_args(["--config_file", path])
    assert (args.lr, args.weight_decay, args.target_lr, args.temperature) == (1e-5, 4e-5, 1e-6, 0.02)


def test_python_tuples_of_published_files_are_read_as_lists(config):
    path = config("img_size: !!python/tuple\n- 256\n- 64\nmilestones: !!python/tuple [3, 4]\n")
    args = get_args(["--config_file", path])
    assert args.img_size == [256, 64] and args.milestones == [3, 4]


def test_a_published_configs_yaml_is_accepted_and_holds_the_defaults():
    args, defaults = plain(get_args(["--config_file", str(PUBLISHED_CONFIG)])), plain(get_args([]))
    assert args.pop("config_file") == str(PUBLISHED_CONFIG) and defaults.pop("config_file") is None
    assert args == defaults  # its output_dir, logs/CUHK-PEDES/20230301_120000_baseline, included


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("logs/CUHK-PEDES/20230301_120000_baseline", "logs"),
        ("/runs/here/RSTPReid/20240229_000000_a_b", "/runs/here"),
        ("logs", "logs"),
        ("somewhere/20230301", "somewhere/20230301"),
    ],
)
def test_the_folder_of_a_run_is_taken_off_the_output_dir_that_its_configs_yaml_names(config, written, read):
    assert get_args(["--config_file", config({"output_dir": written})]).output_dir == read
    assert get_args(["--config_file", config({"output_dir": written}), "--output_dir", "x"]).output_dir == "x"


def test_every_flag_can_stand_in_a_config_file(config):
    content = {name: value for name, _, _, value in FLAGS if name != "loss_names"}
    args = vars(get_args(["--config_file", config({**content, "resume": True, "training": True})]))
    assert {name: args[name] for name in content} == content and args["resume"] is True


WRONG_FILES = [  # content, words of the message besides the file's name
    ("batchsize: 64", ["batchsize", "did you mean batch_size?"]),
    ("optimiser: Adam", ["optimiser", "did you mean optimizer?"]),
    ("qwertz: 1", ["qwertz"]),
    ("config_file: other.yaml", ["config_file"]),
    ("batch_size: many", ["batch_size", "many", "whole number"]),
    ("batch_size: 0", ["batch_size", "at least 1"]),
    ("batch_size: 6.5", ["batch_size", "6.5"]),
    ("batch_size: true", ["batch_size"]),
    ("batch_size: [64]", ["batch_size"]),
    ("batch_size:", ["batch_size"]),
    pytest.param(f"batch_size: {'9' * 400}", ["batch_size"], id="a number of 400 digits"),
    ("lr: .nan", ["lr", "above 0"]),
    ("lr: !!float fast", []),
    ("MLM: !!bool perhaps", []),
    ("name: 2023-13-45", []),  # to YAML a date, though none that exists
    ("lr: -1e-5", ["lr", "above 0"]),
    ("MLM: perhaps", ["MLM", "perhaps"]),
    ("img_aug: 1", ["img_aug"]),
    ("img_size: 384", ["img_size", "2"]),
    ("img_size: [384]", ["img_size", "2"]),
    ("img_size: [384, wide]", ["img_size", "wide"]),
    ("img_size: {h: 384, w: 128}", ["img_size"]),
    ("milestones: 20", ["milestones"]),
    ("loss_names: [sdm, id]", ["loss_names"]),
    ("loss_names: sdm+foo", ["loss_names", "foo"]),
    ("name: {a: b}", ["name"]),
    ("optimizer: Adma", ["optimizer", "did you mean Adam?"]),
    ("", ["batch_size: 64"]),
    ("- batch_size\n- 64\n", ["batch_size: 64"]),
    ("just words", ["batch_size: 64"]),
    ("7: 8", ["batch_size: 64"]),
    ("batch_size: [64\nlr: 1", ["line"]),
    ("a: b: c", ["line 1"]),
    ("batch_size: !!python/object/apply:os.system [true]", ["line 1"]),
    ("batch_size: !!python/name:os.system", ["line 1"]),
    ("batch_size: &a [*a]", []),
    (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", ["not text"]),
    (b"batch_size: 64\x00\n", []),
    pytest.param("[" * 20_000, [], id="nested without end"),
]


@pytest.mark.parametrize(("content", "words"), WRONG_FILES)
def test_a_wrong_config_file_ends_with_status_2_and_one_line_that_names_file_and_key(
    refused, config, content, words
):
    path = config(content)
    message = refused("--config_file", path)
    for word in [path, *words]:
        assert word in message


def test_a_missing_config_file_is_named_with_its_neighbours(refused, config, tmp_path):
    config({"lr": 1e-5}, "irra.yaml")
    message = refused("--config_file", str(tmp_path / "ira.yaml"))
    assert str(tmp_path / "ira.yaml") in message and "irra.yaml" in message
    assert "no folder" in refused("--config_file", str(tmp_path / "nowhere" / "irra.yaml"))
    assert f"{tmp_path}/configs.yaml (that folder holds " in refused("--config_file", str(tmp_path))


def test_a_runs_folder_stands_for_its_configs_yaml(tmp_path):
    (tmp_path / "configs.yaml").write_text("batch_size: 48\n")
    assert get_args(["--config_file", str(tmp_path)]).batch_size == 48


def test_options_of_a_config_file_are_reconciled_too(refused, config):
    assert get_args(["--config_file", config({"loss_names": "sdm+mlm", "MLM": False})]).MLM is True
    assert "RN50" in refused("--config_file", config({"loss_names": "mlm", "pretrain_choice": "RN50"}))


def test_shipped_config_files_are_accepted():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert get_args(["--config_file", str(path)]).config_file == str(path)


# ---- test.py ----


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "20230301_120000_baseline"
    folder.mkdir()
    (folder / "configs.yaml").write_text(PUBLISHED_CONFIG.read_text())
    return folder


def test_a_run_is_named_by_its_folder_or_its_file(run_folder):
    by_folder = plain(get_test_args(["--config_file", str(run_folder)]))
    by_file = plain(get_test_args(["--config_file", str(run_folder / "configs.yaml")]))
    assert by_folder.pop("config_file") == str(run_folder)
    assert by_file.pop("config_file") == str(run_folder / "configs.yaml")
    assert by_folder == by_file
    assert by_folder["run_dir"] == str(run_folder)  # wherever the run has moved to
    assert by_folder["training"] is False and by_folder["split"] == "test" and by_folder["i2t"] is False
    for name, default, _, _ in FLAGS:
        if name != "output_dir":
            assert by_folder[name] == default


def test_options_of_test_win_over_those_of_the_run(run_folder):
    typed = "--root_dir here --dataset_name RSTPReid --split val --test_batch_size 9 --num_workers 0 --i2t"
    args = get_test_args(["--config_file", str(run_folder), *typed.split(), "--precision", "fp32"])
    assert (args.root_dir, args.dataset_name, args.split) == ("here", "RSTPReid", "val")
    assert (args.test_batch_size, args.num_workers, args.i2t, args.precision) == (9, 0, True, "fp32")
    assert args.batch_size == 128


def test_an_annotation_file_of_a_run_holds_until_another_is_given(config):
    given = {"loss_names": "sdm", "dataset_name": "RSTPReid", "annotations": "a.csv", "images": "pictures"}
    path = config(given)
    assert (get_args([]).annotations, get_args([]).images) == (None, None)
    for args in (get_args(["--config_file", path]), get_test_args(["--config_file", path])):
        assert (args.annotations, args.images) == tuple(map(os.path.abspath, ("a.csv", "pictures")))
    typed = ["--config_file", path, "--annotations", "b.tsv", "--images", "here"]
    for args in (get_args(typed), get_test_args(typed)):
        assert (args.annotations, args.images) == tuple(map(os.path.abspath, ("b.tsv", "here")))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("", ["--config_file"]),
        ("--config_file x --chekpoint y", ["did you mean --checkpoint?"]),
        ("--config_file x --split vali", ['"vali"', "did you mean val?"]),
        ("--config_file x --batch_size 3", ["--batch_size"]),
    ],
)
def test_a_wrong_command_line_of_test_ends_with_one_line_too(refused, typed, words):
    message = refused(*typed.split(), parse=get_test_args)
    for word in words:
        assert word in message


def test_a_config_that_is_not_of_a_run_is_an_error_that_says_so(config, tmp_path):
    with pytest.raises(InputError, match="loss_names and dataset_name"):
        get_test_args(["--config_file", config({"batch_size": 64})])
    with pytest.raises(InputError, match="configs.yaml"):
        get_test_args(["--config_file", str(tmp_path)])


# ---- one table, from which the parsers of all programs are made ----

ROWS = [row for rows in options.OPTIONS.values() for row in rows]


def actions(program):
    return {action.dest: action for action in options.parser_of(program)._actions}


def test_every_option_has_one_row_with_a_help():
    names = [name for row in ROWS for name in row[0].split()]
    assert len(names) == len(set(names))
    assert all(row[3].strip() for row in ROWS)


def test_every_row_says_once_which_programs_have_it():
    for name, programs, *_ in ROWS:
        having = " ".join(programs).split()
        assert having and len(having) == len(set(having)) and {*having} <= {*options.PROGRAMS}, name


@pytest.mark.parametrize("program", options.PROGRAMS)
def test_help_is_a_line_an_option_at_100_columns(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = options.parser_of(program).format_help().splitlines()
    assert max(map(len, lines)) <= 100
    first = next(n for n, line in enumerate(lines) if line.endswith(":") and not line.startswith(" "))
    listed = [line.split()[0].rstrip(",") for line in lines[first:] if line.startswith(" ")]
    mine = [row[0].split()[0] for row in ROWS if program in " ".join(row[1]).split()]
    assert listed == ["RUN" if name == "config_file" else name for name in mine]


def test_an_option_has_the_same_type_and_help_in_every_program():
    seen = {}
    for program in options.PROGRAMS:
        for name, action in actions(program).items():
            if action.option_strings:
                text = re.sub(r" \[.*\]$", "", action.help)  # the default, which may be another
                assert seen.setdefault(name, (action.type, text)) == (action.type, text), (program, name)


# ---- at once: before PyTorch is loaded ----


def run_script(script, *argv, cwd=ROOT):
    """Status, stdout, stderr and whether torch was loaded, in a Python of its own."""
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("torch loaded:", "torch" in sys.modules, file=sys.stderr))
sys.argv = {[script, *argv]!r}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=PATIENCE
    )
    err, _, loaded = done.stderr.rpartition("torch loaded: ")
    return done.returncode, done.stdout, err, loaded.strip() == "True"


@pytest.mark.parametrize("script", [f"{program}.py" for program in options.PROGRAMS])
def test_help_lists_every_option_without_loading_torch(script):
    status, out, err, torch_loaded = run_script(script, "--help")
    assert status == 0 and err == "" and not torch_loaded
    if script == "train.py":
        assert {*re.findall(r"--(\w+)", out)} >= {name for name, *_ in FLAGS} | {
            *SWITCHES,
            "test",
            "config_file",
        }


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("train.py", ["--batchsize", "64"]),
        ("train.py", ["--test"]),
        ("train.py", ["--config_file", "nowhere.yaml"]),
        ("test.py", ["--config_file", "nowhere.yaml"]),
        ("test.py", []),
    ],
)
def test_a_wrong_command_line_ends_with_one_line_without_loading_torch(tmp_path, script, argv):
    status, out, err, torch_loaded = run_script(script, *argv, cwd=tmp_path)
    assert status == 2 and out == "" and not torch_loaded
    assert err.startswith("error: ") and err.count("\n") == 1, err


# ---- the names that options may take are those of the tables that use them ----


def test_option_names_are_those_of_the_tables_that_use_them():
    assert {*options.DATASETS} == {*annotations.SOURCES}
    assert {*options.OPTIMIZERS} == {*solver.OPTIMIZERS}
    assert {*options.ACTIVATIONS} == {"auto", *clip_model.ACTIVATIONS}
    assert {*options.CLIP_MODELS} == {*fetch.CHECKPOINTS}
    assert {*LOSSES} == {name[8:] for name in dir(objectives) if name.startswith("compute_")}
    assert {*options.ARCHITECTURE} - {"image_resolution"} == {*pretrained.VIT_B_16}


@pytest.mark.parametrize("name", options.SCHEDULES)
def test_every_schedule_gives_a_rate_in_every_epoch(name):
    rates = [solver.lr_at(epoch, 1e-5, 60, name) for epoch in range(60)]
    assert all(0 <= rate <= 1e-5 for rate in rates) and len(set(rates)) > 5


def test_a_schedule_that_no_option_names_does_not_exist():
    with pytest.raises(InputError, match="cosin"):
        solver.lr_at(10, 1e-5, 60, "cosin")


# ---- what a file says is what is used ----


@pytest.mark.parametrize("word", ["off", "no", "on", "yes", "Off", "NO"])
def test_words_of_yaml_that_look_like_booleans_are_the_words_they_are(config, word):
    """YAML 1.1 reads them as true and false: a cache was made in a folder called False."""
    args = get_args(["--config_file", config(f"image_cache: {word}\nname: {word}")])
    assert (args.image_cache, args.name) == (word, word)


@pytest.mark.parametrize(("word", "value"), [("true", True), ("yes", True), ("on", True), ("no", False)])
def test_a_switch_understands_them_all_the_same(config, word, value):
    assert get_args(["--config_file", config(f"img_aug: {word}")]).img_aug is value


def test_true_is_no_word(refused, config):
    message = refused("--config_file", config("image_cache: true"))
    assert "image_cache" in message and "in quotes" in message
    assert get_args(["--config_file", config("image_cache: 'true'")]).image_cache == "true"


def test_a_key_that_stands_there_twice_is_refused_with_its_line(refused, config):
    message = refused("--config_file", config("lr: 1e-4\nbatch_size: 8\nlr: 1e-5"))
    assert "lr stands there twice" in message and "line 1" in message


@pytest.mark.parametrize("flag", ["output_dir", "root_dir", "pretrain_choice", "image_cache", "annotations"])
def test_a_tilde_is_the_home_folder_wherever_it_stands(flag, config, monkeypatch):
    """The shell leaves --flag=~/x alone, and nobody asks it about a YAML file."""
    monkeypatch.setenv("HOME", "/home/somebody")
    for words in ([f"--{flag}=~/x"], [f"--{flag}", "~/x"], ["--config_file", config(f"{flag}: ~/x")]):
        assert getattr(get_args(words), flag) == "/home/somebody/x"


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "bom.yaml").write_text("batch_size: 8\n", encoding="utf-8-sig")
    assert get_args(["--config_file", str(tmp_path / "bom.yaml")]).batch_size == 8


def test_a_checkpoint_without_resume_begins_no_other_training(train_script, tmp_path, capsys):
    assert train_script.main(["--resume_ckpt_file", str(tmp_path / "last.pth")]) == 2
    assert "goes with --resume" in capsys.readouterr().err
