"""Numbers are watched: a step whose loss or gradient is no number is not taken, and its batch is kept."""

import json
import logging
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from processor.trainer import FiniteWatch, NotFinite, Steps, train_one_epoch
from solver.skip import skips_on_device
from tests import children
from tests.children import differ, draw, only_run, run, words
from utils.checkpoint import load_checkpoint
from utils.loading import GRACE
from utils.signals import Stopped, StopSignals

CPU = torch.device("cpu")
GIVEN = dict(pids=[3, 5], image_ids=[7, 9], caption_ids=[[1, 2], [3, 4]])


class Line(nn.Module):
    """A model of two numbers; the loss and its gradient are what the batch says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    @staticmethod
    def plan(batch):
        return {}

    def forward(self, batch):
        slope = batch["slope"]
        loss = (self.weight * slope).sum()
        return {"sdm_loss": loss * 0.75, "id_loss": loss * 0.25, "temperature": torch.tensor(0.02)}


def batches(*slopes):
    return [{**{k: torch.tensor(v) for k, v in GIVEN.items()}, "slope": torch.tensor(s)} for s in slopes]


def taken(optimizer_of, slopes, **options):
    """(weights after each step, NotFinite or None, weights at the end)."""
    model = Line()
    optimizer, after = optimizer_of(model.parameters()), []

    def look(step, meters):
        after.append(model.weight.detach().tolist())

    try:
        train_one_epoch(model, batches(*slopes), optimizer, CPU, 4, Steps(after_step=look, **options))
    except NotFinite as error:
        return after, error, model.weight.detach().tolist()
    return after, None, model.weight.detach().tolist()


OPTIMIZERS = {
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.5, eps=1e-3, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.5, fused=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.5),
}
GOOD, OTHER = [1.0, -1.0], [0.5, 2.0]
BAD = {"NaN": [math.nan, 1.0], "infinity": [math.inf, 1.0], "minus infinity": [1.0, -math.inf]}


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_it_stops_before_the_step_is_taken(bad, optimizer_of):
    after, error, weight = taken(optimizer_of, [GOOD, OTHER, bad, GOOD])
    expected, none, _ = taken(optimizer_of, [GOOD, OTHER])
    assert none is None and after == expected and weight == expected[-1]
    assert error.evidence["epoch"] == 4 and error.evidence["iteration"] == 3
    assert {key: error.evidence[key] for key in GIVEN} == GIVEN
    assert set(error.evidence["losses"]) == {"sdm_loss", "id_loss"}
    assert not all(math.isfinite(value) for value in error.evidence["losses"].values())
    for advice in ("epoch 4, iteration 3", "the step was not taken", "--precision bf16", "--max_grad_norm"):
        assert advice in str(error)


@pytest.mark.parametrize("optimizer_of", list(OPTIMIZERS.values())[:3], ids=list(OPTIMIZERS)[:3])
def test_a_fused_optimiser_skips_the_bad_step_until_the_host_looks(optimizer_of):
    """Between two looks the bad step is left out on the device, and good ones are taken; then it ends."""
    model = Line()
    optimizer, after = optimizer_of(model.parameters()), []
    watch = FiniteWatch(model, optimizer, epoch=4, period=5)
    with pytest.raises(NotFinite) as raised:
        for step, batch in enumerate(batches(GOOD, OTHER, BAD["NaN"], GOOD, OTHER, GOOD), start=1):
            report = model(batch)
            loss = report["sdm_loss"] + report["id_loss"]
            optimizer.zero_grad()
            loss.backward()
            watch.before_step(step, loss, report, batch)
            optimizer.step()
            after.append(model.weight.detach().tolist())
    assert raised.value.evidence["iteration"] == 3  # the bad one, not the fifth, which looked
    assert len(after) == 4 and after[2] == after[1] and after[3] != after[2]
    assert all(math.isfinite(value) for weight in after for value in weight)
    expected, none, _ = taken(optimizer_of, [GOOD, OTHER, GOOD])
    assert none is None and after[3] == expected[2]  # moments untouched too


CHAINS = {
    "Adam": lambda p: skips_on_device(torch.optim.Adam(p, lr=0.5, eps=1e-3, foreach=True)),
    "SGD": lambda p: skips_on_device(torch.optim.SGD(p, lr=0.5, momentum=0.9, foreach=True)),
    "AdamW": lambda p: skips_on_device(torch.optim.AdamW(p, lr=0.5, eps=1e-3, foreach=True)),
}


def moments(optimizer):
    return [[t.tolist() for name, t in state.items() if name != "step"] for state in optimizer.state.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("bad_at", [1, 3, 4])
@pytest.mark.parametrize("optimizer_of", CHAINS.values(), ids=CHAINS)
def test_a_chain_stands_still_from_the_bad_step_to_the_look(optimizer_of, bad_at, dtype):
    """No fused kernel, and the host does not look before step 5: weights and moments are put back."""
    slopes = [GOOD, OTHER, GOOD, OTHER, GOOD]
    slopes[bad_at - 1] = BAD["NaN"]

    def run(slopes, period):
        model = Line().to(dtype)
        optimizer, after = optimizer_of(model.parameters()), [(model.weight.tolist(), [])]
        watch = FiniteWatch(model, optimizer, epoch=4, period=period)
        loader = batches(*slopes)

        def look(step, meters):
            after.append((model.weight.tolist(), moments(optimizer)))

        try:
            train_one_epoch(model, loader, optimizer, CPU, 4, Steps(after_step=look, watch=watch))
        except NotFinite as error:
            return after, error
        return after, None

    after, error = run(slopes, period=5)
    assert error.evidence["iteration"] == bad_at and len(after) == 5  # the fifth step looked
    assert {key: error.evidence[key] for key in GIVEN} == GIVEN
    assert all(math.isnan(value) for value in error.evidence["losses"].values())
    expected, none = run(slopes[: bad_at - 1], period=1)
    assert none is None and [weight for weight, _ in after[:bad_at]] == [weight for weight, _ in expected]
    for weight, moment in after[bad_at:]:
        assert weight == expected[-1][0]
        assert moment == (expected[-1][1] or [[[0, 0]] * len(m) for m in moment])  # none before the first


@pytest.mark.parametrize("optimizer_of", CHAINS.values(), ids=CHAINS)
def test_a_good_step_of_a_watched_chain_is_that_of_an_unwatched_one(optimizer_of):
    ends = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(50, 30).half()
        model.add_module("norm", nn.LayerNorm(30))
        optimizer = optimizer_of(model.parameters())
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            if watched:
                optimizer.found_inf = torch.zeros(())
            optimizer.step()
        ends.append([p.tolist() for p in model.parameters()] + moments(optimizer))
    assert ends[0] == ends[1]


def test_what_is_saved_within_an_epoch_is_looked_at_first():
    """A step that was left out does not count as done in a checkpoint."""
    model, saved = Line(), []
    optimizer = OPTIMIZERS["fused Adam"](model.parameters())
    watch = FiniteWatch(model, optimizer, epoch=1, period=100)

    def after_step(step, meters):
        if step == 3:
            watch.look()
            saved.append(step)

    with pytest.raises(NotFinite) as raised:
        loader = batches(GOOD, BAD["NaN"], OTHER, GOOD)
        train_one_epoch(model, loader, optimizer, CPU, 1, Steps(after_step=after_step, watch=watch))
    assert raised.value.evidence["iteration"] == 2 and not saved


def test_a_bad_step_after_the_last_look_ends_the_epoch_all_the_same():
    model = Line()
    watch = FiniteWatch(model, OPTIMIZERS["fused Adam"](model.parameters()), epoch=1, period=100)
    report = model(batches(BAD["NaN"])[0])
    (report["sdm_loss"] + report["id_loss"]).backward()
    watch.before_step(1, report["sdm_loss"], report, batches(GOOD)[0])
    with pytest.raises(NotFinite):
        watch.look()


def test_a_large_gradient_that_is_finite_is_no_fault():
    """The square of its norm overflows in fp32; its largest entry does not."""
    _, error, _ = taken(lambda p: torch.optim.SGD(p, lr=1e-30), [[1e30, -0.5e30]])
    assert error is None


@pytest.mark.parametrize("norm", [0.1, 1.0, 5.0, 100.0])
def test_max_grad_norm_scales_by_hand(norm):
    slope = torch.tensor([3.0, -4.0])  # of norm 5
    _, error, weight = taken(OPTIMIZERS["plain SGD"], [slope.tolist()], max_grad_norm=norm)
    expected = torch.tensor([1.0, 2.0]) - 0.5 * slope * min(1.0, norm / 5)
    assert error is None
    torch.testing.assert_close(torch.tensor(weight), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("slope", [[3.0, -4.0], [60000.0, -60000.0], [6.0, 0.5]])
def test_max_grad_norm_adds_up_fp16_gradients_in_fp32(slope):
    """Above 65504 the 2-norm is infinite in fp16, and the step was scaled to nothing without a word."""
    model = Line().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=True)
    train_one_epoch(model, batches(slope), optimizer, CPU, 1, Steps(max_grad_norm=1.0))
    norm = math.hypot(*slope)
    expected = [w - 0.5 * s * min(1.0, 1 / norm) for w, s in zip((1.0, 2.0), slope, strict=True)]
    assert model.weight.tolist() == pytest.approx(expected, rel=2e-3)


# ---- whole trainings ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


def error_of(output):
    text = output.read_text()
    assert "Traceback" not in text and text.count("error: ") == 1
    return text.splitlines()[-1]


def test_a_training_that_diverges_keeps_what_led_to_it(data, tmp_path):
    """An absurd rate makes the weights huge within an epoch, and the loss NaN."""
    output = tmp_path / "output"
    absurd = ("--optimizer", "SGD", "--lr", "1e30", "--warmup_epochs", "0")
    argv = words(data, tmp_path, *absurd, "--save_period", "1")
    assert run(argv, output) == 2
    folder = only_run(tmp_path)
    sentence = error_of(output)
    assert sentence.startswith("error: loss or gradient is no longer a number in epoch 1, iteration ")
    assert sentence.endswith(f"The batch is described in {folder / 'bad_batch.json'}")
    evidence = json.loads((folder / "bad_batch.json").read_text())
    assert evidence["iteration"] > 1 and set(evidence["losses"]) == {"sdm_loss", "id_loss"}
    assert all(len(evidence[key]) == 8 for key in ("pids", "image_ids", "caption_ids"))
    last = load_checkpoint(folder / "last.pth")
    assert last["iteration"] == evidence["iteration"] - 1
    assert all(weight.isfinite().all() for weight in last["model"].values())


def poison(argv, output):
    """A training whose memory fails: after step 2 of epoch 2 a weight is NaN."""
    import logging

    class Poison(logging.Handler):
        def emit(self, record):
            if "Epoch[2] Iteration[2" in record.getMessage():
                import gc

                (model,) = (thing for thing in gc.get_objects() if type(thing).__name__ == "IRRA")
                with torch.no_grad():
                    model.classifier.weight[0, 0] = math.nan

    logging.getLogger("IRRA.train").addHandler(Poison())
    children.train_in_child(argv, output)


def test_the_last_checkpoint_stays_good_and_goes_on(data, tmp_path):
    """The NaN comes from outside, so that the same run, resumed, ends as one that never met it."""
    output = tmp_path / "output"
    assert run(words(data, tmp_path / "logs"), output, way=poison) == 2
    folder = only_run(tmp_path / "logs")
    assert "in epoch 2, iteration 3 (" in error_of(output)
    evidence = json.loads((folder / "bad_batch.json").read_text())
    assert math.isnan(evidence["losses"]["id_loss"]) and math.isfinite(evidence["losses"]["sdm_loss"])
    last = load_checkpoint(folder / "last.pth")
    assert (last["epoch"], last["iteration"]) == (1, 0)
    assert all(weight.isfinite().all() for weight in last["model"].values())

    assert run(["--resume", "--output_dir", tmp_path / "logs"], output) == 0
    assert run(words(data, tmp_path / "unbroken"), output) == 0
    assert differ(folder / "last.pth", only_run(tmp_path / "unbroken") / "last.pth") == []


def test_max_grad_norm_reaches_the_training(data, tmp_path):
    """A norm that nothing exceeds changes nothing; a small one changes the weights."""
    ends = []
    for norm in (None, "1e6", "0.1"):
        more = ["--max_grad_norm", norm] if norm else []
        argv = words(data, tmp_path / str(norm), *more, "--optimizer", "SGD", epochs=1)
        assert run(argv, tmp_path / "output") == 0
        ends.append(only_run(tmp_path / str(norm)) / "last.pth")
    without, large, small = (load_checkpoint(path)["model"] for path in ends)
    assert children.differences(without, large) == []
    assert children.differences(without, small) != []


def test_signals_are_as_before_after_a_run(data, train_script, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    argv = words(data, tmp_path, "--optimizer", "SGD", "--lr", "1e30", "--warmup_epochs", "0", epochs=1)
    assert train_script.main(argv) == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(("launched", "after"), [(False, signal.SIG_DFL), (True, signal.SIG_IGN)])
def test_under_torchrun_a_signal_does_not_silence_a_process_that_ends_badly(monkeypatch, launched, after):
    """When one process has ended, torchrun sends SIGTERM to the others: they still say why they end."""
    for name in ("RANK", "WORLD_SIZE") if launched else ():
        monkeypatch.setenv(name, "1")
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    others = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)]
    try:
        with pytest.raises(RuntimeError), StopSignals(logging.getLogger()):
            raise RuntimeError("Connection closed by peer")
        assert signal.getsignal(signal.SIGTERM) == after
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)] == others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(Stopped), StopSignals(logging.getLogger()):
            raise Stopped
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_that_nobody_foresaw_ends_at_once_with_loading_processes(data, tmp_path):
    """They used to be waited for a minute, since a SIGTERM does not end them at once."""
    output = tmp_path / "output"
    argv = words(data, tmp_path / "logs", "--num_workers", "2")
    assert run(argv, output, way=fail_unforeseen) not in (0, 2)
    assert time.time() - (tmp_path / "output.failed").stat().st_mtime < GRACE / 2
    assert "device-side assert" in output.read_text().splitlines()[-1]


def fail_unforeseen(argv, output):
    import processor.trainer

    def fail(report):
        Path(f"{output}.failed").touch()
        raise RuntimeError("CUDA error: device-side assert triggered")

    processor.trainer.total_loss = fail
    children.train_in_child(argv, output)
