"""N processes give what one gives, and stand what happens to processes: on a CPU, over loopback."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.distributed as dist

from tests import processes
from tests.children import ROOT, differ, draw, only_run, words
from tests.conftest import PATIENCE
from tests.processes import Group, together, torchrun
from tests.recipe import off
from utils.dist import share
from utils.errors import InputError, say_once
from utils.options import get_args
from utils.process_group import process_group
from utils.signals import StopSignals

ALL_LOSSES = "sdm+itc+cmpm+id+mlm"
SAMPLERS = ("random", "identity")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """43 training captions of 11 persons: of the last batch of 8, with 3, one of 4 processes gets none."""
    root = draw(tmp_path_factory.mktemp("drawn"), train_ids=11)
    annotation = root / "CUHK-PEDES" / "reid_raw.json"
    records = json.loads(annotation.read_text())
    last = [record for record in records if record["split"] == "train"][-1]
    last["captions"] = last["captions"][:1]
    annotation.write_text(json.dumps(records))
    return root


def arguments(data, sampler="random", *more, loss_names=ALL_LOSSES):
    return words(data, data.parent / "logs", "--sampler", sampler, *more, loss_names=loss_names)


# ---- training ----


@pytest.fixture(scope="module")
def trained(data):
    """trained(number)[sampler]: what each of so many processes reports of two epochs, at least 10 steps."""
    argvs = [arguments(data, sampler) for sampler in SAMPLERS]

    @functools.cache
    def by(number):
        return dict(
            zip(SAMPLERS, zip(*together(number, processes.train_each, argvs, 2), strict=True), strict=True)
        )

    return by


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("number", [2, 4])
def test_many_processes_train_as_one(number, sampler, trained):
    (one,) = trained(1)[sampler]
    assert len(one["reports"]) >= 10
    assert_same_training(trained(number)[sampler], one)
    assert any(0 in each["sizes"] for each in trained(number)[sampler]) == (
        number == 4 and sampler == "random"
    )


def assert_same_training(many, one, tolerance=1e-5):
    for each in many:
        assert len(each["reports"]) == len(one["reports"])
        for found, expected in zip(each["reports"], one["reports"], strict=True):
            assert list(found) == list(expected)
            for name, value in expected.items():
                assert abs(found[name] - value) <= tolerance * abs(value), name
    moved = 0
    for name, expected in one["weights"].items():
        for each in many:
            assert (each["weights"][name] - expected).abs().max() < 1e-5, name
        assert all(torch.equal(each["weights"][name], many[0]["weights"][name]) for each in many), name
        moved = max(moved, float((expected - one["start"][name]).abs().max()))
    assert moved > 5e-4  # the tolerance is small beside what the training did


def test_a_group_of_one_trains_as_a_process_without_a_group_bit_for_bit(data, trained):
    (grouped,) = together(1, processes.train_some, arguments(data), 2, grouped=True)
    (plain,) = trained(1)["random"]
    assert grouped["reports"] == plain["reports"]
    for name, value in plain["weights"].items():
        assert torch.equal(grouped["weights"][name], value), name


def test_the_processes_share_the_very_batches_of_one(data):
    argvs = [arguments(data, sampler) for sampler in SAMPLERS]
    (wholes,) = together(1, processes.batches_of, argvs, 3)
    for number, start in ((2, 0), (4, 3)):  # also where an interrupted run goes on
        found = together(number, processes.batches_of, argvs, 3, start)
        for whole, shares in zip(wholes, zip(*found, strict=True), strict=True):
            assert len(shares[0]) == len(whole) - start
            for batch, parts in zip(whole[start:], zip(*shares, strict=True), strict=True):
                size = len(batch["pids"])
                assert {part["batch_size"] for part in parts} == {size}
                expected = [len(range(size)[share(size, number, part)]) for part in range(number)]
                assert [len(part["pids"]) for part in parts] == expected
                for key, value in batch.items():
                    assert torch.equal(torch.cat([part[key] for part in parts]), value), key


@pytest.mark.parametrize("sizes", [[2, 3], [3, 0, 2]], ids=str)
def test_gradients_through_gather_and_total_are_those_of_one_process(sizes):
    values = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ((loss, rows, weight),) = together(1, processes.gradients, [5], values)
    many = together(len(sizes), processes.gradients, sizes, values)
    assert torch.cat([found[1] for found in many]).allclose(rows, rtol=1e-12)
    for found in many:
        assert found[0].allclose(loss, rtol=1e-12) and found[2].allclose(weight, rtol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 5, 64])
def test_shares_are_disjoint_complete_and_even(size, parts):
    rows = [list(range(size)[share(size, parts, part)]) for part in range(parts)]
    assert [row for part in rows for row in part] == list(range(size))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused_in_one_sentence(data, tmp_path):
    argv = words(data, tmp_path, "--batch_size", "9")
    group = Group(2, processes.main_of, "train", argv)
    assert group.end() == [2, 2]
    (line,) = [line for line in group.said().splitlines() if "error" in line]
    assert "--batch_size 9" in line and "2 processes" in line and "multiple of 2" in line
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_read_may_leave_a_process_without_a_sample(data, tmp_path):
    """… or all of them: --on_bad_image skip, with most of the images damaged."""
    records = json.loads((data / "CUHK-PEDES" / "reid_raw.json").read_text())
    root = tmp_path / "data" / "CUHK-PEDES"
    images = [record["file_path"] for record in records if record["split"] == "train"]
    for record in records:
        target = root / "imgs" / record["file_path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        good = record["file_path"] not in images[4:]
        content = (data / "CUHK-PEDES" / "imgs" / record["file_path"]).read_bytes()
        target.write_bytes(content if good else b"no image")
    (root / "reid_raw.json").write_text(json.dumps(records))
    argv = arguments(tmp_path / "data", "random", "--on_bad_image", "skip", "--batch_size", "20")
    one, many = (together(n, processes.train_some, argv, 1) for n in (1, 4))
    totals = [sum(shares) for shares in zip(*(each["sizes"] for each in many), strict=True)]
    assert totals == one[0]["sizes"]
    assert totals[0] and not totals[-1] and any(each["sizes"][0] == 0 for each in many)
    assert_same_training(many, one[0])


# ---- evaluation ----


@pytest.mark.parametrize("number", [3, 9])
def test_evaluation_in_many_processes_gives_the_figures_of_one(number, data):
    """16 captions and 8 images: uneven shares for 3 processes; of 9 one gets no image."""
    argv = arguments(data, "random", "--batch_size", str(2 * number), loss_names="sdm")
    (((rows, ranking), features),) = together(1, processes.evaluate_split, argv)
    assert set(rows) == {"t2i", "i2t"} and len(features.text) == 16 and len(features.image) == 8
    for (found_rows, found), found_features in together(number, processes.evaluate_split, argv):
        assert found_rows == rows  # every bit of every figure
        assert torch.equal(found.indices, ranking.indices)
        assert torch.equal(found.cmc, ranking.cmc)
        assert (found.unmatched, found.tied) == (ranking.unmatched, ranking.tied)
        assert torch.equal(found_features.text_pids, features.text_pids)
        assert off(found_features.text, features.text) < 1e-5
        assert off(found_features.image, features.image) < 1e-5


def test_a_run_of_two_processes_is_written_and_told_by_one(data, tmp_path):
    """train.py, then test.py: one folder, one log, one event file, and the table of one process."""
    group = Group(2, processes.main_of, "train", words(data, tmp_path / "logs", "--image_cache", tmp_path))
    assert group.end() == [0, 0], group.said()
    run = only_run(tmp_path / "logs")
    names = sorted(path.name for path in run.iterdir())
    assert len(names) == 5 and names[-1] == "train_log.txt" and names[:2] == ["best.pth", "configs.yaml"]
    assert [path.name for path in tmp_path.glob("*.pixels")] == ["CUHK-PEDES_64x32.pixels"]
    assert not list(tmp_path.glob(".*"))
    log = (run / "train_log.txt").read_text()
    assert group.said(0) == log and group.said(1) == ""
    assert log.count("Epoch[1] Iteration[2/6]") == log.count("Validation Results - Epoch: 1") == 1

    argv = ["--config_file", run, "--device", "cpu", "--i2t"]
    one, many = Group(1, processes.main_of, "test", argv), None
    one.results()
    written = (run / "results.json").read_bytes()
    (run / "results.json").unlink()
    many = Group(3, processes.main_of, "test", argv)
    many.results()
    assert (run / "results.json").read_bytes() == written
    assert many.said(1) == many.said(2) == ""

    def table(text):
        return [line for line in text.splitlines() if line.startswith(("| t2i", "| i2t"))]

    assert table(many.said(0)) == table(one.said()) and len(table(one.said())) == 2
    assert sorted(path.name for path in run.iterdir()) == sorted([*names, "results.json", "test_log.txt"])


@pytest.mark.parametrize("more", [(), ("--micro_batch", "2")], ids=["whole", "in parts"])
def test_two_processes_average_the_weights_of_one(more, data, tmp_path):
    """--ema, by train.py: but for rounding the main process keeps the average that one process keeps."""
    kept = []
    for number in (1, 2):
        logs = tmp_path / str(number)
        argv = words(data, logs, "--ema", "0.8", *more, epochs=1)
        group = Group(number, processes.main_of, "train", argv)
        assert group.end() == [0] * number, group.said()
        kept.append(torch.load(only_run(logs) / "last.pth", weights_only=True))
        assert (only_run(logs) / "best_ema.pth").exists()
    one, two = kept
    for name, average in one["ema"].items():
        assert (average - two["ema"][name]).abs().max() < 1e-6, name
    assert max(off(two["ema"][name], weight) for name, weight in two["model"].items()) > 1e-4


# ---- what happens to processes ----


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The folder of a run of two processes that nothing happened to."""
    logs = tmp_path_factory.mktemp("undisturbed")
    group = Group(2, processes.main_of, "train", words(data, logs))
    assert group.end() == [0, 0], group.said()
    return only_run(logs)


def test_torchrun_restarts_a_run_one_of_whose_processes_was_killed(data, undisturbed, tmp_path):
    """… by itself, from last.pth, with the same result bit for bit."""
    output = tmp_path / "output"
    happens = "kill the other", "Epoch[2] Iteration[4/6]"
    argv = words(data, tmp_path / "logs")
    assert torchrun(2, output, *happens, *argv, options=["--max_restarts=1"]) == 0, output.read_text()
    run = only_run(tmp_path / "logs")  # the same folder
    assert differ(run / "last.pth", undisturbed / "last.pth") == []
    assert differ(run / "best.pth", undisturbed / "best.pth") == []
    said = output.read_text()
    assert len(errors(said)) == 1 and "Traceback" not in said
    assert f"resumed from {run.absolute() / 'last.pth'}: 1 epochs" in said


def errors(said):
    """Our sentences: torchrun says things of its own, also when a thread of its aborts as it ends."""
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_torchrun_passes_a_sigterm_on_and_one_process_takes_the_run_up(data, undisturbed, tmp_path):
    """Pre-emption: saved where it comes, then resumed on another number of processes."""
    output = tmp_path / "output"
    happens = "stop torchrun", "Epoch[1] Iteration[2/6]"
    assert torchrun(2, output, *happens, *words(data, tmp_path / "logs")) != 0  # torchrun's own status
    said, run = output.read_text(), only_run(tmp_path / "logs")
    assert said.count("finishing the batch") == 1 and "stopped in epoch 1 after iteration" in said, said
    assert errors(said) == []
    state = torch.load(run / "last.pth", weights_only=True)
    assert state["epoch"] == 0 and 2 <= state["iteration"] < 6

    Group(1, processes.main_of, "train", ["--resume", "--resume_ckpt_file", run]).results()
    assert_same_result(run, undisturbed)


def assert_same_result(run, other):
    one, two = (torch.load(folder / "last.pth", weights_only=True) for folder in (run, other))
    assert (one["epoch"], one["iteration"]) == (two["epoch"], two["iteration"]) == (3, 0)
    assert (one["best_R1"], one["best_epoch"]) == (two["best_R1"], two["best_epoch"])
    for name, value in one["model"].items():
        assert (value - two["model"][name]).abs().max() < 1e-5, name


def test_what_one_process_began_two_go_on_with(data, undisturbed, tmp_path):
    argv = words(data, tmp_path)
    stopped = Group(1, processes.main_of, "train", argv, "Epoch[2] Iteration[4/6]")
    assert stopped.end() == [3], stopped.said()
    run = only_run(tmp_path)
    assert torch.load(run / "last.pth", weights_only=True)["iteration"] == 4
    together(2, processes.main_of, "train", ["--resume", "--resume_ckpt_file", run])
    assert_same_result(run, undisturbed)


def test_a_signal_to_one_process_stops_all_after_the_same_step(data, undisturbed, tmp_path):
    argv = words(data, tmp_path)
    stopped = Group(2, processes.main_of, "train", argv, "Epoch[2] Iteration[4/6]")
    assert stopped.end() == [3, 3] and stopped.said(1) == ""
    run = only_run(tmp_path)
    assert torch.load(run / "last.pth", weights_only=True)["iteration"] == 4
    together(2, processes.main_of, "train", ["--resume", "--resume_ckpt_file", run])
    assert differ(run / "last.pth", undisturbed / "last.pth") == []


def test_processes_that_meet_a_loss_that_is_no_number_describe_the_whole_batch(data, tmp_path):
    argv = words(data, tmp_path, "--optimizer", "SGD", "--lr", "1e30", "--warmup_epochs", "0")
    group = Group(2, processes.main_of, "train", argv)
    assert group.end() == [2, 2], group.said()
    assert group.said().count("error: loss or gradient is no longer a number in epoch 1, iteration") == 1
    evidence = json.loads((only_run(tmp_path) / "bad_batch.json").read_text())
    ((batches,),) = together(1, processes.batches_of, [argv], 1)
    batch = batches[evidence["iteration"] - 1]
    for key in ("pids", "image_ids", "caption_ids"):
        assert evidence[key] == batch[key].tolist()


def test_when_the_main_process_is_killed_the_others_end_with_one_sentence(data, tmp_path):
    argv = words(data, tmp_path, "--batch_size", "6")
    group = Group(3, processes.main_of, "train", argv, "Epoch[1] Iteration[2/8]", signal.SIGKILL)
    assert group.end() == [-signal.SIGKILL, 2, 2]
    lines = [line for line in group.said().splitlines() if " IRRA" not in line and line[:1] not in "|+"]
    assert len([line for line in lines if line.startswith("error: one of the 3 processes has ended")]) == 1
    assert "Traceback" not in group.said()


def test_the_name_of_a_start_is_never_taken_from_an_earlier_one():
    from utils.process_group import _name_of_this_start

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("hello 1", "one that has ended")  # it never read its welcome
    names = []

    def start(number):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        names.append(_name_of_this_start(client, number, 3))

    for _ in range(3):
        threads = [threading.Thread(target=start, args=(number,)) for number in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(set(names[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1] and len(set(names)) == 3


@pytest.mark.parametrize("kind", ["plain", "from None", "in another's handling", "leaves silently"])
def test_an_error_on_its_way_out_lets_go_of_the_replicas(kind):
    """… before the group ends; else its end may wait for ever."""
    from utils.process_group import _let_go_of_replicas

    class Replica:
        pass

    alive = []

    def fit():
        replica = Replica()
        alive.append(weakref.ref(replica))
        raise InputError("at work")

    def work():
        try:
            fit()
        except InputError as error:
            if kind == "plain":
                raise
            if kind == "leaves silently":
                raise SystemExit(2) from None
            raise InputError("said anew") from (None if kind == "from None" else error)

    try:
        work()
    except (InputError, SystemExit):
        _let_go_of_replicas()
        assert alive[0]() is None


def test_a_signal_that_comes_twice_under_torchrun_still_lets_the_run_save(monkeypatch, caplog):
    import logging

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with StopSignals(logging.getLogger("test")) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.asked


def test_a_process_that_waits_for_others_in_vain_says_so_and_heeds_an_interrupt(closed_port):
    """RANK and WORLD_SIZE may be left over from another program."""
    code = "import torch; from utils import process_group as group; group.PATIENCE = 0.1; "
    code += "group.process_group(torch.device('cpu')).__enter__()"
    left_over = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(closed_port))
    command, output = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stderr=output, text=True, cwd=ROOT, env=os.environ | left_over) as waiting:
        said = next(line for line in waiting.stderr if line.startswith("warning: "))
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(PATIENCE) == -signal.SIGINT
    assert "waits for the others of 2 at 127.0.0.1; where it is to be alone, unset both" in said


def test_a_launcher_that_does_not_say_where_the_others_are_is_one_sentence(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR expected.*, or unset RANK and WORLD_SIZE"):
        with process_group(torch.device("cpu")):
            pass


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize(("copies", "told"), [("1", 0), ("4", 1)])
def test_copies_that_do_not_share_their_work_are_told_so(name, copies, told, monkeypatch, capsys):
    say_once.cache_clear()
    monkeypatch.setenv(name, copies)
    with process_group(torch.device("cpu")):
        pass
    assert capsys.readouterr().err.count(f"started {copies} of this program") == told


def test_the_slurm_script_starts_torchrun_and_train_with_options_they_know(tmp_path, monkeypatch):
    """With an srun that only says what it was given; a requeued job finds its run."""
    from torch.distributed.run import get_args_parser

    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo node0; echo node1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    here = os.path.dirname(sys.executable)  # its torchrun says which options it knows
    monkeypatch.setenv("PATH", f"{tmp_path}:{here}:{os.environ['PATH']}")
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **job, "SLURM_GPUS_ON_NODE": "4", "IRRA_LOGS": str(tmp_path / "logs")}

    def started():
        command = ["bash", ROOT / "configs" / "slurm.sh", "--root_dir", "/data"]
        found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        assert (
            re.search(r'(?<!\+)"\$\{\w+\[@\]\}"', command[1].read_text()) is None
        )  # bash 4.2 has no empty list
        own, words = found.stdout.splitlines()[0], found.stdout.splitlines()[1:]
        assert own == "--kill-on-bad-exit=1" and words[0] == "torchrun"
        launch = get_args_parser().parse_args(words[1:])
        assert (launch.nnodes, launch.nproc_per_node, launch.max_restarts) == ("2", "4", 3)
        assert getattr(launch, "shutdown_timeout", 120) == 120  # PyTorch 2.6 has no such option
        assert launch.rdzv_endpoint == "node0:29500" and launch.training_script == "train.py"
        return get_args(launch.training_script_args)

    args = started()
    assert (args.name, args.root_dir, args.batch_size, args.resume) == ("job12", "/data", 64, False)
    another = tmp_path / "logs" / "CUHK-PEDES" / "20261124_101400_my_job12" / "last.pth"
    another.parent.mkdir(parents=True)
    another.touch()
    assert not started().resume
    checkpoint = tmp_path / "logs" / "CUHK-PEDES" / "20261124_101500_job12" / "last.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert started().resume
