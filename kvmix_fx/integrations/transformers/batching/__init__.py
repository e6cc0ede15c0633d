"""Continuous batching: transformers' engine (5.23 or later) over packed pages.

The engine stays what it is: its scheduler, its prefix sharing, its chunked prefill. It is given a cache whose
full-attention layers are packed pages (`cache.py`, `allocator.py`) and an attention function by name
(`attention.py`), by a manager of ours (`manager.py`). Nothing of transformers is patched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmix_fx.errors import MissingPackageError, ServingError
from kvmix_fx.plan import KVPlan

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from kvmix_fx.integrations.transformers.batching.manager import PackedBatchingManager

OLDEST = "5.23"
"""The transformers whose caches are made of allocators."""


def serve(
    model: PreTrainedModel,
    plan: KVPlan | None = None,
    *,
    memory: int | None = None,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
) -> PackedBatchingManager:
    """The engine of continuous batching for `model`, on pages packed as `plan` says; not started yet.

    Use it as a context manager, or `start()` and `close()` it. Until it is closed the model attends to its
    pages and nothing else; then it is as it was.

    Args:
        model: a causal language model of transformers; may be one that `kvmix_fx.compile` has compiled.
        plan: bits per layer; None for the plan that the model was compiled with.
        memory: bytes for pages, raw tails and sinks; None for what the engine would take, or
            `continuous_batching_config.num_blocks`, which counts blocks of 16 bits.
        generation_config: as of `model.init_continuous_batching`.
        continuous_batching_config: likewise; pages are as long as the plan wants unless `page_size` is
            another multiple of its tile.
        workload_hints: likewise.

    Raises:
        MissingPackageError: transformers is older than 5.23.
        ServingError: there is no plan, or something of model, plan or options does not go with packed pages.
        FormatError: the plan chooses something from each prompt, which pages cannot share.
        PlanLayerError, HeadSizeError, PlanGeometryError: the plan does not fit the model.
        PoolError: the memory holds no request.
    """
    require_engine("kvmix_fx.serve")
    from kvmix_fx.integrations.transformers.batching.manager import make_manager

    return make_manager(model, plan, memory, generation_config, continuous_batching_config, workload_hints)


def require_engine(purpose: str) -> None:
    """Raise MissingPackageError unless this transformers has an engine of which caches can be ours."""
    import transformers

    try:
        from transformers.generation.continuous_batching import cache_allocators  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            f"continuous batching needs transformers >= {OLDEST}, and {transformers.__version__} is "
            f'installed: for {purpose}, pip install "transformers>={OLDEST}"'
        ) from None


class PackedBatching:
    """`model.init_continuous_batching` of a compiled model, through which `generate_batch` goes too."""

    def __init__(self, model: PreTrainedModel, plan: KVPlan) -> None:
        """`plan`: the one that the model is compiled with."""
        self._model, self._plan = model, plan

    def __call__(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
        **rest: Any,
    ) -> Any:
        """As the original, with packed pages."""
        require_engine("generate_batch of a compiled model")
        if getattr(self._model, "_cached_continuous_batching_manager", None) is not None:
            raise ServingError(
                "this model has kept a manager with 16-bit pages from before it was compiled: call "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        return serve(
            self._model,
            self._plan,
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            workload_hints=workload_hints,
            **rest,
        )


__all__ = ["PackedBatching", "require_engine", "serve"]
