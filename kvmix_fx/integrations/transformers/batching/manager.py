"""The engine's manager with packed pages: what it needs beyond the original, and how it is undone."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from kvmix_fx.errors import RequestLengthError, ServingError
from kvmix_fx.integrations.transformers.batching import attention
from kvmix_fx.integrations.transformers.batching.cache import (
    NO_LIMIT,
    PackedCache,
    layer_groups,
    pages_for,
)
from kvmix_fx.integrations.transformers.batching.runner import PackedRunner, can_record
from kvmix_fx.parallel import check_placement
from kvmix_fx.plan import KVPlan


@dataclass
class Counts:
    """What a manager has done.

    steps: of the model; tokens: computed; new: generated; finished: requests that ended; failed: of them,
    those with an error.
    """

    steps: int = 0
    tokens: int = 0
    new: int = 0
    finished: int = 0
    failed: int = 0


class CountingRouter(OutputRouter):
    """The engine's router of results, which counts those that are final."""

    def __init__(self, counts: Counts) -> None:
        """`counts`: to be kept up to date."""
        super().__init__()
        self._counts = counts

    def _count(self, output: Any) -> None:
        self._counts.finished += bool(output.is_finished() or output.error is not None)
        self._counts.failed += output.error is not None

    def deliver(self, output: Any) -> None:
        """As the original."""
        self._count(output)
        super().deliver(output)

    def deliver_batch(self, outputs: Any) -> None:
        """As the original."""
        for output in outputs:
            self._count(output)
        super().deliver_batch(outputs)


GPU_PAGE = 128
"""Fewest tokens of a page on a GPU, unless `page_size` says otherwise."""
_open: set[int] = set()
_lock = threading.Lock()


def make_manager(
    model: PreTrainedModel,
    plan: KVPlan | None,
    memory: int | None,
    generation_config: GenerationConfig | None,
    config: Any,
    hints: Any,
) -> PackedBatchingManager:
    """What `serve` returns, after checking all that was given."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "init_continuous_batching"):
        raise ServingError(
            f"kvmix_fx.serve takes a model of transformers that generates text, got {type(model).__name__}"
        )
    compiled = vars(model).get("_kvmix")
    if plan is None:
        if compiled is None:
            raise ServingError(
                "kvmix_fx.serve needs a plan: make one with KVPlan.uniform(model, 4, 2), "
                "KVPlan.from_pretrained(file) or a profile of the model"
            )
        plan = compiled.plan
    assert plan is not None
    if model.config._attn_implementation == attention.NAME:
        raise ServingError("this model is being served already: close its manager first")
    check_placement(model)
    plan = plan.for_model(model)
    given = config if config is not None else ContinuousBatchingConfig()
    _check_options(given, model.device.type == "cuda")
    chosen = generation_config if generation_config is not None else model.generation_config
    if chosen.eos_token_id is None:
        # as init_continuous_batching does for a model that tells no end of sequence, but not in its own
        chosen = copy.deepcopy(chosen)
        chosen.eos_token_id = -1
    return PackedBatchingManager(model, plan, memory, chosen, given, hints)


def _check_options(config: Any, on_gpu: bool) -> None:
    if config.cpu_offload_space is None or config.cpu_offload_space > 0:
        raise ServingError(
            "packed pages are not offloaded to the CPU: leave cpu_offload_space at 0; requests that do not "
            "fit are computed again"
        )
    compiles = config.varlen_compile_config or config.decode_compile_config or config.default_compile_level
    if compiles:
        raise ServingError(
            "steps over packed pages are not compiled: leave varlen_compile_config, decode_compile_config "
            "and default_compile_level alone"
        )
    if config.use_async_batching and not on_gpu:
        raise ServingError(
            "steps are overlapped on GPUs alone: leave use_async_batching alone, or move the model to one"
        )
    if isinstance(config.use_cuda_graph, tuple) and config.use_cuda_graph[0]:
        raise ServingError(
            "steps with prompts in them are not recorded as CUDA graphs, only those that decode: set "
            "use_cuda_graph to (False, True), or leave it alone"
        )


class PackedBatchingManager(ContinuousBatchingManager):
    """`ContinuousBatchingManager` over packed pages.

    Attributes:
        plan: bits per layer.
        capacity: the most tokens that one request can have, prompt and answer.
        counts: what it has done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: KVPlan,
        memory: int | None,
        generation_config: GenerationConfig,
        config: Any,
        hints: Any,
    ) -> None:
        """Allocate the pool. The model is changed when all has been checked."""
        self.plan, self.memory = plan, memory
        text = model.config.get_text_config()
        size, default = config.page_size, type(config).page_size
        graphs = config.use_cuda_graph
        self._graphs_asked = graphs[1] if isinstance(graphs, tuple) else graphs
        # what cannot be served is found before anything of the model is touched
        pages = pages_for(plan, layer_groups(text), 1, model.dtype, None if size == default else size, 0)
        if size == default and model.device.type == "cuda" and pages.tokens < GPU_PAGE:
            # kernels read shorter ones no faster than they look them up
            longer = -(-GPU_PAGE // pages.tokens) * pages.tokens
            pages = pages_for(plan, layer_groups(text), 1, model.dtype, longer, 0)
        try:
            super().__init__(model, generation_config, config, hints)  # pyrefly: ignore[bad-argument-type]
            self.counts = Counts()
            self.output_router = CountingRouter(self.counts)
            self.continuous_batching_config.page_size = pages.tokens
            self.continuous_batching_config.max_blocks_per_request = 0
            self._runs = _Uncompiled(model) if "_kvmix" in vars(model) else model
            self.batch_processor = self._create_batch_processor()
        except BaseException:
            self._restore_attention()
            raise

    # ---- the model's attention

    def switch_to_cb_friendly_attn(
        self,
        model: Any,
        auto_switch_to_flash: bool = True,  # noqa: ARG002
    ) -> None:
        """Let the model attend to pages."""
        before = model.config._attn_implementation
        if before == attention.NAME:
            return
        with _lock:
            attention.register()
            _open.add(id(self))
        model.set_attn_implementation(attention.NAME)
        if model.config._attn_implementation != attention.NAME:
            self._unregister()
            raise ServingError(
                f"{type(model).__name__} has attention of its own, which cannot be given another: it cannot "
                "be served from packed pages"
            )
        self._original_attn_impl = before

    def _restore_attention(self) -> None:
        before = getattr(self, "_original_attn_impl", None)
        if before is not None:
            self.model.set_attn_implementation(before)
            self._original_attn_impl: str | None = None
        self._unregister()

    def _unregister(self) -> None:
        with _lock:
            _open.discard(id(self))
            if not _open:
                attention.unregister()

    # ---- life

    def start(self) -> None:
        """Start the thread that steps."""
        self.switch_to_cb_friendly_attn(self.model)
        super().start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """As the original; the model gets its attention back. It is never kept for another session."""
        if keep_for_next_session:
            warnings.warn(
                "packed pages are not kept from one generate_batch to the next: use kvmix_fx.serve for that",
                stacklevel=2,
            )
        super().stop(block, timeout, False, hard_stop)
        if not self.is_running():
            self._restore_attention()

    def close(self) -> None:
        """Stop, fail what still runs, free the pool, and leave the model as it was. Again is no harm."""
        if self._generation_thread is not None:
            self.stop(hard_stop=True)
        self.batch_processor = None
        self._restore_attention()
        self.distributed_helper.destroy_cpu_comm_group()

    def destroy(self) -> None:
        """As the original."""
        super().destroy()
        self.close()

    def __enter__(self) -> PackedBatchingManager:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.is_running():
            self.stop()
        self.close()

    # ---- the cache

    @property
    def cache(self) -> PackedCache:
        """The pages.

        Raises:
            ServingError: the manager has been stopped.
        """
        if self.batch_processor is None:
            raise ServingError("this manager has been stopped and has no pages: start it again")
        cache = self.batch_processor.cache
        assert isinstance(cache, PackedCache)
        return cache

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        """As the original, with a cache of ours."""
        made = getattr(self, "batch_processor", None)
        if made is not None:
            made.reset()
            return made
        config, model = self.continuous_batching_config, self.model
        supports = getattr(model, "_supports_logits_to_keep", None)
        cache = PackedCache(
            model.config.get_text_config(),
            config,
            model.device,
            self.distributed_helper,
            model.dtype,
            callable(supports) and supports(),
            self.plan,
            self.memory,
        )
        self._use_prefix_sharing = cache.use_prefix_sharing
        asked = self._graphs_asked
        if asked is None:
            # collectives in graphs are the engine's to ask for
            asked = self.distributed_helper.tp_size == 1
        config.use_cuda_graph = (False, bool(asked) and can_record(cache))
        update_cb_config_after_cache_creation(config, cache.num_blocks, cache.max_batch_tokens)
        scheduler = SCHEDULER_MAPPING.get(config.scheduler_type, FIFOScheduler)(
            cache=cache,
            safety_margin=config.safety_margin,
            max_requests_per_batch=config.max_requests_per_batch,
        )
        processor = ContinuousBatchProcessor(
            cache=cache,
            config=model.config.get_text_config(),
            generation_config=self.generation_config,
            continuous_batching_config=config,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue if self.is_tp_driver else None,
            cancel_queue=self.cancel_queue if self.is_tp_driver else None,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=model.device,
            model_dtype=model.dtype,
            scheduler=scheduler,
            distributed_helper=self.distributed_helper,
        )
        # pages are read by their own tables, so what a step reads has no limit but the pool; the engine has
        # made its tables by now
        if len(cache.cache_allocators) == 1:
            cache.max_tokens_read = NO_LIMIT
        self.capacity = infer_max_single_request_tokens(cache)
        processor.model_runner = PackedRunner(
            logit_processor=self.logit_processor,
            cb_config=config,
            inputs_and_outputs=processor.inputs_and_outputs,
            cache=cache,
            do_sample=processor.do_sample,
            return_logprobs=processor.return_logprobs,
        )
        return processor

    def _generation_step(self) -> None:
        assert self.batch_processor is not None
        runs: Any = self._runs
        prepared: Any = self.batch_processor.inputs_and_outputs
        if self.batch_processor.use_async_batching:
            prepared = prepared.io_pairs[prepared.current_pair].host_io
        batch = list(prepared.requests_in_batch)
        self.batch_processor._generation_step(runs)
        self.counts.steps += 1
        self.counts.tokens += sum(future.query_length for future in batch)
        self.counts.new += sum(future.has_new_token for future in batch)

    # ---- requests

    def _limit(self, input_ids: Sequence[int], max_new_tokens: int | None) -> int:
        """New tokens that a request may have.

        Raises:
            RequestLengthError: the pool could never hold it.
        """
        asked = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        room = self.capacity - len(input_ids)
        if not len(input_ids):
            raise RequestLengthError("a request without tokens: give at least one")
        if room < 1 or (asked is not None and asked > room):
            wanted = "" if asked is None else f" and {asked} new ones"
            raise RequestLengthError(
                f"{len(input_ids)} tokens{wanted} do not fit into the pool, which holds a request of "
                f"{self.capacity} tokens: ask for less, or serve with more memory"
            )
        return room if asked is None else asked

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """As the original. Without a number of new tokens, at most as many as the pool has room for.

        Raises:
            RequestLengthError: the pool could never hold the request.
        """
        limit = self._limit(input_ids, max_new_tokens)
        return super().add_request(
            input_ids, request_id, limit, streaming, record_timestamps, eos_token_id, **logit_processor_kwargs
        )

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """As the original; a request that the pool could never hold gets its error as its result."""
        refused: dict[int, RequestLengthError] = {}
        for number, tokens in enumerate(inputs):
            try:
                self._limit(tokens, max_new_tokens)
            except RequestLengthError as error:
                refused[number] = error
        good = [tokens for number, tokens in enumerate(inputs) if number not in refused]
        ids = iter(
            super().add_requests(good, max_new_tokens, streaming, record_timestamps, **logit_processor_kwargs)
        )
        found: list[str] = []
        for number, tokens in enumerate(inputs):
            if number not in refused:
                found.append(next(ids))
                continue
            with self._request_lock:
                name = f"req_{self._request_counter}"
                self._request_counter += 1
            self.output_router.fail_and_deliver(RequestState(name, list(tokens)), refused[number])
            found.append(name)
        return found


class _Uncompiled:
    """A compiled model as the engine calls it: its own forward, and everything else of it."""

    def __init__(self, model: nn.Module) -> None:
        replaced = vars(model)["_kvmix"].replaced
        self._model = model
        self._forward = replaced.get("forward") or type(model).forward.__get__(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


__all__ = ["PackedBatchingManager", "make_manager"]
