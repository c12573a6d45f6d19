"""Estimates of the time left: from what was counted, at the pace since the first count; none before there is a pace."""

import pytest

from genrecal import progress
from genrecal.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which the test sets: `clock[0]`."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_said_before_there_is_a_pace(clock, capsys):
    bar = Progress("cache", 100, "samples")
    assert bar.seconds_left() is None
    clock[0] = 500  # loading, compiling
    bar.advance(10)
    assert bar.seconds_left() is None
    clock[0] = 600
    assert bar.seconds_left() is None
    assert capsys.readouterr().err == "cache: 10/100 samples\n"


def test_the_pace_leaves_out_the_start_and_what_an_earlier_run_did(clock, capsys):
    bar = Progress("cache", 1000, "samples", done=500)
    clock[0] = 300
    bar.advance(10)
    clock[0] = 340
    bar.advance(40, note="7 skipped")
    assert bar.seconds_left() == 450  # of 1,000 are 450 left, at one a second
    assert capsys.readouterr().err.splitlines()[-1] == "cache: 550/1000 samples, 1/s, 450 s left, 7 skipped"
    clock[0] = 440
    assert bar.seconds_left() == 350  # a long batch: time goes by
    clock[0] = 5000
    assert bar.seconds_left() == 0


def test_parts_count_and_the_end_is_zero(clock):
    bar = Progress("answers", 2, "samples")
    for second in range(4):
        clock[0] = second
        bar.advance(0.5)
        assert bar.seconds_left() == (None, 2, 1, 0)[second]
