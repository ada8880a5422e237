"""SIGKILL at random moments of a training; tests/kill_many.py does fifty of a demo-sized one."""

from tests.children import draw, words
from tests.kill_many import kill_many


def test_twenty_kills_change_nothing(tmp_path):
    data = draw(tmp_path)
    said = []
    kills, unreadable, differing = kill_many(
        lambda logs: words(data, logs), tmp_path, number=20, per_run=4, report=said.append
    )
    assert len(kills) == 20
    assert unreadable == [] and differing == []
    assert sum(bool(kill.left) for kill in kills if kill.moment == "saving") >= 3, said
