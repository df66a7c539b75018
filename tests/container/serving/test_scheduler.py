"""The scheduler under random arrivals and cancellations: no page is lost or mixed up, and everything ends."""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from container.serving.cache import NULL_PAGE, PAGE, PageAllocator
from container.serving.scheduler import Planned, Scheduler
from container.serving.sequence import Sampling, Sequence, State
from container.serving.tokenizer import Detokenizer, Tokenizer

NO_TEXT = Tokenizer(None)
# Prompts are beginnings of few long texts, so that many share pages; each may end in a token of its own.
TEXTS = ([1] * 400, [1] * 70 + [2] * 330, [3] * 400)


@dataclass
class Request:
    """What is asked for, in tokens."""

    prompt: list[int]
    output: int


requests = st.builds(
    lambda text, length, tail, output: Request([*TEXTS[text][:length], *tail], output),
    st.integers(0, len(TEXTS) - 1),
    st.sampled_from([1, 2, 63, 64, 65, 127, 128, 130, 200]),
    st.lists(st.integers(10, 12), max_size=2),
    st.sampled_from([1, 2, 5, 64, 70, 150]),
)
actions = st.lists(
    st.one_of(requests, st.integers(1, 9), st.tuples(st.just("cancel"), st.integers(0, 5))),
    min_size=1,
    max_size=24,
)


@dataclass
class World:
    """A scheduler and, in place of a model, what every slot of the cache was last written with."""

    scheduler: Scheduler
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)  # slot -> position, token
    sequences: list[Sequence] = field(default_factory=list)

    def add(self, request: Request) -> None:
        sampling = Sampling(max_tokens=request.output, ignore_eos=True)
        sequence = Sequence(len(self.sequences), request.prompt, sampling, Detokenizer(NO_TEXT))
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    def cancel(self, index: int) -> None:
        alive = [s for s in self.sequences if s.state is not State.FINISHED]
        if index < len(alive):
            self.scheduler.remove(alive[index])
            self.check_pages()

    def step(self) -> None:
        plan = self.scheduler.plan()
        busy = bool(self.scheduler.running or self.scheduler.waiting)
        assert bool(plan) == busy  # whoever waits, something moves
        assert all(p.count > 0 for p in plan)  # a token needs the logits of one that ran
        order = [s.id for s in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == sorted(order)  # nobody is overtaken, preempted or not
        decoding = [p for p in plan if p.count == 1]
        assert plan[: len(decoding)] == decoding  # the order that a batch wants
        assert sum(p.count for p in plan) <= max(self.scheduler.step_tokens, len(decoding))
        assert len({p.sequence.id for p in plan}) == len(plan) <= self.scheduler.max_batch
        self.check_pages()
        for planned in plan:
            self.write(planned)
        for planned in plan:
            self.read(planned)
        for planned in plan:
            self.scheduler.computed(planned)
            sequence = planned.sequence
            if sequence.computed == sequence.length:
                token = 20 + sum(sequence.tokens(0, sequence.length)) % 3  # of the whole past, like a model's
                if sequence.accept(token, None, ()).finish_reason:
                    self.scheduler.remove(sequence)
        self.check_pages()

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.pages[position // PAGE] * PAGE + position % PAGE

    def write(self, planned: Planned) -> None:
        sequence, start = planned.sequence, planned.sequence.computed
        for position, token in enumerate(sequence.tokens(start, start + planned.count), start):
            self.slots[self.slot(sequence, position)] = position, token

    def read(self, planned: Planned) -> None:
        """Everything that its tokens attend to is the sequence's own past."""
        sequence, end = planned.sequence, planned.sequence.computed + planned.count
        for position, token in enumerate(sequence.tokens(0, end)):
            assert self.slots[self.slot(sequence, position)] == (position, token)

    def check_pages(self) -> None:
        allocator = self.scheduler.allocator
        held = Counter(page for s in self.sequences for page in s.pages)
        assert NULL_PAGE not in held
        assert all(len(set(s.pages)) == len(s.pages) for s in self.sequences)
        assert len(held) == allocator.used
        for sequence in self.sequences:
            assert sequence.state is State.RUNNING or not sequence.pages
            # full pages may be shared; the one that is still being filled belongs to one sequence
            assert all(held[p] == 1 for p in sequence.pages[sequence.computed // PAGE :])


@settings(max_examples=120, deadline=None)
@given(
    plan=actions,
    pages=st.sampled_from([6, 7, 9, 14, 40]),
    max_batch=st.sampled_from([1, 2, 3, 8]),
    step_tokens=st.sampled_from([1, 5, 64, 100, 512]),
)
def test_any_course_of_events(
    plan: list[Request | int | tuple[str, int]], pages: int, max_batch: int, step_tokens: int
) -> None:
    world = World(Scheduler(PageAllocator(pages), max_batch, step_tokens))
    for action in plan:
        if isinstance(action, Request):
            world.add(action)
        elif isinstance(action, int):
            for _ in range(action):
                world.step()
        else:
            world.cancel(action[1])
    # each token costs a step at most, each preemption a whole sequence: far from this only a standstill is
    for _ in range(100_000):
        if not (world.scheduler.running or world.scheduler.waiting):
            break
        world.step()
    assert all(s.state is State.FINISHED and not s.pages for s in world.sequences)
    assert world.scheduler.allocator.used == 0
    for sequence in world.sequences:
        if sequence.finish_reason == "length":
            assert len(sequence.output) == sequence.sampling.max_tokens
            past = list(sequence.prompt)
            for token in sequence.output:  # what it would have been alone
                assert token == 20 + sum(past) % 3
                past.append(token)


def test_first_tokens_come_in_the_order_of_arrival() -> None:
    world = World(Scheduler(PageAllocator(9), 4, 64))
    for length in (200, 10, 130, 64, 1, 300, 5):
        world.add(Request(TEXTS[0][:length], 150))
    order: list[int] = []
    while world.scheduler.running or world.scheduler.waiting:
        world.step()
        order += [s.id for s in world.sequences if s.output and s.id not in order]
    assert order == sorted(order)
    assert world.scheduler.preemptions > 0
