"""Many simulated workers under load in virtual time: an hour in seconds, and the same every time."""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Protocol

from blake3 import blake3

from stator.errors import UsageError
from stator.mocker.blocks import Stored
from stator.mocker.options import MockerOptions
from stator.mocker.report import RequestTimes, Simulation, WorkerUsage
from stator.mocker.scheduler import Scheduler
from stator.mocker.sequence import Phase
from stator.mocker.sequence import Sequence as SimulatedSequence
from stator.mocker.workload import Arrival, block_hashes

__all__ = ["Route", "WorkerView", "least_loaded", "round_robin", "simulate"]

_SECOND = 1_000_000_000
_OWN_HASHES = 1 << 63
_FLUSH = 1 << 16


class WorkerView(Protocol):
    """What a routing function may look at: a worker at the moment the request comes."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def used_blocks(self) -> int: ...

    @property
    def capacity(self) -> int:
        """In blocks."""
        ...

    def cached_blocks(self, hashes: list[int]) -> int:
        """How many of a prompt's blocks are here."""
        ...


Route = Callable[[Arrival, list[int], Sequence[WorkerView]], int]
"""request, hashes of its prompt's full blocks, workers → the index of the one that gets it"""


def round_robin() -> Route:
    """One after the other."""
    turn = -1

    def route(arrival: Arrival, hashes: list[int], workers: Sequence[WorkerView]) -> int:
        nonlocal turn
        turn = (turn + 1) % len(workers)
        return turn

    return route


def least_loaded(arrival: Arrival, hashes: list[int], workers: Sequence[WorkerView]) -> int:
    """The worker with the fewest requests; of those the one with the fewest blocks in use, the first."""
    return min(range(len(workers)), key=lambda index: _load(workers[index]))


def _load(worker: WorkerView) -> tuple[int, int]:
    return worker.running + worker.waiting, worker.used_blocks


def simulate(
    arrivals: Iterable[Arrival], *, options: MockerOptions, workers: int, route: Route, until: float | None = None
) -> Simulation:
    """Run all requests on `workers` workers of one rank each, at most until `until` seconds.

    Everything that happens goes into the result's `digest`: equal arrivals, options and choices of `route` give equal ones. Blocks for
    as long as it takes. Raises `UsageError` for what makes no sense.
    """
    if workers < 1:
        raise UsageError(f"a simulation needs at least one worker, got {workers}")
    timing = options.timing()
    schedulers = [options.scheduler(timing, record=True) for _ in range(workers)]
    run = _Run([_Worker(index, each) for index, each in enumerate(schedulers)], options.block_size, route)
    run.plan(arrivals)
    run.go(None if until is None else round(until * _SECOND))
    return run.result()


class _Trace:
    """A hash of everything that happens, in order."""

    def __init__(self) -> None:
        self._hash = blake3()
        self._buffer = array("Q")

    def add(self, values: Iterable[int]) -> None:
        self._buffer.extend(values)
        if len(self._buffer) >= _FLUSH:
            self._hash.update(self._buffer.tobytes())
            del self._buffer[:]

    def digest(self) -> str:
        self._hash.update(self._buffer.tobytes())
        del self._buffer[:]
        return self._hash.hexdigest()


class _Worker:
    """A scheduler and the passes it is in."""

    def __init__(self, index: int, scheduler: Scheduler) -> None:
        scheduler.statistics.gaps = {}
        self.index = index
        self.scheduler = scheduler
        self.version = 0
        """of the entry in the agenda that holds"""
        self.begun = 0
        self.passes = 0
        """that end with that entry; 0: it is idle until then"""
        self.planned = False
        """whether there is such an entry"""

    @property
    def running(self) -> int:
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        return self.scheduler.waiting

    @property
    def used_blocks(self) -> int:
        return self.scheduler.pool.used

    @property
    def capacity(self) -> int:
        return self.scheduler.pool.capacity

    def cached_blocks(self, hashes: list[int]) -> int:
        return len(self.scheduler.pool.chain(hashes))


class _Run:
    """The agenda: when requests come, and when passes end. Of what is due at one time, requests are first: they are in the next pass."""

    def __init__(self, workers: list[_Worker], block_size: int, route: Route) -> None:
        self._workers = workers
        self._block_size = block_size
        self._route = route
        self._trace = _Trace()
        self._arrivals: list[Arrival] = []
        self._coming: list[tuple[int, int]] = []
        """a heap of (time, number)"""
        self._sessions: dict[str, deque[int]] = {}
        self._agenda: list[tuple[int, int, int]] = []
        """a heap of (time, worker, version)"""
        self._sequences: dict[int, SimulatedSequence] = {}
        self._placed: dict[int, int] = {}
        self._came: dict[int, int] = {}
        self._own_hashes = _OWN_HASHES
        self._now = 0

    def plan(self, arrivals: Iterable[Arrival]) -> None:
        for number, arrival in enumerate(arrivals):
            if arrival.prompt_tokens < 1 or arrival.output_tokens < 1 or arrival.time < 0 or arrival.delay < 0:
                raise UsageError(f"arrival {number}: lengths must be positive, and times must not be negative")
            self._arrivals.append(arrival)
            if arrival.session:
                line = self._sessions.setdefault(arrival.session, deque())
                line.append(number)
                if len(line) > 1:
                    continue
            self._coming.append((round(arrival.time * _SECOND), number))
        self._coming.sort()

    def go(self, until: int | None) -> None:
        coming, agenda = self._coming, self._agenda
        while coming or agenda:
            arrives = not agenda or (coming and coming[0][0] <= agenda[0][0])
            time = (coming if arrives else agenda)[0][0]
            if until is not None and time > until:
                self._now = until
                return
            self._now = time
            if arrives:
                self._place(heappop(coming)[1])
            else:
                _, index, version = heappop(agenda)
                worker = self._workers[index]
                if worker.version == version:
                    self._finish(worker)

    def _place(self, number: int) -> None:
        """A request comes: choose a worker, which looks at it when its pass ends."""
        arrival, now = self._arrivals[number], self._now
        hashes = block_hashes(arrival, number=number, block_size=self._block_size)
        index = self._route(arrival, hashes, self._workers)
        if not 0 <= index < len(self._workers):
            raise UsageError(f"the route chose worker {index} of {len(self._workers)}")
        worker = self._workers[index]
        sequence = SimulatedSequence(
            prompt_length=arrival.prompt_tokens,
            max_tokens=arrival.output_tokens,
            hashes=hashes if worker.scheduler.limits.prefix_caching else [],
            hash_of_next=self._own_hash,
            index=number,
        )
        self._sequences[number] = sequence
        self._placed[number] = index
        self._came[number] = now
        self._trace.add((1, number, index, now))
        worker.scheduler.submit(sequence, now)
        if not worker.planned:
            self._schedule(worker, now, passes=0)
        elif worker.passes > 1:
            plan = worker.scheduler.plan
            assert plan is not None, "passes that are planned have a plan"
            passes = max(1, -(-(now - worker.begun) // plan.duration))
            if passes < worker.passes:
                self._schedule(worker, worker.begun + passes * plan.duration, passes=passes)

    def _own_hash(self, sequence: SimulatedSequence) -> int:
        """Answers are like no others."""
        self._own_hashes += 1
        return self._own_hashes

    def _schedule(self, worker: _Worker, time: int, *, passes: int) -> None:
        worker.version += 1
        worker.passes = passes
        worker.planned = True
        heappush(self._agenda, (time, worker.index, worker.version))

    def _finish(self, worker: _Worker) -> None:
        """Passes end, or an idle worker wakes up: the next ones begin."""
        scheduler, now = worker.scheduler, self._now
        if worker.passes:
            progress = scheduler.finish(worker.passes)
            self._trace.add((2, worker.index, worker.begun, now, worker.passes))
            for sequence in progress.ended:
                self._end(worker, sequence)
            worker.passes = 0
            if self._coming and self._coming[0][0] <= now:  # a session goes on at once: with that request
                self._schedule(worker, now, passes=0)
                return
        worker.begun = now
        plan = scheduler.start(now)
        for change in scheduler.pool.take_changes():
            self._trace.add((3 if isinstance(change, Stored) else 4, worker.index, *change.hashes))
        for sequence in scheduler.take_rejected():
            self._end(worker, sequence)
        if plan is None:
            worker.planned = False
        else:
            self._schedule(worker, now + plan.repeat * plan.duration, passes=plan.repeat)

    def _end(self, worker: _Worker, sequence: SimulatedSequence) -> None:
        """A request has ended: note it, and let its session go on."""
        self._trace.add((5, sequence.index, worker.index, self._now, sequence.cached, sequence.preemptions, sequence.phase))
        sequence.hashes = []
        arrival = self._arrivals[sequence.index]
        if arrival.session:
            line = self._sessions[arrival.session]
            line.popleft()
            if line:
                heappush(self._coming, (self._now + round(self._arrivals[line[0]].delay * _SECOND), line[0]))

    def result(self) -> Simulation:
        gaps: dict[int, int] = {}
        for worker in self._workers:
            for gap, count in (worker.scheduler.statistics.gaps or {}).items():
                gaps[gap] = gaps.get(gap, 0) + count
        return Simulation(
            requests=[self._times(number, sequence) for number, sequence in sorted(self._sequences.items())],
            workers=[self._usage(worker) for worker in self._workers],
            gaps=gaps,
            ended_at=self._now,
            digest=self._trace.digest(),
        )

    def _times(self, number: int, sequence: SimulatedSequence) -> RequestTimes:
        worker = self._workers[self._placed[number]]
        return RequestTimes(
            number=number,
            worker=worker.index,
            prompt_tokens=sequence.prompt_length,
            output_tokens=worker.scheduler.made(sequence),
            cached_tokens=sequence.cached,
            preemptions=sequence.preemptions,
            rejected=sequence.phase is Phase.REJECTED,
            arrived_at=self._came[number],
            admitted_at=sequence.admitted_at,
            first_token_at=sequence.first_token_at,
            ended_at=sequence.ended_at,
        )

    def _usage(self, worker: _Worker) -> WorkerUsage:
        statistics = worker.scheduler.statistics
        return WorkerUsage(
            requests=statistics.admitted,
            rejected=statistics.rejected,
            preemptions=statistics.preemptions,
            passes=statistics.passes,
            tokens=statistics.tokens,
            computed_tokens=statistics.computed,
            busy=statistics.busy,
            used_time=statistics.used_time,
            most_used=statistics.most_used,
            capacity=worker.capacity,
            hit_rate=worker.scheduler.hit_rate,
        )
