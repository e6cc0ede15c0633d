"""Pages as transformers' engine hands them out: which blocks a request has, and which are free.

What lies in them is `kvmix_kernels.paged`. A *sector* of the engine is as large as a tail of ours: it is cut
into blocks for pages, or is one request's tail. The block with the sinks of a first page has no owner of its
own: it goes wherever that page goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator, CachePool

from kvmix_fx.errors import ServingError
from kvmix_kernels.paged.pages import PageLayout, PagePool
from kvmix_kernels.paged.step import Request


class PackedPool(CachePool):
    """The engine's pool, which tells an allocator of the blocks that become free."""

    def __init__(self, sectors: int, allocators: int) -> None:
        """Start with all sectors free."""
        self.listener: PackedAttentionAllocator | None = None
        super().__init__(sectors, allocators)

    def reset(self) -> None:
        """All sectors are free."""
        super().reset()
        if self.listener is not None:
            self.listener.forget()

    def free_blocks(self, index: int, block_ids: list[int]) -> None:
        """Mark blocks as free, and with first pages their sinks."""
        if self.listener is not None and index == self.listener.index:
            block_ids = [*block_ids, *self.listener.sinks_of(block_ids)]
        super().free_blocks(index, block_ids)

    def take_sector(self) -> int:
        """A whole free sector."""
        return int(self.free_sectors.pop())

    def return_sector(self, sector: int) -> None:
        """The inverse."""
        self.free_sectors.append(sector)


class PackedAttentionAllocator(CacheAllocator):
    """Full-attention layers in packed pages.

    Attributes:
        layout: of pages, tails and sinks.
        pages: the storage, once it is registered.
    """

    supports_block_sharing = True
    supports_block_table = False
    layer_type = "full_attention"
    rows_per_token = 2

    def __init__(
        self,
        index: int,
        layer_indices: list[int],
        layout: PageLayout,
        orders: Mapping[int, Tensor],
        allow_block_sharing: bool,
    ) -> None:
        """`orders`: by layer, the plan's order of channels of the keys, int32 [Hkv, D]."""
        self._before_cache_tensor_init(index, layer_indices, layout.tokens, 0, allow_block_sharing)
        self.layout, self.orders = layout, orders
        self.bytes_per_block = layout.nbytes
        self.pages: PagePool
        self._pool: PackedPool
        self.forget()

    def forget(self) -> None:
        """No request has anything."""
        self.tails: dict[str, int] = {}
        self._packed: dict[str, int] = {}
        self._sinks: dict[int, int] = {}

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: CachePool
    ) -> None:
        """Look at the engine's memory as pages."""
        assert isinstance(pool, PackedPool)
        assert bytes_per_sector == self.layout.tail_nbytes
        self.bytes_per_sector = bytes_per_sector
        self.blocks_per_sector = self.layout.blocks_per_tail
        self.num_blocks = non_trash_bytes // bytes_per_sector * self.blocks_per_sector
        self.num_pages = self.num_blocks * self.pages_per_block
        self.cache_tensor = cache_tensor
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        self.pages = PagePool(self.layout, cache_tensor, self.orders)
        self.pool = self._pool = pool
        pool.listener = self
        pool.set_blocks_per_sector(self.index, self.blocks_per_sector)
        # token by token nothing is read or written; the engine fills its unused tables with these
        self.read_trash_index = self.sentinel_index = self.write_trash_index = 0

    # ---- how much a request needs

    def _page_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        """Blocks that a request still needs for pages and sinks."""
        held = len(self.block_table.get(request_id, ()))
        wanted = -(-(past_length + query_length) // self.tokens_per_page)
        return max(0, wanted - held) + (1 if self.layout.sink and not held and wanted else 0)

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        """Blocks that a request still needs, its tail counted as those it takes the place of."""
        tail = 0 if request_id in self.tails else self.blocks_per_sector
        return self._page_blocks(request_id, past_length, query_length) + tail

    def needs_new_sectors(self, request_id: str, past_length: int, query_length: int) -> int:
        """Sectors to be taken for its pages and sinks, and its tail."""
        return self.sectors_for_pages(request_id, past_length, query_length) + (request_id not in self.tails)

    def sectors_for_pages(self, request_id: str, past_length: int, query_length: int) -> int:
        """Sectors to be cut into blocks first."""
        return self.sectors_for_blocks(self._page_blocks(request_id, past_length, query_length))

    def sectors_for_blocks(self, blocks: int) -> int:
        """Sectors to be cut for so many blocks."""
        missing = blocks - self.pool.count_free_blocks(self.index)
        return max(0, -(-missing // self.blocks_per_sector))

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        """Give a request its blocks and its tail; there are enough."""
        blocks = self._page_blocks(request_id, past_length, query_length)
        table = self.block_table.setdefault(request_id, [])
        found = self.pool.get_free_blocks(self.index, blocks)
        if blocks and not table and self.layout.sink:
            self._sinks[found[1]] = found[0]
            found = found[1:]
        table.extend(found)
        if request_id not in self.tails:
            self.tails[request_id] = self._pool.take_sector()

    # ---- what becomes of blocks

    def sinks_of(self, pages: list[int]) -> list[int]:
        """The sinks of those pages that are first ones; they are forgotten."""
        return [self._sinks.pop(page) for page in pages if page in self._sinks]

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """Take everything from a request; whole pages may stay for others."""
        super().free_blocks(request_id, no_cache)
        self._packed.pop(request_id, None)
        tail = self.tails.pop(request_id, None)
        if tail is not None:
            self._pool.return_sector(tail)

    def acquire_prefix_blocks(self, request_id: str, prefix_len: int, block_ids: list[int]) -> None:
        """Let a request begin on the pages of others, which it has as they are packed."""
        super().acquire_prefix_blocks(request_id, prefix_len, block_ids)
        self._packed[request_id] = prefix_len

    def count_non_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        """Blocks that a copy of a request needs for itself; a tail comes on top."""
        own = super().count_non_shareable_blocks(source_request_id, past_length)
        first = self.block_table[source_request_id][:1]
        alone = bool(first) and self.count_shareable_blocks(source_request_id, past_length) == 0
        return own + (1 if alone and self.layout.sink else 0)

    def fork_blocks(
        self, source_request_id: str, dest_request_id: str, past_length: int
    ) -> tuple[list[int], list[int]]:
        """As the original; what is copied includes tail and sinks."""
        old, new = super().fork_blocks(source_request_id, dest_request_id, past_length)
        old, new = list(old), list(new)
        theirs = self.block_table[source_request_id][:1]
        mine = self.block_table[dest_request_id][:1]
        if self.layout.sink and theirs != mine:
            self._sinks[mine[0]] = self.pool.get_free_blocks(self.index, 1)[0]
            old.append(self._sinks[theirs[0]])
            new.append(self._sinks[mine[0]])
        self.tails[dest_request_id] = self._pool.take_sector()
        for sector, blocks in ((self.tails[source_request_id], old), (self.tails[dest_request_id], new)):
            first = sector * self.blocks_per_sector
            blocks.extend(range(first, first + self.blocks_per_sector))
        if source_request_id in self._packed:
            self._packed[dest_request_id] = self._packed[source_request_id]
        return old, new

    # ---- what a step is told

    def request(self, request_id: str, first: int, past_length: int, query_length: int) -> Request:
        """A request's place in a step, where its tokens begin at `first`."""
        pages = self.block_table[request_id]
        begin = self.layout.raw_from(past_length, self._packed.get(request_id, 0))
        sinks = self._sinks.get(pages[0], -1) if pages else -1
        return Request(first, query_length, past_length, begin, list(pages), self.tails[request_id], sinks)

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Tokens that the newest one attends to."""
        return past_length + query_length

    def get_read_indices(self, *_request: object) -> list[int]:
        """None: a step is told of pages, not of tokens."""
        return []

    def get_write_indices(self, *_request: object) -> list[int]:
        """None."""
        return []

    def fill_block_table(self, *_request: object) -> None:
        """Nothing: the engine's own kernel cannot read packed pages, and ours has tables of its own."""

    def update(self, *_states: object) -> tuple[Tensor, Tensor]:
        """Refuse: there is no copy of the history to be returned.

        Raises:
            ServingError: always.
        """
        raise ServingError(_NO_COPY)

    def get_cache_for_block_table(self, _layer: int) -> tuple[Tensor, Tensor]:
        """Refuse likewise.

        Raises:
            ServingError: always.
        """
        raise ServingError(_NO_COPY)


_NO_COPY = (
    "packed pages are read by the attention of kvmix alone: leave the model's attn_implementation as "
    "kvmix_fx.serve has set it until the manager is closed"
)


def plan_orders(layers: Mapping[int, Any], heads: int, device: torch.device) -> dict[int, Tensor]:
    """By layer, the order of channels of its keys, if its plan has one.

    layers: plans of layers with their head sizes, as (LayerPlan, channels).
    """
    from kvmix_fx.cache.orders import key_order

    found = {
        number: key_order(layer, heads, channels, device) for number, (layer, channels) in layers.items()
    }
    return {number: order for number, order in found.items() if order is not None}
