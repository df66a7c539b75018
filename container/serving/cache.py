"""The paged latent cache shared by all requests, and the allocator of its pages."""

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from container.serving.attention import PAGE, DecodeAttention

CPU_CACHE_BYTES = 1 << 30
GPU_CACHE_FRACTION = 0.85  # of the memory that is free once the weights are loaded
NULL_PAGE = 0  # never allocated: padded rows of a captured decode batch write here


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than asked for."""


class LatentCache:
    """Latents and rotated keys of every layer: [layers, pages, 64, 1, row], rows as the backend reads them.

    A token's slot is page * 64 + offset. Memory of unused slots is never initialised and never read. Raises
    ValueError when the device has no room for it.
    """

    def __init__(self, layers: int, pages: int, attention: DecodeAttention, device: torch.device):
        self.attention = attention
        shape = (layers, pages + 1, PAGE, 1, attention.row_width)
        try:
            self._data = torch.empty(shape, dtype=attention.cache_dtype, device=device)
        except RuntimeError:  # torch has no narrower one for the CPU
            size = math.prod(shape) * attention.cache_dtype.itemsize / 1e9
            raise ValueError(
                f"a cache of {pages * PAGE} tokens takes {size:.1f} GB, more than {device} gives; "
                "ask for fewer (MLA_CACHE_TOKENS)"
            ) from None
        self._data[:, NULL_PAGE] = 0
        self._rows = self._data.view(layers, -1, attention.row_width)

    @property
    def num_pages(self) -> int:
        """Pages that can be allocated."""
        return self._data.shape[1] - 1

    @property
    def bytes_per_page(self) -> int:
        return self._data[:, 0].nbytes

    def fill_random(self) -> None:
        """Fills every slot with normal values, for benchmarks: they decode over a context never prefilled."""
        for layer in self._rows:
            width = self.attention.latent_dim
            layer.copy_(self.attention.pack(torch.randn(layer.shape[0], width, device=layer.device)))

    def write(self, layer: int, slots: Tensor, latents: Tensor) -> None:
        """Stores latents [T, rank + rope] in slots int64 [T]."""
        self._rows[layer].index_copy_(0, slots, self.attention.pack(latents))

    @contextmanager
    def target(self, layer: int, slots: Tensor, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Where a kernel that rounds to the tensor's dtype may write the latents of `slots` itself.

        The layer's rows, to be indexed by slots; or rows of their own (and no slots) as many as `like` has,
        which are packed and stored at the end of the block.
        """
        if not self.attention.fp8:
            yield self._rows[layer], slots
            return
        rows = like.new_empty(slots.shape[0], self.attention.latent_dim)
        yield rows, None
        self.write(layer, slots, rows)

    def read(self, layer: int, pages: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """The first `length` tokens of a sequence with pages int64 [n] -> `dtype` [length, rank + rope]."""
        rows = self._data[layer].index_select(0, pages).view(-1, self._data.shape[-1])[:length]
        return self.attention.unpack(rows, dtype)

    def attend(self, layer: int, q: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
        """Decode attention of q [n, heads, rank + rope], row i over lengths[i] tokens -> [n, heads, rank]."""
        return self.attention(q, self._data[layer], block_table, lengths)


def pages_that_fit(layers: int, most: int, attention: DecodeAttention, device: torch.device) -> int:
    """Pages for a cache in the memory that is left, at most `most`: what all requests together can use."""
    page_bytes = PAGE * attention.row_width * attention.cache_dtype.itemsize * layers
    room = CPU_CACHE_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        room = int(GPU_CACHE_FRACTION * free)
    return max(1, min(room // page_bytes, most))


class PageAllocator:
    """Counts the users of every page and finds full pages again by the tokens they hold.

    A full page is known by a hash over all tokens up to its end, so equal hashes mean an equal prefix. A page
    nobody uses keeps its content until it is needed; the least recently released one goes first.
    """

    def __init__(self, pages: int):
        self._users = [0] * (pages + 1)
        self._blank = list(range(pages, NULL_PAGE, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages without users, oldest first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.total = pages

    @property
    def free(self) -> int:
        """Pages that an allocation may take, cached prefixes included."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        return self.total - self.free

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one user each; undefined content. Raises OutOfPages and takes nothing."""
        if count > self.free:
            raise OutOfPages(f"{count} pages wanted, {self.free} of {self.total} free")
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._hash_of.pop(page)]
            self._users[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one use of each page."""
        # the end of a prefix is worth least, so it becomes the oldest idle page
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Makes a full page findable. Of two pages with the same tokens the first stays known."""
        if key not in self._page_of and page not in self._hash_of:
            self._page_of[key] = page
            self._hash_of[page] = key

    def reuse(self, keys: Sequence[bytes]) -> list[int]:
        """The longest run of known pages for the first keys, with one more user each."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._users[page] == 0:
                del self._idle[page]
            self._users[page] += 1
            pages.append(page)
        return pages


def page_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full page: of the page before it and its 64 token ids."""
    return hashlib.blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()
