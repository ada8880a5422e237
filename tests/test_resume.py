"""A run that is stopped and resumed ends as one that never was: weights, log and best R1, bit for bit."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.build import build_dataloader
from tests.children import differ, draw, only_run, progress_lines, run, train_in_child, words
from utils.checkpoint import load_checkpoint
from utils.errors import InputError
from utils.files import lock
from utils.log import setup_logger
from utils.options import get_args
from utils.run import RunFiles

STOPPED = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """unbroken(*options): the folder of a run with these options that nothing interrupted."""
    runs = {}

    def run_of(*options):
        if options not in runs:
            logs = tmp_path_factory.mktemp("unbroken")
            assert run(words(data, logs, *options), logs / "output") == 0
            runs[options] = only_run(logs)
        return runs[options]

    return run_of


def curves(folder):
    """{tag: [(step, value), …]} as TensorBoard shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def assert_same(broken, whole):
    assert differ(broken / "last.pth", whole / "last.pth") == []
    assert differ(broken / "best.pth", whole / "best.pth") == []
    assert (broken / "best_ema.pth").exists() == (whole / "best_ema.pth").exists()
    if (whole / "best_ema.pth").exists():
        assert differ(broken / "best_ema.pth", whole / "best_ema.pth") == []
    assert progress_lines(broken) == progress_lines(whole)
    assert curves(broken) == curves(whole)


IN_A_BATCH, AT_THE_LAST_BATCH, BETWEEN_EPOCHS = (
    "Epoch[2] Iteration[4",
    "Epoch[2] Iteration[6",
    "Results - Epoch: 2",
)
MASKED_WORDS = ("--loss_names", "sdm+mlm+id")
RATE_PER_STEP = ("--lr_per", "step", "--warmup_epochs", "3", "--log_period", "1")
LEARNT = ("--learn_temperature", "--loss_names", "nitc+ritc", "--text_drop", "0.3", "--ema", "0.9")
CASES = {  # options of both runs, where the signal comes, which one, options beside --resume
    "in a batch": ((), IN_A_BATCH, signal.SIGTERM, ()),
    "in a batch, masked words": (MASKED_WORDS, IN_A_BATCH, signal.SIGINT, ()),
    "after the epoch's last batch": ((), AT_THE_LAST_BATCH, signal.SIGTERM, ()),
    "between epochs": ((), BETWEEN_EPOCHS, signal.SIGTERM, ()),
    "in a batch, Ctrl-C while two processes load": (("--num_workers", "2"), IN_A_BATCH, signal.SIGINT, ()),
    "in a batch, SIGTERM while two processes load": (("--num_workers", "2"), IN_A_BATCH, signal.SIGTERM, ()),
    "in a batch, SIGUSR1 while two processes load": (("--num_workers", "2"), IN_A_BATCH, signal.SIGUSR1, ()),
    "between epochs while two processes load": (("--num_workers", "2"), BETWEEN_EPOCHS, signal.SIGTERM, ()),
    "other loading processes afterwards": ((), IN_A_BATCH, signal.SIGTERM, ("--num_workers", "1")),
    "averaged weights": (("--ema", "0.9"), IN_A_BATCH, signal.SIGTERM, ()),
    "a rate per step": (RATE_PER_STEP, IN_A_BATCH, signal.SIGTERM, ()),
    "a rate per step, after the epoch's last batch": (RATE_PER_STEP, AT_THE_LAST_BATCH, signal.SIGTERM, ()),
    "a learnt temperature": (LEARNT, IN_A_BATCH, signal.SIGTERM, ()),
    "identity sampler": (("--sampler", "identity"), "Epoch[2] Iteration[2", signal.SIGTERM, ()),
}


@pytest.mark.parametrize("options, text, number, beside", CASES.values(), ids=CASES)
def test_a_stopped_run_ends_as_an_unbroken_one(options, text, number, beside, data, unbroken, tmp_path):
    output = tmp_path / "output"
    assert run(words(data, tmp_path, *options), output, (text, number)) == STOPPED
    said = output.read_text()
    assert said.count("finishing the batch") == 1 and "Traceback" not in said
    folder = only_run(tmp_path)
    state = torch.load(folder / "last.pth", weights_only=True)
    reached = {IN_A_BATCH: (1, 4), AT_THE_LAST_BATCH: (1, 6), BETWEEN_EPOCHS: (2, 0)}.get(text, (1, 2))
    assert (state["epoch"], state["iteration"]) == reached

    assert run(["--resume", "--output_dir", tmp_path, *beside], output) == 0
    assert only_run(tmp_path) == folder  # no second run folder
    whole = unbroken(*(option for option in options if option not in ("--num_workers", "2")))
    assert_same(folder, whole)
    if beside:
        assert "num_workers was 0 before and is 1 from here on" in (folder / "train_log.txt").read_text()


def test_a_run_may_be_stopped_again_and_again(data, unbroken, tmp_path):
    """Each time from another place, by its folder or its file, and with saves within the epoch between."""
    output = tmp_path / "output"
    begin = words(data, tmp_path, "--save_period", "1")
    assert run(begin, output, ("Epoch[1] Iteration[2", signal.SIGTERM)) == STOPPED
    folder = only_run(tmp_path)
    resume = ["--resume", "--resume_ckpt_file"]
    assert run([*resume, folder], output, ("Epoch[1] Iteration[4", signal.SIGINT)) == STOPPED
    assert run([*resume, folder / "last.pth"], output, ("Epoch[3] Iteration[6", signal.SIGINT)) == STOPPED
    assert run([*resume, folder], output) == 0
    assert_same(folder, unbroken())


def test_a_second_signal_ends_it_at_once_and_the_last_save_goes_on(data, unbroken, tmp_path):
    output = tmp_path / "output"
    twice = [(text, signal.SIGINT) for text in ("Epoch[2] Iteration[2", "finishing the batch")]
    assert run(words(data, tmp_path, "--save_period", "2"), output, *twice) == 130
    assert output.read_text().splitlines()[-1] == "interrupted"
    assert run(["--resume", "--output_dir", tmp_path], output) == 0
    whole, folder = unbroken(), only_run(tmp_path)
    assert differ(folder / "last.pth", whole / "last.pth") == []
    assert curves(folder) == curves(whole)


def signalled_without_a_checkpoint(argv, output, number):
    """The signal comes when TensorBoard's file is opened: the run has a folder, and nothing to go on with."""
    from torch.utils import tensorboard

    class Writer(tensorboard.SummaryWriter):
        def __init__(self, *words, **options):
            signal.raise_signal(number)
            super().__init__(*words, **options)

    tensorboard.SummaryWriter = Writer
    train_in_child(argv, output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_stopped_before_its_first_save_can_be_resumed(number, data, unbroken, tmp_path):
    output = tmp_path / "output"
    assert run(words(data, tmp_path), output, number, way=signalled_without_a_checkpoint) == STOPPED
    assert run(["--resume", "--output_dir", tmp_path], output) == 0
    assert_same(only_run(tmp_path), unbroken())


def test_resume_takes_the_newest_run_of_that_name(data, train_script, tmp_path, monkeypatch):
    folder = tmp_path / "CUHK-PEDES"
    for name in ("20260101_000000_a", "20260102_000000_b", "20260103_000000_a", "20260104_000000_a_b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "last.pth").touch()
    (folder / "20260105_000000_a").mkdir()  # killed before anything was saved

    def found(*argv):
        return train_script.checkpoint_to_resume(get_args(["--output_dir", str(tmp_path), *argv])).parent.name

    assert found("--resume", "--name", "a") == "20260103_000000_a"
    assert found("--resume", "--name", "b") == "20260102_000000_b"
    assert found("--resume", "--name", "a_b") == "20260104_000000_a_b"
    for named in (folder / "20260102_000000_b", folder / "20260102_000000_b" / "last.pth"):
        assert found("--resume", "--resume_ckpt_file", str(named)) == "20260102_000000_b"


@pytest.mark.parametrize("argv", [["--name", "nobody"], ["--resume_ckpt_file", "nowhere/last.pth"]])
def test_nothing_to_resume_is_one_sentence(argv, train_script, tmp_path, capsys):
    assert train_script.main(["--resume", "--output_dir", str(tmp_path), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: (nothing to resume: no run named nobody|no checkpoint at nowhere/last.pth) .*", line
    )
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_says_so_and_stays_as_it_is(unbroken, train_script, capsys):
    folder = unbroken()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert train_script.main(["--resume", "--resume_ckpt_file", str(folder)]) == 0
    assert "has all 3 epochs: nothing is left to do (best R1: " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_differing_options_are_named_and_win(data, unbroken, tmp_path):
    output = tmp_path / "output"
    assert run(words(data, tmp_path), output, (IN_A_BATCH, signal.SIGTERM)) == STOPPED
    more = ["--num_epoch", "4", "--lr", "0.002", "--log_period", "3"]
    assert run(["--resume", "--output_dir", tmp_path, *more], output) == 0
    log = (only_run(tmp_path) / "train_log.txt").read_text()
    for sentence in ("num_epoch was 3", "lr was 0.001", "log_period was 2"):
        assert sentence + " before and is " in log
    assert log.count(" before and is ") == 3
    assert "Epoch 4 done" in log and "Iteration[3/6]" in log


def test_the_best_R1_survives(data, unbroken, tmp_path):
    """A later epoch must beat the best before the stop, not just the first after it."""
    output = tmp_path / "output"
    assert run(words(data, tmp_path), output, ("Epoch[3] Iteration[2", signal.SIGTERM)) == STOPPED
    folder, whole = only_run(tmp_path), torch.load(unbroken() / "last.pth", weights_only=True)
    stopped = torch.load(folder / "last.pth", weights_only=True)
    assert stopped["best_R1"] > 0 and stopped["best_epoch"] in (1, 2)
    assert run(["--resume", "--output_dir", tmp_path], output) == 0
    last = torch.load(folder / "last.pth", weights_only=True)
    assert (last["best_R1"], last["best_epoch"]) == (whole["best_R1"], whole["best_epoch"])
    best = torch.load(folder / "best.pth", weights_only=True)
    assert best["epoch"] == whole["best_epoch"]
    assert f"best R1: {whole['best_R1']} at epoch {whole['best_epoch']}" in output.read_text()


def test_what_goes_on_from_the_best_must_beat_it(unbroken, tmp_path):
    """An epoch at a rate that spoils the weights does not."""
    folder = Path(shutil.copytree(unbroken(), tmp_path / "run"))
    whole, best = (load_checkpoint(folder / name) for name in ("last.pth", "best.pth"))
    argv = ["--resume", "--resume_ckpt_file", folder / "best.pth", "--num_epoch", best["epoch"] + 1]
    assert run([*argv, "--lr", "1", "--warmup_epochs", "0"], tmp_path / "output") == 0
    last = load_checkpoint(folder / "last.pth")
    assert last["epoch"] == best["epoch"] + 1
    assert (last["best_R1"], last["best_epoch"]) == (whole["best_R1"], best["epoch"])
    weights = load_checkpoint(folder / "best.pth")["model"]
    assert all(torch.equal(weights[name], value) for name, value in best["model"].items())


def test_an_epoch_goes_on_with_other_losses(data, tmp_path):
    """With the same weights; the averages so far are of the earlier ones."""
    argv, output = words(data, tmp_path, loss_names="sdm+itc", epochs=1), tmp_path / "output"
    assert run([*argv, "--save_period", "2"], output, ("Iteration[2", signal.SIGTERM)) == STOPPED
    more = ["--resume", "--output_dir", tmp_path, "--loss_names", "sdm"]
    assert run(more, output) == 0
    said = output.read_text().split("resumed from")[1]
    assert "sdm_loss" in said and "itc_loss" not in said


@pytest.mark.parametrize(("option", "value"), [("seed", 2), ("sampler", "identity")])
def test_an_epoch_does_not_go_on_in_another_order(option, value, data, tmp_path):
    """Some of its samples would come twice, others never."""
    assert run(words(data, tmp_path), tmp_path / "output", (IN_A_BATCH, signal.SIGTERM)) == STOPPED
    more = ["--resume", "--output_dir", tmp_path, f"--{option}", value]
    assert run(more, tmp_path / "output") == 2
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert last.startswith(f"error: --{option} {value} is not what this epoch began with")
    assert run(["--resume", "--output_dir", tmp_path, "--num_epoch", 2], tmp_path / "output") == 0
    assert run([*more, "--num_epoch", 3], tmp_path / "output") == 0


def test_keep_leaves_the_newest_numbered_checkpoints(data, tmp_path):
    assert run(words(data, tmp_path, "--keep", "2"), tmp_path / "output") == 0
    folder = only_run(tmp_path)
    assert sorted(path.name for path in folder.glob("epoch_*")) == ["epoch_002.pth", "epoch_003.pth"]
    assert differ(folder / "epoch_003.pth", folder / "last.pth") == []
    assert torch.load(folder / "epoch_002.pth", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize(
    ("epochs", "kept"), [((998, 999, 1000, 1001), {1000, 1001}), ((8, 9, 3), {3, 9}), ((8, 9, 3, 4), {3, 4})]
)
def test_the_newest_are_kept_whatever_their_numbers(epochs, kept, data, tmp_path):
    """Of more digits, or after the run has gone back to an earlier one; a copy of one's own stays."""
    run = RunFiles(get_args(words(data, tmp_path)), tmp_path)
    for name in ("last.pth", "epoch_001_mine.pth"):
        (tmp_path / name).touch()
    for epoch in epochs:
        run.keep_numbered(epoch, 2)
    run.close()
    found = {path.name for path in tmp_path.glob("epoch_*")} - {"epoch_001_mine.pth"}
    assert found == {f"epoch_{epoch:03d}.pth" for epoch in kept}
    assert (tmp_path / "epoch_001_mine.pth").exists()


def test_a_numbered_checkpoint_can_be_resumed_too(data, unbroken, tmp_path):
    output = tmp_path / "output"
    assert run(words(data, tmp_path, "--keep", "9"), output) == 0
    folder = only_run(tmp_path)
    assert run(["--resume", "--resume_ckpt_file", folder / "epoch_001.pth"], output) == 0
    whole = unbroken()
    assert differ(folder / "last.pth", whole / "last.pth") == []
    assert curves(folder) == curves(whole)  # the second writing of epochs 2 and 3 replaces the first


def test_a_moved_run_is_resumed_where_it_lies_now(data, unbroken, tmp_path):
    output = tmp_path / "output"
    assert run(words(data, tmp_path / "old"), output, (IN_A_BATCH, signal.SIGTERM)) == STOPPED
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert run(["--resume", "--output_dir", tmp_path / "new"], output) == 0
    assert_same(only_run(tmp_path / "new"), unbroken())
    assert not (tmp_path / "old").exists()


# ---- batches ----


def batch_hashes(data, epoch, start, *options):
    args = get_args([str(word) for word in words(data, "nowhere", "--loss_names", "sdm+mlm+id", *options)])
    loader = build_dataloader(args)[0]
    hashes = []
    for number in range(1, epoch + 1):  # the same loader through all epochs, as in training
        loader.set_epoch(number, start if number == epoch else 0)
        for batch in loader:
            digest = hashlib.sha256()
            for key in sorted(batch):
                digest.update(key.encode() + batch[key].numpy().tobytes())
            hashes.append((number, digest.hexdigest()))
    return [digest for number, digest in hashes if number == epoch]


@pytest.mark.parametrize("sampler", ["random", "identity"])
def test_batches_do_not_depend_on_loading_processes_or_on_a_stop(sampler, data):
    options = ("--sampler", sampler)
    whole = batch_hashes(data, 2, 0, *options)
    assert len(set(whole)) == len(whole) >= 4
    assert whole != batch_hashes(data, 1, 0, *options)
    for workers in ("1", "3"):
        assert batch_hashes(data, 2, 0, *options, "--num_workers", workers) == whole
    for workers in ("0", "3"):
        assert batch_hashes(data, 2, 3, *options, "--num_workers", workers) == whole[3:]


# ---- what may fail comes after the saving ----


def test_an_evaluation_that_fails_costs_no_epoch(data, tmp_path):
    """A test image cannot be read; once it can, the run evaluates epoch 1 and ends as one unbroken."""
    argv, output = words(data, tmp_path / "logs", epochs=2), tmp_path / "output"
    broken = shutil.copytree(data, tmp_path / "copy")
    records = json.loads((broken / "CUHK-PEDES" / "reid_raw.json").read_text())
    image = broken / "CUHK-PEDES" / "imgs" / next(r["file_path"] for r in records if r["split"] == "test")
    whole = image.read_bytes()
    image.write_bytes(whole[:50])
    assert run([*argv, "--root_dir", broken], output) == 2  # epoch 1 is trained and saved
    folder = only_run(tmp_path / "logs")
    last = load_checkpoint(folder / "last.pth")
    assert (last["epoch"], last["to_evaluate"]) == (1, True) and not (folder / "best.pth").exists()
    image.write_bytes(whole)
    assert run(["--resume", "--output_dir", tmp_path / "logs"], output) == 0
    said = output.read_text()
    assert "Epoch[1] Iteration" not in said.split("resumed from")[-1]  # it is not trained again
    assert said.count("Validation Results - Epoch: 1") == 2  # the one that failed, and its repetition
    assert run(words(data, tmp_path / "unbroken", epochs=2), output) == 0
    assert differ(folder / "last.pth", only_run(tmp_path / "unbroken") / "last.pth") == []
    assert differ(folder / "best.pth", only_run(tmp_path / "unbroken") / "best.pth") == []


def test_the_last_evaluation_too_is_made_up_for(data, tmp_path):
    """The checkpoint has all epochs, and still something is left to do."""
    assert run(words(data, tmp_path, epochs=1), tmp_path / "output") == 0
    folder = only_run(tmp_path)
    last = load_checkpoint(folder / "last.pth")
    torch.save({**last, "to_evaluate": True, "best_R1": -1.0, "best_epoch": 0}, folder / "last.pth")
    (folder / "best.pth").unlink()
    assert run(["--resume", "--output_dir", tmp_path], tmp_path / "output") == 0
    again = load_checkpoint(folder / "last.pth")
    assert again["best_epoch"] == 1 and again["to_evaluate"] is False and (folder / "best.pth").exists()


@pytest.mark.parametrize(("epochs", "evaluated"), [(2, [2]), (3, [3]), (4, [3])])
def test_a_run_shorter_than_its_evaluation_period_is_evaluated_at_its_end(epochs, evaluated, data, tmp_path):
    argv = words(data, tmp_path, "--eval_period", "3", epochs=epochs)
    assert run(argv, tmp_path / "output") == 0
    said = (tmp_path / "output").read_text()
    assert [e for e in range(1, 5) if f"Validation Results - Epoch: {e}" in said] == evaluated
    assert (only_run(tmp_path) / "best.pth").exists() and "-1.0 at epoch 0" not in said


@pytest.mark.parametrize("size", [4, 8, 12, 48])
def test_an_epoch_and_its_rate_per_step_go_on_with_what_is_left_whatever_the_batch(size, data, tmp_path):
    """48 captions, 12 done or more in batches of 4: of each step the rate of the share that is done."""
    options = "--batch_size 4 --log_period 1 --lr_per step --warmup_epochs 2 --save_period 3".split()
    argv, cue = words(data, tmp_path, *options, epochs=1), ("Iteration[3/12]", signal.SIGTERM)
    assert run(argv, tmp_path / "output", cue) == STOPPED
    folder = only_run(tmp_path)
    last = load_checkpoint(folder / "last.pth")
    done = last["samples"]
    assert done == 4 * last["iteration"] < 48
    resume = ["--resume", "--output_dir", tmp_path, "--batch_size", size, "--log_period", 1]
    assert run(resume, tmp_path / "more") == 0

    def rates(samples):
        return [pytest.approx(1e-3 * (0.1 + 0.9 * one / 48 / 2), rel=1e-2) for one in samples]

    for output, samples in (("output", range(0, done, 4)), ("more", range(done, 48, size))):
        said = re.findall(r"Epoch\[1\] Iteration\[.*Base Lr: (\S+)", (tmp_path / output).read_text())
        assert [float(rate) for rate in said] == rates(samples) and len(said) == len(samples) > 0
    ((_, shown),) = curves(folder)["lr"]
    assert [shown] == rates([range(done, 48, size)[-1]])


# ---- two at once ----


def test_runs_begun_in_one_second_each_get_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form, *when: f"20261124_1015{int(time.time() * 2) % 60:02d}")
    args, folders = get_args(words(data, tmp_path)), []
    runs = [RunFiles(args) for _ in range(3)]  # named before any is made
    for one in runs:
        one.open(setup_logger("IRRA"))
        folders.append(one.folder)
        assert yaml.safe_load((one.folder / "configs.yaml").read_text())["output_dir"] == str(one.folder)
        one.close()
    assert len(set(folders)) == 3 and all((folder / "configs.yaml").is_file() for folder in folders)


def test_a_run_that_another_program_trains_is_not_trained_twice(data, tmp_path):
    args = get_args(words(data, tmp_path))
    first = RunFiles(args)
    first.open(setup_logger("IRRA"))
    with pytest.raises(InputError, match="another program is training the run in"):
        RunFiles(args, first.folder)
    first.close()
    RunFiles(args, first.folder).close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_locks_is_not_another_program(number, tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "file", "w") as file:
        assert lock(file) and lock(file, wait=True)
