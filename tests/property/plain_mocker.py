"""The scheduler of the simulated engine written down plainly: every pass, every sequence, every token. Slow, and easy to check against
`spec/50 §23`; what `stator.mocker.scheduler` must agree with.
"""

from dataclasses import dataclass, field

from stator.mocker.scheduler import Limits
from stator.mocker.timing import PassTiming


@dataclass(eq=False)
class PlainSequence:
    """`names` are those of the prompt's full blocks."""

    number: int
    submitted: int
    prompt: int
    max_tokens: int
    names: list[int]
    made: int = 0
    computed: int = 0
    held: list[int] = field(default_factory=list)
    """named blocks"""
    loose: int = 0
    decoding: bool = False
    cached: int = 0
    preemptions: int = 0
    times: list[int] = field(default_factory=list)
    """of each token"""
    rejected: bool = False

    @property
    def known(self) -> int:
        return self.prompt + self.made

    def name(self, index: int) -> int:
        return self.names[index] if index < len(self.names) else -(self.number * 100_000 + index + 1)


class PlainPool:
    """Names are kept, users counted, leaves searched for."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.users: dict[int, int] = {}
        self.parent: dict[int, int | None] = {}
        self.released: dict[int, int] = {}
        """of those without users: when"""
        self.loose = 0
        self.count = 0

    @property
    def used(self) -> int:
        return self.loose + sum(1 for users in self.users.values() if users)

    def reserve(self, count: int) -> bool:
        while self.loose + len(self.users) + count > self.capacity:
            parents = {self.parent[name] for name in self.users}
            leaves = [name for name in self.released if name not in parents]
            if not leaves:
                return False
            oldest = min(leaves, key=lambda name: self.released[name])
            del self.users[oldest], self.parent[oldest], self.released[oldest]
        return True

    def hold(self, name: int) -> None:
        self.released.pop(name, None)
        self.users[name] += 1

    def release(self, names: list[int]) -> None:
        for name in reversed(names):
            self.users[name] -= 1
            if not self.users[name]:
                self.count += 1
                self.released[name] = self.count


class PlainScheduler:
    """One pass at a time."""

    def __init__(self, capacity: int, timing: PassTiming, limits: Limits) -> None:
        self.pool = PlainPool(capacity)
        self.timing = timing
        self.limits = limits
        self.waiting: list[PlainSequence] = []
        self.running: list[PlainSequence] = []

    def one_pass(self, now: int) -> int:
        """The time at which it ends."""
        limits = self.limits
        budget = limits.max_num_batched_tokens - sum(each.decoding for each in self.running)
        scheduled: list[tuple[PlainSequence, int]] = []
        preempted = False
        for each in [each for each in self.running if not each.decoding]:
            tokens = min(each.known - each.computed, budget)
            while each in self.running and not self._extend(each, each.computed + tokens):
                preempted = True
                self._preempt()
            if each in self.running:
                scheduled.append((each, tokens))
                budget -= tokens
        while not preempted and self.waiting and len(self.running) < limits.max_num_seqs and budget > 0:
            head = self.waiting[0]
            found = self._found(head) if limits.prefix_caching else []
            cached = min(len(found) * limits.block_size, head.prompt)
            needed = -(-head.known // limits.block_size)
            if -(-(head.prompt + head.max_tokens) // limits.block_size) > self.pool.capacity:
                self.waiting.pop(0).rejected = True
                continue
            shared = sum(1 for name in found if self.pool.users[name])
            reserve = limits.reserve if self.running else 0
            if needed - shared > self.pool.capacity - self.pool.used - reserve:
                break
            tokens = head.known - cached
            if tokens > budget:
                if not limits.chunked_prefill:
                    break
                tokens = budget
            self.waiting.pop(0)
            self.running.append(head)
            head.computed, head.cached = cached, max(head.cached, cached)
            for name in found[: cached // limits.block_size]:
                self.pool.hold(name)
                head.held.append(name)
            assert self._extend(head, cached + tokens)
            scheduled.append((head, tokens))
            budget -= tokens
        return self._time(now, scheduled)

    def _time(self, now: int, scheduled: list[tuple[PlainSequence, int]]) -> int:
        parts: list[tuple[int, int]] = []
        for each, tokens in scheduled:
            if each.computed < each.prompt:
                parts.append((each.computed, min(each.computed + tokens, each.prompt)))
            each.computed += tokens
        duration = 0
        if parts:
            count = len(parts)
            new = count * (sum(end for _, end in parts) // count - sum(start for start, _ in parts) // count)
            duration += self.timing.prefill(new) if new else 0
        ready = [each for each in self.running if each.decoding or each.computed == each.known]
        if ready:
            duration += self.timing.decode(self.pool.used, sum(each.known for each in ready) // len(ready))
        self._emit(ready, now + duration)
        return now + duration

    def _emit(self, ready: list[PlainSequence], end: int) -> None:
        for each in ready:
            if each not in self.running:
                continue
            if each.known % self.limits.block_size == 0:
                if each.loose and self.limits.prefix_caching:
                    self._name_last(each)
                while each in self.running and not self._take(each, 1):
                    self._preempt()
                if each not in self.running:
                    continue
            each.decoding = True
            each.made += 1
            each.times.append(end)
            if each.made == each.max_tokens:
                self._leave(each)

    def _found(self, sequence: PlainSequence) -> list[int]:
        found: list[int] = []
        for index in range(sequence.known // self.limits.block_size):
            if sequence.name(index) not in self.pool.users:
                break
            found.append(sequence.name(index))
        return found

    def _extend(self, sequence: PlainSequence, length: int) -> bool:
        size = self.limits.block_size
        needed = -(-length // size)
        if not self.limits.prefix_caching:
            return self._take(sequence, max(needed - sequence.loose, 0))
        full = length // size
        if sequence.loose and full > len(sequence.held):
            self._name_last(sequence)
        while not sequence.loose and len(sequence.held) < full and sequence.name(len(sequence.held)) in self.pool.users:
            self.pool.hold(sequence.name(len(sequence.held)))
            sequence.held.append(sequence.name(len(sequence.held)))
        if not self._take(sequence, max(needed - len(sequence.held) - sequence.loose, 0)):
            return False
        while len(sequence.held) < full:
            self._name_last(sequence)
        return True

    def _take(self, sequence: PlainSequence, count: int) -> bool:
        if not self.pool.reserve(count):
            return False
        self.pool.loose += count
        sequence.loose += count
        return True

    def _name_last(self, sequence: PlainSequence) -> None:
        name = sequence.name(len(sequence.held))
        sequence.loose -= 1
        self.pool.loose -= 1
        if name in self.pool.users:
            self.pool.hold(name)
        else:
            self.pool.users[name] = 1
            self.pool.parent[name] = sequence.held[-1] if sequence.held else None
        sequence.held.append(name)

    def _preempt(self) -> None:
        victim = self.running[0 if self.limits.oldest_first else -1]
        self._leave(victim)
        victim.computed = 0
        victim.preemptions += 1
        self.waiting.insert(0, victim)

    def _leave(self, sequence: PlainSequence) -> None:
        self.running.remove(sequence)
        sequence.decoding = False
        self.pool.loose -= sequence.loose
        sequence.loose = 0
        self.pool.release(sequence.held)
        sequence.held = []
