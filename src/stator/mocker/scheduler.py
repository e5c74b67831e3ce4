"""Continuous batching over one block pool (`spec/50 §23.2`), without tokens, tasks or a clock of its own.

A *pass* is one step of the model: prompts are computed within a budget of tokens, and each sequence whose tokens are all computed gets
one more at the end. What a pass costs does not depend on how many sequences decode: they share one count of *beats*, passes that gave
tokens, and only those that need a block or end are touched, at a beat known long before. So many equal passes can be taken at once.
"""

from collections import deque
from heapq import heappop, heappush

import msgspec

from stator.mocker.blocks import BlockPool
from stator.mocker.holdings import Holdings
from stator.mocker.sequence import Phase, Sequence
from stator.mocker.statistics import Statistics
from stator.mocker.timing import PassTiming

__all__ = ["Limits", "Pass", "Progress", "Scheduler"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler may do. `max_num_batched_tokens` ≥ `max_num_seqs`, so that a pass has room for all that decode."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool = True
    chunked_prefill: bool = True
    oldest_first: bool = False
    """which sequence is preempted: the oldest (`fifo`), or the newest (`lifo`)"""
    reserve: int = 0
    """blocks that an admission must leave free while others run"""


class Pass(msgspec.Struct, frozen=True):
    """`repeat` ≥ 1 passes in a row, if nothing comes or goes, each of `duration` nanoseconds."""

    duration: int
    repeat: int


class Progress(msgspec.Struct, frozen=True):
    """What passes did. `fresh` got a token and had none in the pass before; `ended` have all their tokens."""

    end: int
    fresh: list[Sequence]
    ended: list[Sequence]


class Scheduler:
    """Waiting and running sequences of one rank.

        submit ─▶ waiting ─▶ prefilling ─▶ decoding ─▶ finished
                     ▲            │           │
                     └──── preempted: all blocks are given back

    `start` plans a pass and takes its blocks, `finish` hands out tokens when it is over; between the two sequences may be submitted and
    withdrawn. Which of them is admitted, preempted and evicted when, and how long it all takes, is what the reference does, except that
    a sequence that can never run is rejected where the reference tries forever, and nothing is admitted once the budget is spent.
    """

    def __init__(self, pool: BlockPool, timing: PassTiming, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.statistics = Statistics()
        self._timing = timing
        self._holdings = Holdings(pool, block_size=limits.block_size, prefix_caching=limits.prefix_caching)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}
        self._orders = 0
        self._beat = 0
        self._decoding = 0
        self._known = 0
        """sum of the lengths of the decoding sequences, less `_decoding · _beat`"""
        self._due: list[tuple[int, int, Sequence]] = []
        """a heap of (beat, order, sequence), with entries of sequences that have left"""
        self._partial: Sequence | None = None
        """has a slot and part of its tokens computed; always the last of the running ones"""
        self._completing: list[Sequence] = []
        """have their first token, or the first after a preemption, at the end of this pass"""
        self._prefills: list[tuple[int, int]] = []
        """prompt tokens computed before and after this pass, of each sequence whose prompt is computed in it"""
        self._rejected: list[Sequence] = []
        self._plan: Pass | None = None
        self.begun = 0
        """when the planned pass begins, in nanoseconds"""

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences without one."""
        return len(self._waiting)

    @property
    def hit_rate(self) -> float | None:
        """Share of recent prompt tokens that were found in the prefix cache, 0 … 1; None: no data, or no cache."""
        return self.statistics.hits.value if self.limits.prefix_caching else None

    @property
    def plan(self) -> Pass | None:
        """What `start` returned, until `finish`."""
        return self._plan

    def made(self, sequence: Sequence) -> int:
        """Tokens of its answer so far."""
        return self._beat - sequence.base if sequence.phase is Phase.DECODING else sequence.made

    def take_rejected(self) -> list[Sequence]:
        """Sequences found to be too large since the last call."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def submit(self, sequence: Sequence, now: int) -> None:
        """Queue a sequence; it is looked at by the next `start`."""
        sequence.submitted_at = now
        self._waiting.append(sequence)

    def withdraw(self, sequence: Sequence, now: int) -> None:
        """Nobody wants more of this sequence: its blocks and its slot are free at once. Harmless if it has ended."""
        if sequence.phase >= Phase.FINISHED:
            return
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence, self.made(sequence))
        sequence.phase = Phase.FINISHED
        sequence.ended_at = now

    # -- a pass

    def start(self, now: int) -> Pass | None:
        """Plan the pass that begins at `now`. None: there is nothing to do."""
        self.begun = now
        self._completing = []
        self._prefills = []
        budget = self.limits.max_num_batched_tokens - self._decoding
        partial = self._partial
        undisturbed = True
        if partial is not None:
            self._partial = None
            tokens = min(partial.prompt_length + partial.made - partial.computed, budget)
            undisturbed = self._make_room(partial, tokens, now)
            if partial.phase is Phase.PREFILLING:
                self._compute(partial, tokens)
                budget -= tokens
        if undisturbed and self._waiting:
            self._admit(budget, now)
        if not self._running:
            self._plan = None
            return None
        self._plan = plan = self._planned()
        return plan

    def finish(self, passes: int = 1) -> Progress:
        """The first `passes` of the planned ones are over: 1 … `repeat`. There must be a plan."""
        plan, self._plan = self._plan, None
        assert plan is not None, "finish needs a start before it"
        end = self.begun + passes * plan.duration
        statistics = self.statistics
        statistics.passes += passes
        statistics.busy += end - self.begun
        statistics.used_time += self.pool.used * (end - self.begun)
        statistics.most_used = max(statistics.most_used, self.pool.used)
        if passes > 1:
            self._beat += passes - 1
            self._count(self._decoding * (passes - 1), plan.duration)
        return self._emit(end, plan.duration)

    def _planned(self) -> Pass:
        """How long this pass takes, and how many like it follow."""
        duration = 0
        if self._prefills:
            tokens = _new_tokens(self._prefills)
            self.statistics.computed += tokens
            if tokens:
                duration = self._timing.prefill(tokens)
        ready = self._decoding + len(self._completing)
        if ready:
            known = self._known + self._decoding * self._beat
            for sequence in self._completing:
                known += sequence.computed
            duration += self._timing.decode(self.pool.used, known // ready)
        if self._prefills or self._completing or self._partial is not None or not self._timing.steady:
            return Pass(duration, 1)
        return Pass(duration, self._next_due() - self._beat)

    def _next_due(self) -> int:
        """The beat at which a decoding sequence needs a block or ends."""
        due = self._due
        while due:
            beat, order, sequence = due[0]
            if sequence.phase is Phase.DECODING and sequence.order == order and sequence.due == beat:
                return beat
            heappop(due)  # it has left
        return self._beat + 1

    # -- prompts

    def _admit(self, budget: int, now: int) -> None:
        """Give slots to waiting sequences, in order, until one does not fit."""
        limits, pool, waiting = self.limits, self.pool, self._waiting
        while waiting and budget > 0 and len(self._running) < limits.max_num_seqs:
            sequence = waiting[0]
            known = sequence.prompt_length + sequence.made
            needed = -(-known // limits.block_size)
            found = pool.chain(sequence.hashes) if limits.prefix_caching else []
            shared = sum(1 for block in found if block.users)
            # As in the reference, only the prompt counts as found; what was generated before a preemption is computed again.
            cached = min(len(found) * limits.block_size, sequence.prompt_length)
            tokens = known - cached
            if self._never_runs(sequence, tokens):
                waiting.popleft()
                self._reject(sequence, now)
                continue
            if needed - shared > pool.free - (limits.reserve if self._running else 0):
                return
            if tokens > budget:
                if not limits.chunked_prefill:
                    return
                tokens = budget
            waiting.popleft()
            self._begin(sequence, cached, now)
            self._holdings.share(sequence, found[: cached // limits.block_size])
            fits = self._holdings.extend(sequence, cached + tokens)
            assert fits, "an admitted sequence fits"
            self._compute(sequence, tokens)
            budget -= tokens

    def _begin(self, sequence: Sequence, cached: int, now: int) -> None:
        """A slot for `sequence`, `cached` tokens of which are there already."""
        self._orders += 1
        sequence.order = self._orders
        sequence.phase = Phase.PREFILLING
        sequence.computed = cached
        sequence.cached = max(sequence.cached, cached)
        self._running[sequence] = None
        if sequence.admitted_at < 0:
            sequence.admitted_at = now
            self.statistics.admitted += 1
            self.statistics.hits.add(asked=sequence.prompt_length, found=cached)

    def _never_runs(self, sequence: Sequence, tokens: int) -> bool:
        """Whether prompt and answer need more blocks than there are, or the next `tokens` more than one pass has."""
        limits = self.limits
        most = -(-(sequence.prompt_length + sequence.max_tokens) // limits.block_size)
        return most > self.pool.capacity or not (limits.chunked_prefill or tokens <= limits.max_num_batched_tokens)

    def _reject(self, sequence: Sequence, now: int) -> None:
        sequence.phase = Phase.REJECTED
        sequence.ended_at = now
        self.statistics.rejected += 1
        self._rejected.append(sequence)

    def _compute(self, sequence: Sequence, tokens: int) -> None:
        """The next `tokens` of a prompt, or of what a preempted sequence had, are computed in this pass."""
        before = sequence.computed
        after = sequence.computed = before + tokens
        if before < sequence.prompt_length:
            self._prefills.append((before, min(after, sequence.prompt_length)))
        if after == sequence.prompt_length + sequence.made:
            self._completing.append(sequence)
        else:
            self._partial = sequence

    def _make_room(self, sequence: Sequence, tokens: int, now: int) -> bool:
        """Blocks for the next `tokens` of a sequence that is running, if need be by preemption, even of its own. False: somebody was
        preempted.
        """
        undisturbed = True
        while not self._holdings.extend(sequence, sequence.computed + tokens):
            undisturbed = False
            victim = self._victim()
            self._preempt(victim, self.made(victim), had_token_at=now)
            if victim is sequence:
                break
        return undisturbed

    # -- tokens

    def _emit(self, end: int, duration: int) -> Progress:
        """A token for each sequence that is ready, in order."""
        fresh: list[Sequence] = []
        ended: list[Sequence] = []
        if self._decoding or self._completing:
            self._beat += 1
            self._count(self._decoding, duration)
            self._emit_due(end, duration, ended)
            for sequence in self._completing:
                if sequence.phase is Phase.PREFILLING and self._grow(sequence, sequence.computed, end, duration):
                    self._set_going(sequence, end, fresh)
                    self._go_on(sequence, end, ended)
            self._completing = []
        return Progress(end, fresh, ended)

    def _emit_due(self, end: int, duration: int, ended: list[Sequence]) -> None:
        """Of the decoding sequences, those that need a block or end at this beat."""
        due, beat = self._due, self._beat
        while due and due[0][0] <= beat:
            _, order, sequence = heappop(due)
            if sequence.phase is not Phase.DECODING or sequence.order != order or sequence.due != beat:
                continue  # it has left
            length = sequence.prompt_length + beat - 1 - sequence.base
            if self._grow(sequence, length, end, duration):
                self._go_on(sequence, end, ended)

    def _set_going(self, sequence: Sequence, end: int, fresh: list[Sequence]) -> None:
        """All tokens of a sequence are computed: it has its next one now, and another at each beat from now on."""
        sequence.phase = Phase.DECODING
        sequence.base = self._beat - sequence.made - 1
        self._decoding += 1
        self._known += sequence.prompt_length - sequence.base
        fresh.append(sequence)
        statistics = self.statistics
        if sequence.first_token_at < 0:
            sequence.first_token_at = end
            statistics.tokens += 1
        else:
            self._count(1, end - sequence.last_token_at)

    def _go_on(self, sequence: Sequence, end: int, ended: list[Sequence]) -> None:
        """The next time this sequence must be looked at, or its end."""
        beat = self._beat
        last = sequence.base + sequence.max_tokens
        if beat >= last:
            self._leave(sequence, sequence.max_tokens)
            sequence.phase = Phase.FINISHED
            sequence.last_token_at = sequence.ended_at = end
            self.statistics.finished += 1
            ended.append(sequence)
            return
        length = sequence.prompt_length + beat - sequence.base
        sequence.due = min(last, beat + 1 + -length % self.limits.block_size)
        heappush(self._due, (sequence.due, sequence.order, sequence))

    def _grow(self, sequence: Sequence, length: int, end: int, duration: int) -> bool:
        """See that a sequence of `length` tokens has a block for one more, if need be by preemption. False: of itself."""
        if length % self.limits.block_size:
            return True
        while not self._holdings.grow(sequence):
            victim = self._victim()
            made, had_it = self.made(victim), victim.order < sequence.order
            if victim.phase is Phase.DECODING and not had_it:  # it will not get this beat's token
                made -= 1
                self._count(-1, duration)
            self._preempt(victim, made, had_token_at=end if had_it else end - duration)
            if victim is sequence:
                return False
        return True

    def _count(self, tokens: int, gap: int) -> None:
        """`tokens` were generated, each `gap` nanoseconds after the one before it."""
        self.statistics.tokens += tokens
        gaps = self.statistics.gaps
        if gaps is not None and tokens:
            gaps[gap] = gaps.get(gap, 0) + tokens

    # -- leaving

    def _victim(self) -> Sequence:
        return next(iter(self._running)) if self.limits.oldest_first else next(reversed(self._running))

    def _preempt(self, victim: Sequence, made: int, *, had_token_at: int) -> None:
        """Take everything from a running sequence, which goes to the head of the queue with `made` tokens.

        `had_token_at` is when it had the last one, if it was decoding.
        """
        if victim.phase is Phase.DECODING:
            victim.last_token_at = had_token_at
        self._leave(victim, made)
        victim.phase = Phase.WAITING
        victim.computed = 0
        victim.preemptions += 1
        self.statistics.preemptions += 1
        self._waiting.appendleft(victim)

    def _leave(self, sequence: Sequence, made: int) -> None:
        """Free slot and blocks of a running sequence."""
        del self._running[sequence]
        if sequence.phase is Phase.DECODING:
            self._decoding -= 1
            self._known -= sequence.prompt_length - sequence.base
        elif self._partial is sequence:
            self._partial = None
        sequence.made = made
        self._holdings.release(sequence)


def _new_tokens(prefills: list[tuple[int, int]]) -> int:
    """Prompt tokens that count for the time of a pass: the number of prompts by the difference of two means, rounded down each."""
    before = after = 0
    for start, end in prefills:
        before += start
        after += end
    prompts = len(prefills)
    return prompts * (after // prompts - before // prompts)
