"""--ema: the average of the weights, by hand; steps left out do not count; nothing waits for it."""

import json
import math
import re

import pytest
import torch
from torch import nn

from benchmarks.pretended import DEVICE, Pretended
from processor.trainer import FiniteWatch, NotFinite, Steps, train_one_epoch
from solver import WeightAverage
from tests.children import differences, draw, only_run, words
from tests.test_finite import BAD, CHAINS, CPU, GOOD, OPTIMIZERS, OTHER, Line, batches
from tests.test_pretended import PRECISIONS, Loader, build
from utils.checkpoint import load_checkpoint
from utils.options import get_args


def values(tensors):
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_the_formula_in_fp32_whatever_the_weights_are(dtype):
    """Of weights that move by their type's smallest step, of which an average in fp16 would miss 1/1000."""
    model = Line().to(dtype)
    average, expected = WeightAverage(model, 0.999), model.weight.detach().double()
    assert average.averages["weight"].dtype == torch.float32
    for _ in range(50):
        with torch.no_grad():
            model.weight.mul_(1 + torch.finfo(dtype).eps)
        average.update()
        expected = 0.999 * expected + 0.001 * model.weight.detach().double()
    moved = (expected - torch.tensor([1.0, 2.0])).abs()
    assert (average.averages["weight"] - expected).abs().max() < max(0.01 * moved.max(), 1e-5)
    in_its_own = torch.tensor([1.0, 2.0], dtype=dtype)
    in_its_own.lerp_(torch.tensor([1.0, 2.0], dtype=dtype) * (1 + torch.finfo(dtype).eps), 0.001)
    assert dtype == torch.float32 or in_its_own.tolist() == [1.0, 2.0]  # so the test would see it
    assert dtype == torch.float32 or average.averages["weight"].tolist() != [1.0, 2.0]


def test_running_statistics_are_averaged_and_counts_are_not():
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model, 0.5)
    model(torch.randn(8, 3) + 4)
    average.update()
    mean, count = model.running_mean.clone(), model.num_batches_tracked.clone()
    with average.in_place():
        torch.testing.assert_close(model.running_mean, mean / 2)
        assert torch.equal(model.num_batches_tracked, count)
    assert torch.equal(model.running_mean, mean)


def test_the_weights_come_back_bit_for_bit_also_after_an_error():
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5).half(), nn.LayerNorm(5))
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    average.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), average.in_place():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, average.averages[name].to(tensor.dtype))
            assert not torch.equal(tensor, before[name])
        raise KeyError
    assert differences(dict(model.state_dict()), before) == []


# ---- steps that are left out ----


def trained(optimizer_of, slopes, period, dtype=torch.float32):
    """(average after each step, error) of steps as train.py takes them, looked at every `period` steps."""
    model = Line().to(dtype)
    optimizer = optimizer_of(model.parameters())
    watch, average = FiniteWatch(model, optimizer, 1, period), WeightAverage(model, 0.75)
    after = [average.averages["weight"].tolist()]

    def after_step(step, meters):
        average.update(watch.left_out)
        after.append(average.averages["weight"].tolist())

    try:
        steps = Steps(after_step=after_step, watch=watch)
        train_one_epoch(model, batches(*slopes), optimizer, CPU, 1, steps)
    except NotFinite as error:
        return after, error
    return after, None


FUSED = {name: OPTIMIZERS[name] for name in ("fused Adam", "fused SGD", "fused AdamW")}


@pytest.mark.parametrize("optimizer_of", FUSED.values(), ids=FUSED)
def test_a_step_that_a_fused_optimiser_leaves_out_does_not_count(optimizer_of):
    after, error = trained(optimizer_of, [GOOD, OTHER, BAD["NaN"], GOOD, OTHER], period=5)
    expected, none = trained(optimizer_of, [GOOD, OTHER, GOOD], period=1)
    assert error and none is None and len(after) == 5 and len({str(one) for one in expected}) == 4
    assert after == [*expected[:3], expected[2], expected[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer_of", CHAINS.values(), ids=CHAINS)
def test_a_step_that_a_chain_leaves_out_does_not_count(optimizer_of, dtype):
    after, error = trained(optimizer_of, [GOOD, OTHER, BAD["infinity"], GOOD, OTHER], 5, dtype)
    expected, none = trained(optimizer_of, [GOOD, OTHER], 1, dtype)
    assert error and none is None and len(after) == 5 and len({str(one) for one in expected}) == 3
    assert after == [*expected, expected[2], expected[2]]
    assert all(math.isfinite(value) for one in after for value in one)


# ---- on a GPU ----


def averages_on(device, precision, waits=None):
    model, optimizer = build(device, precision)
    watch, average = FiniteWatch(model, optimizer, 1, 4), WeightAverage(model, 0.9)

    def after_step(step, meters):
        if waits is None:
            return average.update(watch.left_out)
        before = sum(waits.values())
        average.update(watch.left_out)
        assert sum(waits.values()) == before

    train_one_epoch(model, Loader(device, 5), optimizer, device, 1, Steps(watch=watch, after_step=after_step))
    return {name: tensor.cpu() for name, tensor in average.state_dict().items()}, average


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_host_does_not_wait_for_it_and_a_gpu_gives_what_a_cpu_gives(precision):
    here, _ = averages_on(CPU, precision)
    with Pretended() as gpu:
        there, average = averages_on(DEVICE, precision, gpu.waits)
        assert all(tensor.device == DEVICE for tensor in average.averages.values())
    assert differences(here, there) == []
    assert {tensor.dtype for tensor in here.values()} == {torch.float32}


# ---- whole trainings ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def run_of(data, train_script, tmp_path_factory):
    """run_of(*options): the folder of a run of two epochs."""
    runs = {}

    def of(*options):
        if options not in runs:
            logs = tmp_path_factory.mktemp("logs")
            assert train_script.main(list(map(str, words(data, logs, *options, epochs=2)))) == 0
            runs[options] = only_run(logs)
        return runs[options]

    return of


EVERY_STEP = ("--ema", "0.5", "--precision")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_trained_does_not_depend_on_it(precision, run_of):
    without, beside = (
        load_checkpoint(run_of(*options) / "last.pth")
        for options in (("--precision", precision), (*EVERY_STEP, precision))
    )
    assert set(beside) - set(without) == {"ema", "best_ema_R1", "best_ema_epoch"}
    assert differences({key: beside[key] for key in without}, without) == []
    assert {tensor.dtype for tensor in beside["ema"].values()} == {torch.float32}
    moved = [not torch.equal(beside["ema"][name], beside["model"][name].float()) for name in beside["ema"]]
    assert list(beside["ema"]) == list(beside["model"]) and all(moved)


def test_without_it_nothing_of_it_is_kept_or_said(run_of):
    run = run_of("--precision", "fp32")
    assert not (run / "best_ema.pth").exists()
    said = (run / "train_log.txt").read_text().replace("ema=0.0", "")
    assert not re.search(r"_ema|averaged", said)


def test_best_ema_is_a_checkpoint_that_test_finds_as_good_as_the_log_says(run_of, test_script, tmp_path):
    run = run_of(*EVERY_STEP, "fp32")
    argv = ["--config_file", str(run), "--checkpoint", str(run / "best_ema.pth"), "--output", str(tmp_path)]
    assert test_script.main([*argv, "--device", "cpu"]) in (0, None)
    (written,) = tmp_path.glob("*.json")
    found, last = json.loads(written.read_text()), load_checkpoint(run / "last.pth")
    assert found["t2i"]["R1"] == pytest.approx(last["best_ema_R1"])
    assert found["epoch"] == last["best_ema_epoch"]
    rows = re.findall(r"\| +(t2i\w*) +\| +([\d.]+) .*", (run / "train_log.txt").read_text())
    assert [name for name, _ in rows] == ["t2i", "t2i_ema"] * 2
    assert rows[2 * last["best_ema_epoch"] - 1][1] == f"{found['t2i']['R1']:.3f}"
    kept, raw = load_checkpoint(run / "best_ema.pth"), load_checkpoint(run / "best.pth")
    assert set(kept) == {"model", "epoch", "iteration", "num_epoch"}
    types = [{name: tensor.dtype for name, tensor in state["model"].items()} for state in (kept, raw)]
    assert types[0] == types[1] and differences(kept["model"], raw["model"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda state: state.update(ema=[1]), "its ema part is damaged"),
        (lambda state: state["ema"].popitem(), "its ema part, does not fit the model: classifier.bias"),
        (lambda state: state.pop("best_ema_R1"), None),
        (lambda state: state.update(best_ema_R1="high"), "its part best_ema_R1 is missing or damaged"),
    ],
)
def test_a_damaged_average_is_one_sentence(damage, says, run_of, train_script, tmp_path, capsys):
    state = load_checkpoint(run_of(*EVERY_STEP, "fp32") / "last.pth")
    damage(state)
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "last.pth")
    options = (run_of(*EVERY_STEP, "fp32") / "configs.yaml").read_text()
    (tmp_path / "run" / "configs.yaml").write_text(options)
    status = train_script.main(["--resume", "--resume_ckpt_file", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert status == (2 if says else 0)
    if says:
        assert len(said.splitlines()) == 1 and says in said


@pytest.mark.parametrize("beside", [("--ema", "0.5"), ("--ema", "0")])
def test_it_can_begin_and_end_where_a_run_goes_on(beside, data, train_script, tmp_path):
    begins = beside[1] != "0"
    argv = words(data, tmp_path, *(() if begins else ("--ema", "0.5")), epochs=1)
    assert train_script.main(list(map(str, argv))) == 0
    folder = only_run(tmp_path)
    assert train_script.main(["--resume", "--output_dir", str(tmp_path), "--num_epoch", "2", *beside]) == 0
    log, last = (folder / "train_log.txt").read_text(), load_checkpoint(folder / "last.pth")
    assert ("holds no averaged weights: the average begins with its weights" in log) == begins
    assert log.count("t2i_ema") == 1 and ("ema" in last) == begins
    assert f"ema was {0.0 if begins else 0.5} before and is {float(beside[1])} from here on" in log


@pytest.mark.parametrize("decay", ["1", "-0.1", "nan", "often"])
def test_a_decay_that_is_none_is_refused(decay, capsys):
    with pytest.raises(SystemExit) as stop:
        get_args(["--ema", decay])
    assert stop.value.code == 2 and "--ema" in capsys.readouterr().err
