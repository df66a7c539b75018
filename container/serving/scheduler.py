"""Which sequences run in a step and how many of their tokens: continuous batching over paged memory."""

from collections import deque
from dataclasses import dataclass

from container.serving.cache import PAGE, PageAllocator, page_key
from container.serving.sequence import Sequence, State


@dataclass(frozen=True)
class Planned:
    """`count` tokens of the sequence from its first one without latents on."""

    sequence: Sequence
    count: int


class Scheduler:
    """First come, first served. Every step decodes all running sequences, then spends what is left of
    `step_tokens` on prompts in chunks. When pages run out the youngest sequence gives up its pages and starts
    again later, from prompt and output so far.

    A sequence must fit alone: the caller refuses longer ones.
    """

    def __init__(self, allocator: PageAllocator, max_batch: int, step_tokens: int):
        self.allocator, self.max_batch, self.step_tokens = allocator, max_batch, step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> list[Planned]:
        """The next step's work, single tokens first; pages for it are allocated."""
        decoding: list[Planned] = []
        filling: list[Sequence] = []
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING:
                continue  # preempted for an older one in this very loop
            if sequence.length - sequence.computed > 1:
                filling.append(sequence)
            elif self._grow(sequence):
                decoding.append(Planned(sequence, 1))
        decoding = [p for p in decoding if p.sequence.state is State.RUNNING]
        budget = self.step_tokens - len(decoding)
        chunks: list[Planned] = []
        for sequence in filling:
            if sequence.state is State.RUNNING and budget > 0:
                budget = self._chunk(sequence, budget, chunks)
        while self.waiting and len(self.running) < self.max_batch and budget > 0:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            sequence.state = State.RUNNING
            self.running.append(sequence)
            budget = self._chunk(sequence, budget, chunks)
        return sorted(decoding + chunks, key=lambda p: p.count > 1)

    def computed(self, planned: Planned) -> None:
        """Notes that a step ran, and makes the pages it filled findable."""
        sequence = planned.sequence
        sequence.computed += planned.count
        for page in range(len(sequence.keys), sequence.computed // PAGE):
            sequence.keys.append(self._key(sequence, page))
        for page in range((sequence.computed - planned.count) // PAGE, sequence.computed // PAGE):
            self.allocator.publish(sequence.pages[page], sequence.keys[page])

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and releases its pages."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        self._release(sequence)

    def _chunk(self, sequence: Sequence, budget: int, chunks: list[Planned]) -> int:
        count = min(sequence.length - sequence.computed, budget)
        chunks.append(Planned(sequence, count))
        return budget - count

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the next token; False when the sequence itself had to give way."""
        while len(sequence.pages) * PAGE < sequence.length:
            if self.allocator.free:
                sequence.pages += self.allocator.allocate(1)
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Pages for all tokens so far, full ones from the cache where their content is known."""
        whole = (sequence.length - 1) // PAGE  # at least one token must run, for its logits
        for page in range(len(sequence.keys), whole):
            sequence.keys.append(self._key(sequence, page))
        pages = self.allocator.reuse(sequence.keys[:whole])
        wanted = -(-sequence.length // PAGE) - len(pages)
        # one spare page for each running sequence keeps a full cache from preempting at once
        spare = len(self.running)
        if wanted + spare > self.allocator.free:
            self.allocator.release(pages)
            return False
        sequence.computed = len(pages) * PAGE
        if not sequence.output:
            sequence.reused = sequence.computed
        sequence.pages = pages + self.allocator.allocate(wanted)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    @staticmethod
    def _key(sequence: Sequence, page: int) -> bytes:
        previous = sequence.keys[page - 1] if page else b""
        return page_key(previous, sequence.tokens(page * PAGE, (page + 1) * PAGE))
