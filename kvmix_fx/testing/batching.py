"""What the engine of continuous batching computes for each request, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvmix_fx.errors import ServingError


class Logits:
    """The logits of every request of a manager, as a context manager that listens to its model.

    Attributes:
        by_request: a row [vocabulary] for each token that was chosen, by request.
    """

    def __init__(self, manager: Any) -> None:
        """`manager`: of a model that is not compiled, whose forward takes `logits_to_keep`."""
        self._manager = manager
        self.by_request: dict[str, list[Tensor]] = {}
        self._hook: Any = None

    def __enter__(self) -> Logits:
        self._hook = self._manager.model.register_forward_hook(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _hear(self, _model: Any, _args: Any, output: Any) -> None:
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        chosen = [future.state.request_id for future in batch if future.has_new_token]
        for row, request in zip(output.logits[0].float(), chosen, strict=False):
            self.by_request.setdefault(request, []).append(row.clone())


def results(manager: Any, requests: Sequence[str], seconds: float = 60) -> dict[str, Any]:
    """The finished results of these requests, in any order."""
    found: dict[str, Any] = {}
    while len(found) < len(requests):
        result = manager.get_result(timeout=seconds)
        if result is None:
            missing = sorted(set(requests) - found.keys())
            raise ServingError(f"no result for {missing} in {seconds} s: did the thread that steps end?")
        if result.request_id in requests and result.is_finished():
            found[result.request_id] = result
    return found


def free_share(manager: Any) -> float:
    """Share of a pool's sectors that are free once pages kept for their content are given up."""
    cache = manager.cache
    cache.evict_cached_blocks()
    cache.pool.try_to_free_sectors()
    return float(cache.pool.num_free_sectors / cache.num_sectors)
