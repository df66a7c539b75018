"""The page allocator under random use: pages are never shared by accident and never lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from container.serving.cache import PAGE, OutOfPages, PageAllocator, page_key

PAGES = 12


class Allocator(RuleBasedStateMachine):
    """Owners take, publish, find again and release pages; the model is a plain dictionary of contents."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(PAGES)
        self.owners: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what an owner wrote into a page last

    @rule(count=st.integers(1, 5), stamp=st.integers(0, 20))
    def allocate(self, count: int, stamp: int) -> None:
        if count > self.allocator.free:
            with pytest.raises(OutOfPages):
                self.allocator.allocate(count)
            return
        pages = self.allocator.allocate(count)
        in_use = {page for owner in self.owners for page in owner}
        assert not in_use & set(pages)
        assert len(set(pages)) == count
        assert all(1 <= page <= PAGES for page in pages)
        key = b""
        for page in pages:
            key = page_key(key, [stamp] * PAGE)
            self.content[page] = key
            self.allocator.publish(page, key)
        self.owners.append(pages)

    @rule(stamp=st.integers(0, 20), count=st.integers(1, 5))
    def reuse(self, stamp: int, count: int) -> None:
        keys, key = [], b""
        for _ in range(count):
            key = page_key(key, [stamp] * PAGE)
            keys.append(key)
        pages = self.allocator.reuse(keys)
        assert [self.content[page] for page in pages] == keys[: len(pages)]
        if pages:
            self.owners.append(pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.integers(0, len(self.owners) - 1))
        self.allocator.release(self.owners.pop(owner))

    @invariant()
    def nothing_is_lost(self) -> None:
        in_use = {page for owner in self.owners for page in owner}
        assert self.allocator.used == len(in_use)
        assert self.allocator.free + self.allocator.used == PAGES


TestAllocator = Allocator.TestCase


def test_the_least_recently_released_prefix_goes_first() -> None:
    allocator = PageAllocator(2)
    keys = [page_key(b"", [i] * PAGE) for i in range(2)]
    for key in keys:
        (page,) = allocator.allocate(1)
        allocator.publish(page, key)
        allocator.release([page])
    allocator.allocate(1)
    assert allocator.reuse(keys[:1]) == []
    assert len(allocator.reuse(keys[1:])) == 1


@given(st.lists(st.integers(0, 2**40), min_size=PAGE, max_size=PAGE), st.integers(0, PAGE - 1))
def test_keys_depend_on_every_token_and_on_the_prefix(tokens: list[int], at: int) -> None:
    other = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    assert page_key(b"", tokens) == page_key(b"", list(tokens))
    assert page_key(b"", tokens) != page_key(b"", other)
    assert page_key(b"a", tokens) != page_key(b"b", tokens)
