"""Who is busy: the last load of every rank of every worker, held against thresholds.

Generic: what a load, a capacity and a threshold are is the business of a `LoadRule`. Time is handed in; nothing waits.

    report of a rank ─ merged into its last one ─▶ over the threshold of a group? ─ all ranks that reported are ─▶ worker busy there

A *group* is whoever shares a threshold: the workers of one model at one endpoint, say. A worker may be in several.
"""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Generic, Protocol, TypeVar

import msgspec

__all__ = ["Group", "LoadRow", "LoadRule", "LoadTable"]

K = TypeVar("K", bound=Hashable)
L = TypeVar("L")
C = TypeVar("C")
T = TypeVar("T")
L_ = TypeVar("L_")
C_ = TypeVar("C_", contravariant=True)
T_ = TypeVar("T_", contravariant=True)


class LoadRule(Protocol[L_, C_, T_]):
    """What reports mean. Pure: same arguments, same answer."""

    def merge(self, known: L_, news: L_) -> L_:
        """What is known of a rank after `news`, which may leave things unsaid."""
        ...

    def is_over(self, load: L_, capacity: C_, threshold: T_, was_over: bool) -> bool:
        """Whether a rank is over its limit; `was_over` is the answer before, for rules that let go later than they seize."""
        ...

    def excess(self, load: L_, capacity: C_, threshold: T_) -> float:
        """How far over: the one with the least is the nearest to be free."""
        ...

    def reason(self, load: L_, capacity: C_, threshold: T_) -> str:
        """Which limit and which value, for people; of a rank that is over."""
        ...


class Group(msgspec.Struct, Generic[C, T], frozen=True, kw_only=True):
    """Workers with their capacities, and the threshold they are held against."""

    workers: Mapping[int, C]
    threshold: T


class LoadRow(msgspec.Struct, Generic[K, L], frozen=True, kw_only=True):
    """One rank of one listed worker. `heard` is in monotonic seconds; `over` are the groups whose threshold it is over."""

    worker: int
    rank: int
    load: L
    heard: float
    over: tuple[K, ...]


class _Report(Generic[L]):
    """The last of one rank."""

    __slots__ = ("heard", "load")

    def __init__(self, load: L, heard: float) -> None:
        self.load = load
        self.heard = heard


class _Judged(Generic[C, T]):
    """A group, and how its workers fare."""

    __slots__ = ("busy", "over", "threshold", "workers")

    def __init__(self, group: Group[C, T]) -> None:
        self.workers = group.workers
        self.threshold = group.threshold
        self.over: dict[int, set[int]] = {}
        """worker → ranks over the limit; no entry for none"""
        self.busy: frozenset[int] = frozenset()


class LoadTable(Generic[K, L, C, T]):
    """Reports in, busy workers out. Each method that takes news answers the groups whose busy workers are others than before.

    A worker is busy in a group when every rank that has reported is over; who has not reported is free. A worker that is in no group any
    more loses its reports. Bounded by what is listed: `max_ranks` per worker, the rest of the ranks is dropped; of workers that are not
    listed, because their first report came before their record or because they are somebody else's, `max_strangers` are kept, those
    heard of last.
    """

    def __init__(
        self, rule: LoadRule[L, C, T], *, stale_after: float = 5.0, max_ranks: int = 1024, max_strangers: int = 1024
    ) -> None:
        """`stale_after`: seconds after which the report of a repeating worker is forgotten."""
        self._rule = rule
        self._stale_after = stale_after
        self._max_ranks = max_ranks
        self._max_strangers = max_strangers
        self._groups: dict[K, _Judged[C, T]] = {}
        self._groups_of: dict[int, tuple[K, ...]] = {}
        self._repeating: AbstractSet[int] = frozenset()
        self._reports: dict[int, dict[int, _Report[L]]] = {}
        self._strangers: OrderedDict[int, dict[int, _Report[L]]] = OrderedDict()
        self.dropped = 0
        """reports of ranks beyond `max_ranks`"""

    # -- news

    def follow(self, groups: Mapping[K, Group[C, T]], repeating: AbstractSet[int], now: float) -> Collection[K]:
        """These are all groups now. `repeating` are the workers that repeat their reports: only theirs go stale."""
        groups_of: dict[int, tuple[K, ...]] = {}
        for key, group in groups.items():
            for worker in group.workers:
                groups_of[worker] = (*groups_of.get(worker, ()), key)
        for worker in self._groups_of.keys() - groups_of.keys():
            self._reports.pop(worker, None)
        for worker in groups_of.keys() & self._strangers.keys():
            self._reports[worker] = self._strangers.pop(worker)
        before, self._groups = self._groups, {key: _Judged(group) for key, group in groups.items()}
        self._groups_of = groups_of
        self._repeating = repeating
        self._forget_stale(now)
        changed = [key for key, judged in before.items() if key not in groups and judged.busy]
        for key, judged in self._groups.items():
            known = before.get(key)
            was_over = known.over if known is not None else {}
            for worker in judged.workers:
                self._judge(judged, worker, was_over.get(worker, frozenset()))
            judged.busy = frozenset(worker for worker in judged.over if self._is_busy(judged, worker))
            if judged.busy != (known.busy if known is not None else frozenset()):
                changed.append(key)
        return changed

    def set_threshold(self, key: K, threshold: T) -> Collection[K]:
        """Another threshold for a group, which must be known. It acts at once."""
        judged = self._groups[key]
        judged.threshold = threshold
        for worker in judged.workers:
            self._judge(judged, worker, judged.over.get(worker, frozenset()))
        busy = frozenset(worker for worker in judged.over if self._is_busy(judged, worker))
        if busy == judged.busy:
            return ()
        judged.busy = busy
        return (key,)

    def hear(self, worker: int, rank: int, load: L, now: float) -> Collection[K]:
        """A rank reports."""
        keys = self._groups_of.get(worker, ())
        ranks = self._ranks_of(worker, listed=bool(keys))
        if ranks is None:
            return ()
        report = ranks.get(rank)
        if report is None:
            if len(ranks) >= self._max_ranks:
                self.dropped += 1
                return ()
            report = ranks[rank] = _Report(load, now)
        else:
            report.load = self._rule.merge(report.load, load)
            report.heard = now
        return [key for key in keys if self._judge_rank(self._groups[key], worker, rank, report.load)]

    def forget_stale(self, now: float) -> Collection[K]:
        """Time has passed: drop what repeating workers should have repeated by now."""
        return [key for worker in self._forget_stale(now) for key in self._rejudge(worker)]

    # -- answers

    def busy(self, key: K) -> Mapping[int, str]:
        """Who is busy in a group, and why. Its keys stay as they are; its texts are those of the moment they are read."""
        judged = self._groups.get(key)
        return _Busy(self, key, judged.busy if judged is not None else frozenset())

    def threshold(self, key: K) -> T | None:
        """The threshold of a group; None for an unknown one."""
        judged = self._groups.get(key)
        return None if judged is None else judged.threshold

    def rows(self) -> Iterator[LoadRow[K, L]]:
        """All that is known of listed workers."""
        for worker, ranks in self._reports.items():
            keys = self._groups_of.get(worker, ())
            for rank, report in ranks.items():
                over = tuple(key for key in keys if rank in self._groups[key].over.get(worker, ()))
                yield LoadRow(worker=worker, rank=rank, load=report.load, heard=report.heard, over=over)

    def __len__(self) -> int:
        """Listed workers with a report."""
        return len(self._reports)

    @property
    def strangers(self) -> int:
        """Workers with a report that are not listed."""
        return len(self._strangers)

    # -- inside

    def _ranks_of(self, worker: int, *, listed: bool) -> dict[int, _Report[L]] | None:
        """The reports of a worker, to be added to; None if they are not kept."""
        if listed:
            ranks = self._reports.get(worker)
            if ranks is None:
                ranks = self._reports[worker] = {}
            return ranks
        if not self._max_strangers:
            return None
        ranks = self._strangers.get(worker)
        if ranks is None:
            if len(self._strangers) >= self._max_strangers:
                self._strangers.popitem(last=False)
            ranks = self._strangers[worker] = {}
        else:
            self._strangers.move_to_end(worker)
        return ranks

    def _forget_stale(self, now: float) -> list[int]:
        """Drop old reports; the workers concerned."""
        before = now - self._stale_after
        concerned: list[int] = []
        for worker in self._repeating:
            ranks = self._reports.get(worker)
            if ranks is None:
                continue
            stale = [rank for rank, report in ranks.items() if report.heard < before]
            for rank in stale:
                del ranks[rank]
            if not ranks:
                del self._reports[worker]
            if stale:
                concerned.append(worker)
        return concerned

    def _rejudge(self, worker: int) -> Iterator[K]:
        """Look at all of a worker anew; the groups where it is no longer, or newly, busy."""
        for key in self._groups_of.get(worker, ()):
            judged = self._groups[key]
            self._judge(judged, worker, judged.over.get(worker, frozenset()))
            if self._update_busy(judged, worker):
                yield key

    def _judge(self, judged: _Judged[C, T], worker: int, was_over: AbstractSet[int]) -> None:
        """Which ranks of a worker are over."""
        capacity, threshold, is_over = judged.workers[worker], judged.threshold, self._rule.is_over
        ranks = self._reports.get(worker, {})
        over = {rank for rank, report in ranks.items() if is_over(report.load, capacity, threshold, rank in was_over)}
        if over:
            judged.over[worker] = over
        else:
            judged.over.pop(worker, None)

    def _judge_rank(self, judged: _Judged[C, T], worker: int, rank: int, load: L) -> bool:
        """The same for one rank that reported; whether that makes the worker busy, or ends it."""
        over = judged.over.get(worker)
        was_over = over is not None and rank in over
        is_over = self._rule.is_over(load, judged.workers[worker], judged.threshold, was_over)
        if is_over and not was_over:
            judged.over.setdefault(worker, set()).add(rank)
        elif was_over and not is_over and over is not None:
            over.discard(rank)
            if not over:
                del judged.over[worker]
        elif is_over or worker not in judged.busy:
            return False  # a rank that reports for the first time, and is not over, ends it as well
        return self._update_busy(judged, worker)

    def _is_busy(self, judged: _Judged[C, T], worker: int) -> bool:
        over = judged.over.get(worker)
        return over is not None and len(over) == len(self._reports[worker])

    def _update_busy(self, judged: _Judged[C, T], worker: int) -> bool:
        is_busy = self._is_busy(judged, worker)
        if is_busy == (worker in judged.busy):
            return False
        judged.busy = judged.busy | {worker} if is_busy else judged.busy - {worker}
        return True

    def nearest_rank(self, key: K, worker: int) -> tuple[float, str]:
        """Of a busy worker: how far its best rank is over, and why."""
        judged, ranks = self._groups.get(key), self._reports.get(worker)
        if judged is None or not ranks or worker not in judged.workers:
            return 0.0, "its last report was forgotten"
        capacity, threshold, excess = judged.workers[worker], judged.threshold, self._rule.excess
        rank, report = min(ranks.items(), key=lambda item: excess(item[1].load, capacity, threshold))
        text = self._rule.reason(report.load, capacity, threshold)
        return excess(report.load, capacity, threshold), f"rank {rank}: {text}" if len(ranks) > 1 else text


class _Busy(Mapping[int, str]):
    """Busy workers of one moment, the nearest to be free first, with the reasons of the moment somebody asks."""

    __slots__ = ("_ids", "_key", "_table")

    def __init__(self, table: LoadTable[Any, Any, Any, Any], key: Hashable, ids: frozenset[int]) -> None:
        self._table = table
        self._key = key
        self._ids = ids

    def __getitem__(self, worker: int) -> str:
        if worker not in self._ids:
            raise KeyError(worker)
        return self._table.nearest_rank(self._key, worker)[1]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._ids, key=lambda worker: self._table.nearest_rank(self._key, worker)[0]))

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, worker: object) -> bool:
        return worker in self._ids
