"""Running a step: what the device is told of it, and steps that decode as CUDA graphs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner

from kvmix_fx.integrations.transformers.batching.cache import PackedCache
from kvmix_kernels.paged.attend import kernels_take
from kvmix_kernels.paged.tables import Room, Tables, longest_of

LEAST_PAGES = 32
"""Pages that a sequence of a recorded step may have at least; beyond, powers of two."""


def can_record(cache: PackedCache) -> bool:
    """Whether steps that decode can be CUDA graphs: all they do is told by tables on the device.

    Warns of layers on a GPU that no kernel takes, as their steps are slow.
    """
    if cache.device.type != "cuda":
        return False
    slow = [n for n in cache.packed.layer_indices if not kernels_take(cache.packed.pages, n, cache.dtype)]
    if slow:
        warnings.warn(
            f"pages of layers {slow} are read without kernels, many times slower: these take half and "
            "single precision, pages of multiples of 16 tokens, and values without an order of channels",
            stacklevel=2,
        )
    return not slow and bool(cache.max_blocks_per_request)


class PackedRunner(ModelRunner):
    """`ModelRunner` that keeps, for every shape of a recorded step, the place where its numbers are put."""

    cache: PackedCache

    def __init__(self, **given: Any) -> None:
        """As the original."""
        super().__init__(**given)
        self._numbers: dict[tuple[int, int], Tensor] = {}
        io: Any = self.inputs_and_outputs
        pairs = [pair.device_io for pair in io.io_pairs] if self._overlapped else [io]
        for one in pairs:
            # a graph is of as many pages, too
            one._get_graph_key = lambda one=one: (one.num_q_tokens, self._pages())

    @property
    def _overlapped(self) -> bool:
        return isinstance(self.inputs_and_outputs, ContinuousBatchingAsyncIOs)

    def _pages(self) -> int:
        """Pages that each sequence of the step may have, if it is recorded."""
        step = self.cache.step
        longest = longest_of(step.requests, step.layout.tokens)
        return max(LEAST_PAGES, 1 << (longest - 1).bit_length())

    def maybe_pad_inputs(
        self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool
    ) -> tuple[int, int]:
        """As the original, of steps that are recorded alone."""
        self.pad_inputs = self.use_cuda_graph_decode and use_decode_fast_path
        found: tuple[int, int] = super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)
        return found

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        """As the original, after the numbers of a recorded step have been put where its graph reads them."""
        if self.use_cuda_graph_decode and self.inputs_and_outputs.use_block_table:
            count, pages = batch_data["input_ids"].shape[1], self._pages()
            layout = self.cache.packed.layout
            # beside packed pages a sequence has those of its window and of what it writes
            room = Room(count, count, count * (pages + layout.ring // layout.tokens + 2))
            with torch.cuda.stream(self.inputs_and_outputs.compute_stream):
                if (count, pages) not in self._numbers:
                    self._numbers[count, pages] = torch.empty(
                        room.numbers, dtype=torch.int32, device=self.cache.device
                    )
                step = self.cache.step
                step.tables = Tables(step, room, pages, self._numbers[count, pages])
        super().compute_batch(model, batch_data)


__all__ = ["PackedRunner", "can_record"]
