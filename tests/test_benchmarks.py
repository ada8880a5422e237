"""Each benchmark runs, at a size that says nothing, and its figures make a table."""

import argparse
import json
import sys
import tempfile

import pytest
import torch

from benchmarks import evaluate, gpu, harness, loader, methods, rank, report, startup, step

ONCE = ["--repeats", "1"]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """What a test measures says nothing and is not kept."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


RUNS = {
    "step": (step.main, ["--tiny", "--batch_size", "2", "--alone", *ONCE]),
    "optimiser": (step.main, ["--tiny", "--optimizer"]),
    "growth": (step.main, ["--growth", "4"]),
    "loader": (loader.main, ["--images", "4", "--batch_size", "2", *ONCE]),
    "rank": (rank.main, ["--queries", "60", "--gallery", "40", "--persons", "10", *ONCE]),
    "evaluate": (evaluate.main, ["--tiny", "--images", "6", "--captions", "8", *ONCE]),
    "methods": (methods.main, ["--tiny", "--batch_size", "2", *ONCE]),
    "startup": (startup.main, ONCE),
}


@pytest.mark.parametrize("name", RUNS)
def test_benchmark_prints_figures_that_make_a_table(name, capsys):
    main, words = RUNS[name]
    main(words)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    keys = {"figure", "arms", "machine", "versions", "command"}
    assert lines and all(keys <= line.keys() for line in lines)
    assert report.table(lines).count("|\n") >= len(lines)


def test_arms_take_turns():
    order = []
    seconds, cpu = harness.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, 1)
    assert order == ["a", "b"] * 3
    assert seconds.keys() == cpu.keys() == {"a", "b"}


def test_the_gpu_run_runs_dry_and_every_figure_is_kept_at_once(results, capsys):
    """On a CPU, in the order of their worth; the results folder of a dry run goes with it."""
    assert gpu.main(["--dry"]) == 0
    out = capsys.readouterr().out
    order = [line[3:] for line in out.splitlines() if line.startswith("== ")]
    assert order == list(gpu.PARTS) and out.splitlines()[-1] == "all parts ran"
    right = [line.split(": ")[1] for line in out.splitlines() if line.startswith("right: ")]
    assert right == list(gpu.CHECKS)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    lines = [line for line in lines if "verdict" not in line]
    figures = {line["figure"] for line in lines}
    for part in ("demo, Rank-1", "full size, loss", "one process", "--compile, graphs", "training fed"):
        assert any(figure.startswith(part) for figure in figures), part
    assert all(line["arms"] for line in lines)
    made = next(line for line in lines if line["figure"].startswith("--compile"))
    assert made["arms"]["after"] == 0
    assert report.table(lines).count("|\n") >= len(lines)


def test_a_part_that_fails_or_would_end_too_late_says_so_and_leaves_the_rest(results, monkeypatch, capsys):
    def broken(args, device, folder):
        raise ValueError("no such thing\nsecond line")

    def good(args, device, folder):
        harness.record("good", {"ours": 1.0}, "s")

    monkeypatch.setattr(gpu, "PARTS", {"broken": (broken, 1), "slow": (good, 999), "good": (good, 1)})
    args = argparse.Namespace(parts=None, minutes=9, dry=False, debug=False, here=True)
    assert gpu.run_parts(args, torch.device("cpu")) == ["broken"]
    (file,) = results.glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["figure"] for line in lines] == ["broken", "slow", "good"]
    assert lines[0]["left_out"]["ours"] == "ValueError: no such thing"
    assert "999 s" in lines[1]["left_out"]["ours"]


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("pass", 60, None),
        (f"raise SystemExit({gpu.FAILED})", 60, ""),  # it has said so itself
        ("import os; os.kill(os.getpid(), 11)", 60, "its process ended with -11"),
        ("raise RuntimeError", 60, "its process ended with 1"),
        ("import tempfile, time; tempfile.mkdtemp(); time.sleep(100)", 1, "killed after 1 s"),
    ],
)
def test_a_part_that_crashes_or_hangs_takes_and_leaves_nothing(code, seconds, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert gpu.guarded([sys.executable, "-c", code], seconds) == reason
    assert not list(tmp_path.iterdir())


def test_a_wrong_answer_is_told_as_one(results, monkeypatch, capsys):
    def wrong(device, folder, dry):
        raise AssertionError("losses are off by 0.2")

    checks = {"wrong": (wrong, 1), "right": (lambda device, folder, dry: "none seen", 1)}
    monkeypatch.setattr(gpu, "CHECKS", checks)
    monkeypatch.setattr(gpu, "PARTS", {name: (gpu.answer(name), 1) for name in checks})
    assert gpu.main(["--dry"]) == gpu.FAILED
    told = capsys.readouterr().out.splitlines()[-3:]
    assert told == [
        "right: right: none seen",
        "NOT: wrong: AssertionError: losses are off by 0.2",
        "failed: wrong",
    ]


def test_without_a_gpu_the_real_run_is_one_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA GPU")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_estimate_is_made_anywhere_and_ours_at_batch_64_is_under_7_GiB(capsys):
    assert gpu.main(["--estimate", "--batch_size", "64", "--precision", "fp16", "bf16"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    (_, _, fp16, published, ours), (_, _, bf16, none, _) = [[cell.strip() for cell in row] for row in rows]
    assert (fp16, bf16, none) == ("fp16", "bf16", "")
    assert 6 < float(ours) < 7 and 11 < float(published) < 14
