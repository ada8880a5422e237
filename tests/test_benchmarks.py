"""Each benchmark runs, at a size that says nothing, and its figures make a table."""

import json

import pytest

from benchmarks import evaluate, harness, loader, rank, report, startup, step

ONCE = ["--repeats", "1"]
RUNS = {
    "step": (step.main, ["--tiny", "--batch_size", "2", "--alone", *ONCE]),
    "optimiser": (step.main, ["--tiny", "--optimizer"]),
    "growth": (step.main, ["--growth", "4"]),
    "loader": (loader.main, ["--images", "4", "--batch_size", "2", *ONCE]),
    "rank": (rank.main, ["--queries", "60", "--gallery", "40", "--persons", "10", *ONCE]),
    "evaluate": (evaluate.main, ["--tiny", "--images", "6", "--captions", "8", *ONCE]),
    "startup": (startup.main, ONCE),
}


@pytest.mark.parametrize("name", RUNS)
def test_benchmark_prints_figures_that_make_a_table(name, capsys):
    main, words = RUNS[name]
    main(words)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines and all(
        {"figure", "arms", "machine", "versions", "command"} <= line.keys() for line in lines
    )
    assert report.table(lines).count("|\n") >= len(lines)


def test_arms_take_turns():
    order = []
    seconds, cpu = harness.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, 1)
    assert order == ["a", "b"] * 3
    assert seconds.keys() == cpu.keys() == {"a", "b"}
