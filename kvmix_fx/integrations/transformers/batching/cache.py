"""The engine's cache with packed pages for its full-attention layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching.cache import (
    PagedAttentionCache,
    PagedAttentionMemoryHandler,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cache_allocators import (
    CacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.requests import RequestState

from kvmix_fx.errors import PoolError, ServingError
from kvmix_fx.integrations.transformers.batching.allocator import (
    PackedAttentionAllocator,
    PackedPool,
    plan_orders,
)
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_kernels.paged.pages import LayerShape, PageLayout, page_layout
from kvmix_kernels.paged.step import Request, Step

FULL, SLIDING = PackedAttentionAllocator.layer_type, SlidingAttentionCacheAllocator.layer_type
NO_LIMIT = 1 << 40
TRASH_SECTORS = 2
"""That the engine keeps for tokens of padding."""


def layer_groups(config: PreTrainedConfig) -> dict[str, list[int]]:
    """Layers by what they attend to.

    Raises:
        ServingError: the engine does not batch such layers, or none is packed.
    """
    try:
        groups = group_layers_by_attn_type(config)
    except ValueError as error:
        raise ServingError(
            f"transformers does not batch this model continuously ({error}): use generate() of the compiled "
            "model"
        ) from None
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ServingError(
            "this model caches latents, of which there are no pages: use generate() of the compiled model"
        )
    if FULL not in groups:
        raise ServingError(
            "all layers of this model have sliding windows, which stay at 16 bits in continuous batching: "
            "use the model's own generate_batch"
        )
    return groups


def pages_for(
    plan: KVPlan,
    groups: dict[str, list[int]],
    ranks: int,
    dtype: torch.dtype,
    tokens: int | None,
    multiple: int,
) -> PageLayout:
    """Pages for the full-attention layers of a plan that knows the model's sizes."""
    assert plan.geometry is not None
    shapes: dict[int, LayerShape] = {}
    for number in groups[FULL]:
        sizes = plan.geometry.layer(number)
        heads = ModelGeometry.shared_out(sizes.num_kv_heads, ranks)
        key, value = plan.layers[number].formats(sizes.head_dim, sizes.value_dim)
        shapes[number] = LayerShape(key, value, heads, sizes.head_dim, sizes.value_dim)
    return page_layout(shapes, dtype, tokens, multiple)


HANDED_ON = "kvmix_cache"
"""As what `PackedCache.update` tells attention of itself."""


class PackedCache(PagedAttentionCache):
    """`PagedAttentionCache` with a packed allocator for full attention; sliding layers keep the engine's own.

    Made without the original's constructor, which makes its allocators by a table that is transformers' own.

    Attributes:
        packed: the allocator of pages.
        in_range: layers whose first tokens had the range of their scales.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        continuous_batching_config: Any,
        device: torch.device,
        distributed_helper: Any,
        dtype: torch.dtype,
        model_supports_logits_to_keep: bool,
        plan: KVPlan,
        memory: int | None,
    ) -> None:
        """Lay out pages and allocate them.

        Args:
            config: as of the original.
            continuous_batching_config: likewise.
            device: likewise.
            distributed_helper: likewise.
            dtype: likewise.
            model_supports_logits_to_keep: likewise.
            plan: with the geometry of the model.
            memory: bytes; None for what `continuous_batching_config` says.

        Raises:
            PoolError: there is too little memory.
            ServingError, FormatError: as `serve`.
        """
        assert plan.geometry is not None
        self.config, self.dtype, self.device = config, dtype, device
        self.max_blocks_per_request = 0
        groups = layer_groups(config)
        ranks = distributed_helper.tp_size if distributed_helper.are_kv_heads_tp_ed() else 1
        heads = {
            kind: ModelGeometry.shared_out(plan.geometry.layer(numbers[0]).num_kv_heads, ranks)
            for kind, numbers in groups.items()
        }
        self.allow_block_sharing = continuous_batching_config.allow_block_sharing
        sliding: SlidingAttentionCacheAllocator | None = None
        layout = pages_for(plan, groups, ranks, dtype, continuous_batching_config.page_size, 0)
        if SLIDING in groups:
            sliding = SlidingAttentionCacheAllocator(
                index=1,
                config=config,
                num_key_value_heads=heads[SLIDING],
                cache_dtype=dtype,
                page_size=layout.tokens,
                layer_indices=groups[SLIDING],
                allow_block_sharing=self.allow_block_sharing,
            )
            layout = pages_for(plan, groups, ranks, dtype, layout.tokens, sliding.bytes_per_block)
        planned = {n: (plan.layers[n], plan.geometry.layer(n).head_dim) for n in groups[FULL]}
        self.packed = PackedAttentionAllocator(
            0, groups[FULL], layout, plan_orders(planned, heads[FULL], device), self.allow_block_sharing
        )
        self.cache_allocators: dict[str, CacheAllocator] = {FULL: self.packed}
        if sliding is not None:
            self.cache_allocators[SLIDING] = sliding
        self.layer_to_allocator = {
            number: allocator
            for allocator in self.cache_allocators.values()
            for number in allocator.layer_indices
        }
        self.bytes_per_sector = layout.tail_nbytes
        self.tokens_per_sector = layout.blocks_per_tail * layout.tokens
        self._size(continuous_batching_config, memory, model_supports_logits_to_keep)
        if distributed_helper.tp_size > 1:
            sizes = torch.tensor([self.max_batch_tokens, self.num_sectors], device=device)
            distributed_helper.tp_all_reduce_min(sizes)
            self.max_batch_tokens, self.num_sectors = (int(n) for n in sizes)
        self._check_size(memory)
        own = self.num_sectors * self.bytes_per_sector
        trash = TRASH_SECTORS * self.bytes_per_sector
        # memory is taken when it is written to, where the system can; only padding reads what nobody wrote
        self.cache_tensor = torch.empty(own + trash, dtype=torch.uint8, device=device)
        self.cache_tensor[:trash].zero_()
        self.pool = PackedPool(self.num_sectors, len(self.cache_allocators))
        for allocator in self.cache_allocators.values():
            allocator.register_cache_tensor(self.bytes_per_sector, own, self.cache_tensor, self.pool)
        self.use_prefix_sharing = self.allow_block_sharing and all(
            allocator.use_block_sharing for allocator in self.cache_allocators.values()
        )
        self.num_blocks = self.packed.num_blocks
        self.read_cache_limit: int | None = None
        # the engine tells steps of one token a request apart if its table of blocks has a column, which
        # nobody reads; they have no limit here
        self.max_blocks_per_request = 1 if sliding is None else 0
        self.max_decode_fast_path_length = NO_LIMIT if sliding is None else 0
        # the engine makes a table of token numbers as long as this, for sliding layers alone here
        self.max_tokens_read = 0 if sliding is None else sliding.tokens_per_page * sliding.num_blocks
        self.in_range: set[int] = set()
        self._collected: list[Request] = []
        self._collecting: object = None
        self._tokens = 0
        self._step: Step | None = None

    def _size(self, config: Any, memory: int | None, supports_logits_to_keep: bool) -> None:
        """Tokens of a step and sectors of the pool."""
        if memory is not None:
            self.max_batch_tokens = (
                config.max_batch_tokens or PagedAttentionMemoryHandler._default_max_batch_tokens
            )
            self.num_sectors = memory // self.bytes_per_sector - TRASH_SECTORS
            return
        plain = 2 * ModelGeometry.of(self.config).num_kv_heads * ModelGeometry.of(self.config).head_dim
        handler = PagedAttentionMemoryHandler(
            config=self.config,
            cb_config=config,
            dtype=self.dtype,
            bytes_per_sector=self.bytes_per_sector,
            tokens_per_sector=0 if SLIDING not in self.cache_allocators else self.tokens_per_sector,
            bytes_per_block=self.config.num_hidden_layers
            * plain
            * self.dtype.itemsize
            * self.packed.tokens_per_page,
            attn_types=list(self.cache_allocators),
            model_supports_logits_to_keep=supports_logits_to_keep,
        )
        # no masks are made, and keys are read without being repeated
        handler.num_attention_masks = 0
        handler.kv_heads_at_peak = 2 * ModelGeometry.of(self.config).num_kv_heads
        try:
            self.max_batch_tokens, self.num_sectors = handler.infer_max_batch_tokens_and_num_sectors()
        except (MemoryError, ValueError) as error:
            raise PoolError(
                f"there is no room for a pool of pages: {error}. Use a smaller model, free memory, or say "
                "how much with memory=..."
            ) from None

    def _check_size(self, memory: int | None) -> None:
        least = (
            TRASH_SECTORS
            + 1
            + math.ceil((2 if self.packed.layout.sink else 1) / self.packed.layout.blocks_per_tail)
        )
        least += len(self.cache_allocators) - 1
        if self.num_sectors + TRASH_SECTORS < least or self.max_batch_tokens < 1:
            given = "the pool" if memory is None else f"a pool of {memory} bytes"
            raise PoolError(
                f"{given} is too small for one request: {least * self.bytes_per_sector} bytes hold "
                f"{self.packed.tokens_per_page} tokens, so give memory= at least that and about "
                f"{self.packed.bytes_per_block / self.packed.tokens_per_page:.0f} bytes for every token more"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.cache_tensor.numel()

    # ---- room

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        """As the original, with a tail for each request."""
        request, past = state.request_id, state.current_len()
        needed = {
            name: allocator.needs_new_sectors(request, past, request_len)
            for name, allocator in self.cache_allocators.items()
        }
        enough = self.pool.num_free_sectors >= sum(needed.values())
        if dry_run or not enough:
            return enough
        needed[FULL] = self.packed.sectors_for_pages(request, past, request_len)
        self._cut(needed)
        for allocator in self.cache_allocators.values():
            allocator.allocate_cache_to_request(request, past, request_len)
        return True

    def _cut(self, sectors: dict[str, int]) -> None:
        for name, count in sectors.items():
            for _ in range(count):
                self.pool.allocate_sector(self.cache_allocators[name].index)

    def count_storable_requests(self, list_blocks_needed: list[dict[str, int]]) -> int:
        """As the original, but a tail may need a whole sector although as many blocks are free."""
        sectors = self.pool.num_free_sectors
        free = {name: self.pool.count_free_blocks(a.index) for name, a in self.cache_allocators.items()}
        for number, needed in enumerate(list_blocks_needed):
            for name, allocator in self.cache_allocators.items():
                blocks = needed[name]
                if allocator is self.packed and blocks >= allocator.blocks_per_sector:
                    sectors -= 1
                    blocks -= allocator.blocks_per_sector
                missing = max(0, blocks - free[name])
                cut = math.ceil(missing / allocator.blocks_per_sector)
                sectors -= cut
                free[name] += cut * allocator.blocks_per_sector - blocks
            if sectors < 0:
                return number
        return len(list_blocks_needed)

    def prepare_fork_request(
        self,
        src_state: RequestState,
        dst_req_ids: list[str],
        copy_src_and_dst: dict[str, tuple[list[int], list[int]]],
    ) -> list[str]:
        """As the original, with a tail for each copy."""
        source, past = src_state.request_id, src_state.current_len()
        forked = []
        for request in dst_req_ids:
            needed = {}
            for name, allocator in self.cache_allocators.items():
                blocks = allocator.count_non_shareable_blocks(source, past)
                missing = blocks - self.pool.count_free_blocks(allocator.index)
                needed[name] = max(0, math.ceil(missing / allocator.blocks_per_sector))
            if self.pool.num_free_sectors < sum(needed.values()) + 1:
                break
            self._cut(needed)
            for name, allocator in self.cache_allocators.items():
                old, new = allocator.fork_blocks(source, request, past)
                copy_src_and_dst[name][0].extend(old)
                copy_src_and_dst[name][1].extend(new)
            forked.append(request)
        return forked

    # ---- steps

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """As the original for the engine's own layers; the step's own tokens for packed ones."""
        kwargs[HANDED_ON] = self
        if self.layer_to_allocator[layer_idx] is self.packed:
            return key_states, value_states
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, kwargs)
        return found

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """Note a request of the step that is being prepared; for sliding layers as the original."""
        if self._collecting is not write_index:
            # the engine makes new lists for every step
            self._collecting = write_index
            self._begin()
        self._collect(request_id, past_length, query_length)
        for allocator in self.cache_allocators.values():
            if allocator is self.packed:
                continue
            write_index[allocator.index].extend(
                allocator.get_write_indices(request_id, past_length, query_length)
            )
            if read_index is not None:
                read_index[allocator.index].extend(
                    allocator.get_read_indices(request_id, past_length, query_length)
                )

    def fill_block_table(
        self, request_id: str, past_length: int, query_length: int, block_table: Tensor
    ) -> None:
        """Note a request of a step in which every request has one token."""
        if block_table.storage_offset() == 0:
            # the column of the first request
            self._begin()
        self._collect(request_id, past_length, query_length)

    def _begin(self) -> None:
        self._collected.clear()
        self._tokens, self._step = 0, None

    def _collect(self, request_id: str, past_length: int, query_length: int) -> None:
        self._collected.append(self.packed.request(request_id, self._tokens, past_length, query_length))
        self._tokens += query_length

    @property
    def step(self) -> Step:
        """The step that was prepared last."""
        if self._step is None:
            self._step = Step(self.packed.layout, self._collected, self.device)
        return self._step
