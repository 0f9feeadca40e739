"""What is said of long work: each step with its time, where that is news, and nothing to who asked for quiet."""

from __future__ import annotations

import pytest

from lmfx.environment.effort import StageClock
from lmfx.environment.progress import duration, step


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("lmfx.environment.progress.time", made)
    return made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (2.34, "2.3 s"), (41.2, "41 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"),
     (3599.7, "1 h 0 min"), (3725, "1 h 2 min")],
)  # fmt: skip
def test_seconds_are_said_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "said"), [(0.9, "fitting ...\n"), (12.0, "fitting ...\n  12 s\n")])
def test_a_step_says_how_long_it_took_where_that_is_news(
    seconds: float, said: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with step("fitting"):
        clock.now += seconds
    assert capsys.readouterr() == ("", said)


def test_a_step_that_fails_says_nothing_of_its_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="on the way"), step("fitting"):
        clock.now += 12
        raise ValueError("on the way")
    assert capsys.readouterr().err == "fitting ...\n"


def test_who_asks_for_quiet_hears_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with step("fitting", enabled=False):
        clock.now += 12
    with StageClock(say=False).stage("fit", "fitting"):
        clock.now += 12
    assert capsys.readouterr() == ("", "")


def test_of_stages_those_with_a_text_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    clock = StageClock(say=True)
    with clock.stage("trace"):
        pass
    with clock.stage("fit", "fitting a plan"):
        pass
    assert capsys.readouterr().err == "fitting a plan ...\n"
    assert list(clock.spent) == ["trace", "fit"]
