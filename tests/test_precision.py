"""The precision that is used: what was typed, or one in which the run can train on its device."""

from pathlib import Path

import pytest
import torch

from model import build_model
from solver import build_optimizer
from tests.children import draw, words
from tests.test_fp16 import args_of, batches, new_model
from utils.errors import InputError
from utils.losses import total_loss
from utils.options import get_args, get_test_args
from utils.run import RunFiles
from utils.settings import check, pick_precision, precision_line

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/**/*.yaml"))


def picked(typed, device):
    return pick_precision(get_args(typed.split()), device)


@pytest.mark.parametrize(
    ("typed", "on_gpu"),
    [
        ("", "fp16"),  # the published recipe
        ("--optimizer SGD", "fp16"),
        ("--optimizer AdamW", "fp32"),
        ("--pretrain_choice random", "fp32"),
        ("--pretrain_choice random --optimizer AdamW", "fp32"),
        ("--precision bf16", "bf16"),
        ("--precision fp32", "fp32"),
        ("--precision fp16 --pretrain_choice random", "fp16"),
        ("--precision bf16 --optimizer AdamW", "bf16"),
    ],
)
def test_what_is_typed_wins_else_the_device_and_the_run_decide(typed, on_gpu):
    assert picked(typed, GPU) == on_gpu
    assert picked(typed, CPU) == (on_gpu if "--precision" in typed else "fp32")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_train_on_a_gpu(path):
    args = get_args(["--config_file", str(path)])
    recipe = args.pretrain_choice != "random" and args.optimizer == "Adam"
    assert pick_precision(args, GPU) == ("fp16" if recipe else "fp32")
    check(args, precision=pick_precision(args, GPU))
    assert precision_line(args, GPU).startswith("Precision: ")


def test_the_demo_computes_in_fp32_on_every_device():
    """It used to take the GPU's fp16 for its AdamW and its random weights, and diverged."""
    args = get_args(["--config_file", str(next(path for path in CONFIGS if path.stem == "demo"))])
    assert args.precision is None and pick_precision(args, GPU) == pick_precision(args, CPU) == "fp32"
    assert precision_line(args, CPU) == "Precision: fp32"
    said = precision_line(args, GPU)
    assert said.startswith("Precision: fp32, since AdamW's eps of 1e-08") and "--precision bf16" in said


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_adamw_in_fp16_is_refused_with_the_reason(device):
    args = get_args("--optimizer AdamW --loss_names sdm --precision fp16".split())
    assert pick_precision(args, device) == "fp16"
    with pytest.raises(InputError, match="AdamW.*eps of 1e-08 rounds to 0.*use --precision bf16 or fp32"):
        check(args, precision="fp16")


def test_a_training_says_its_precision_or_why_it_cannot_be(train_script, tmp_path, capsys):
    data = draw(tmp_path / "drawn")
    argv = [str(word) for word in words(data, tmp_path, epochs=1)]
    assert train_script.main([*argv, "--optimizer", "AdamW", "--precision", "fp16"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "AdamW" in said.err and "fp16" in said.err
    assert not list(tmp_path.glob("logs*/*/*"))
    assert train_script.main(argv) == 0
    assert "Precision: fp32\n" in capsys.readouterr().out


def test_adamw_in_fp16_is_nan_in_its_second_step():
    """The reason for the refusal, as in the published code."""
    model, finite = new_model(), []
    optimizer = build_optimizer(args_of(optimizer="AdamW"), model)
    for batch in batches()[:2]:
        optimizer.zero_grad()
        loss = total_loss(model(batch))
        finite.append(bool(loss.isfinite()))
        loss.backward()
        optimizer.step()
    assert finite == [True, False]


@pytest.mark.parametrize(("typed", "on_gpu"), [("--optimizer AdamW", "fp32"), ("", "fp16")])
def test_a_run_is_tested_by_the_same_rule(typed, on_gpu, tmp_path):
    args = get_args([*typed.split(), "--output_dir", str(tmp_path)])
    run = RunFiles(args)
    run.folder.mkdir(parents=True)
    run.save_configs()
    for device, precision in ((CPU, "fp32"), (GPU, on_gpu)):
        assert pick_precision(get_test_args(["--config_file", str(run.folder)]), device) == precision


def test_halving_before_moving_gives_the_same_weights():
    args = get_args("--pretrain_choice random --loss_names sdm --device cpu --precision fp16".split())
    args.clip_architecture = {"embed_dim": 64, "vision_layers": 1, "vision_width": 64}
    args.clip_architecture |= {"transformer_width": 64, "transformer_layers": 1}
    torch.manual_seed(0)
    half = build_model(args, 5)
    args.precision = "fp32"
    torch.manual_seed(0)
    full = build_model(args, 5)
    for (name, a), b in zip(half.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), name
