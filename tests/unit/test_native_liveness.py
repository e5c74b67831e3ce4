"""Alive, suspect or dead: judged on manual time, at the pace the connection asks for."""

import itertools

import pytest

from stator.errors import ConfigError
from stator.protocol.native.liveness import CLIENT_LIMITS, WORKER_LIMITS, Liveness, LivenessLimits, Verdict

DEAD_AFTER = pytest.approx(2.65, abs=0.26)
"""2.5 s, and at most 0.1 s for each of the four looks in between"""


class Watched:
    """A liveness and its clock; `run` looks as often as `look_again` asks."""

    def __init__(self, limits: LivenessLimits = CLIENT_LIMITS, *, streams: int = 1) -> None:
        self.now = 1000.0
        self.streams = streams
        self.liveness = Liveness(limits, self.now)
        self.pulse = False
        """whether the pulse answers each look that asks for it"""

    def run(self, seconds: float) -> list[tuple[float, Verdict]]:
        """The verdicts of the next `seconds` other than FINE, with the time since the start of this run."""
        start, end = self.now, self.now + seconds
        verdicts: list[tuple[float, Verdict]] = []
        while (after := self.now + self.liveness.look_again(self.streams)) <= end + 1e-9:
            self.now = after
            verdict = self.liveness.judge(self.now, streams=self.streams)
            if verdict is not Verdict.FINE:
                verdicts.append((round(self.now - start, 2), verdict))
            if verdict is Verdict.SUSPECT and self.pulse:
                self.liveness.pulse(self.now)
            if verdict in (Verdict.DEAD, Verdict.IDLE):
                break
        self.now = max(self.now, end)
        return verdicts

    def first(self, verdicts: list[tuple[float, Verdict]], wanted: Verdict) -> float:
        return next(at for at, verdict in verdicts if verdict is wanted)


def test_silence_is_asked_then_suspected_then_dead() -> None:
    watched = Watched()
    verdicts = watched.run(10)
    assert watched.first(verdicts, Verdict.PING) == pytest.approx(1.0, abs=0.11)
    assert watched.first(verdicts, Verdict.SUSPECT) == pytest.approx(2.0, abs=0.11)
    assert watched.first(verdicts, Verdict.DEAD) == DEAD_AFTER
    assert [verdict for _, verdict in verdicts].count(Verdict.PING) == 1


def test_talk_is_never_asked() -> None:
    watched = Watched()
    for _ in range(100):
        assert watched.run(0.5) == []
        assert watched.liveness.heard(watched.now) is False


def test_an_answer_in_time_ends_the_question() -> None:
    watched = Watched()
    assert [verdict for _, verdict in watched.run(1.5)] == [Verdict.PING]
    assert watched.liveness.heard(watched.now) is False
    assert watched.first(watched.run(10), Verdict.DEAD) == DEAD_AFTER


def test_a_pulse_keeps_a_blocked_process_alive_and_suspect() -> None:
    watched = Watched()
    watched.pulse = True
    verdicts = watched.run(60)
    assert {verdict for _, verdict in verdicts} == {Verdict.PING, Verdict.SUSPECT}
    assert watched.liveness.suspect
    asked = [at for at, verdict in verdicts if verdict is Verdict.SUSPECT]
    assert max(later - at for at, later in itertools.pairwise(asked)) <= 0.21


def test_it_dies_half_a_second_after_its_pulse() -> None:
    watched = Watched()
    watched.pulse = True
    watched.run(20)
    watched.pulse = False
    assert watched.first(watched.run(10), Verdict.DEAD) == pytest.approx(0.5, abs=0.11)


def test_hearing_ends_a_suspicion_once() -> None:
    watched = Watched()
    watched.pulse = True
    watched.run(5)
    assert watched.liveness.heard(watched.now) is True
    assert not watched.liveness.suspect
    assert watched.liveness.heard(watched.now) is False


def test_a_suspicion_outlives_its_streams() -> None:
    watched = Watched()
    watched.pulse = True
    watched.run(3)
    watched.streams = 0
    watched.run(3)
    assert watched.liveness.suspect
    assert watched.liveness.heard(watched.now) is True


def test_an_unanswered_question_ends_an_idle_connection_too() -> None:
    watched = Watched()
    watched.pulse = True
    watched.run(3)
    watched.streams = 0
    assert watched.first(watched.run(60), Verdict.DEAD) == pytest.approx(20 - 2, abs=1.1)


@pytest.mark.parametrize("away", [1.1, 2.6, 60.0, 3600.0])
def test_being_away_ourselves_declares_nobody_dead(away: float) -> None:
    watched = Watched()
    watched.run(0.9)
    watched.now += away
    assert watched.liveness.judge(watched.now, streams=1) is Verdict.FINE
    verdicts = watched.run(10)
    assert watched.first(verdicts, Verdict.PING) == pytest.approx(1.0, abs=0.11)
    assert watched.first(verdicts, Verdict.DEAD) == DEAD_AFTER


def test_being_away_while_a_question_is_open_starts_anew() -> None:
    watched = Watched()
    watched.run(2.2)
    watched.now += 5
    assert watched.liveness.judge(watched.now, streams=1) is Verdict.FINE
    assert watched.first(watched.run(10), Verdict.DEAD) == DEAD_AFTER


def test_idle_connections_are_pinged_and_closed() -> None:
    watched = Watched(streams=0)
    pings = 0
    seconds = 0.0
    while True:
        verdicts = watched.run(1)
        seconds += 1
        for _, verdict in verdicts:
            if verdict is Verdict.PING:
                pings += 1
                watched.liveness.heard(watched.now)  # PONG
        if (verdicts and verdicts[-1][1] is Verdict.IDLE) or seconds > 300:
            break
    assert seconds == pytest.approx(120, abs=1.5)
    assert pings == 5


def test_an_idle_ping_without_answer_ends_the_connection() -> None:
    watched = Watched(streams=0)
    verdicts = watched.run(200)
    assert watched.first(verdicts, Verdict.PING) == pytest.approx(20, abs=1.1)
    assert watched.first(verdicts, Verdict.DEAD) == pytest.approx(40, abs=1.1)


def test_an_unanswered_idle_ping_gives_the_pulse_its_time() -> None:
    watched = Watched(streams=0)
    watched.run(35)  # asked at 20 s, unanswered since
    watched.streams = 1
    watched.pulse = True
    verdicts = watched.run(5)
    assert {verdict for _, verdict in verdicts} == {Verdict.SUSPECT}
    watched.pulse = False
    assert watched.first(watched.run(5), Verdict.DEAD) == pytest.approx(0.5, abs=0.11)


def test_streams_that_come_and_go_do_not_hide_a_dead_process() -> None:
    watched = Watched()
    died = None
    for round in range(10):
        watched.streams = 1
        verdicts = watched.run(0.8)
        if verdicts and verdicts[-1][1] is Verdict.DEAD:
            died = round
            break
        watched.streams = 0
        watched.now += 0.05
        watched.liveness.judge(watched.now, streams=0)
    assert died is not None and died <= 3


def test_work_keeps_the_idle_clock_from_starting() -> None:
    watched = Watched(streams=1)
    for _ in range(200):
        watched.run(1)
        watched.liveness.heard(watched.now)
    watched.streams = 0
    verdicts = watched.run(100)
    assert Verdict.IDLE not in [verdict for _, verdict in verdicts]


def test_the_worker_is_patient() -> None:
    watched = Watched(WORKER_LIMITS)
    verdicts = watched.run(100)
    assert watched.first(verdicts, Verdict.PING) == pytest.approx(10, abs=0.11)
    assert watched.first(verdicts, Verdict.DEAD) == pytest.approx(30, abs=0.3)
    assert WORKER_LIMITS.idle_close > CLIENT_LIMITS.idle_close


@pytest.mark.parametrize("silence", [0.5, 1.0, 30.0])
def test_looks_are_never_so_rare_that_they_seem_an_absence(silence: float) -> None:
    liveness = Liveness(LivenessLimits(silence=silence, answer=1, dead=silence + 2), 0.0)
    wheel = 0.2  # a wheel asks up to two of its resolutions late
    for streams in (0, 1):
        assert 0 < liveness.look_again(streams) + wheel < silence


@pytest.mark.parametrize(
    "wrong", [{"silence": 0}, {"silence": 2}, {"answer": 0}, {"dead": 2.0}, {"silence": -1, "answer": 1, "dead": 1}]
)
def test_limits_that_cannot_be_kept_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="silence \\+ answer < dead"):
        LivenessLimits(**wrong)
