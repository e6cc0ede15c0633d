"""lm-evaluation-harness: the model type `kvmix`, the harness's own `hf` with a packed cache.

    python -m kvmix_fx.integrations.lm_eval run --model kvmix \
        --model_args pretrained=Qwen/Qwen3-0.6B,plan=plan.json --tasks hellaswag --batch_size 8

That is the harness's own command line, to which this module has made the type known; in Python, importing
this module does.

The harness scores a continuation in one forward over context and continuation, which never reads a packed
cache, so that every plan would look perfect. Here contexts are packed first, see
`kvmix_fx.evaluation.likelihood`. A rolling log-likelihood, of a text without a context, is read in steps.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvmix_fx.api import compile, compiled
from kvmix_fx.errors import EvaluationError, MissingPackageError
from kvmix_fx.evaluation.likelihood import STEP, Continuation, log_likelihoods
from kvmix_fx.plan import KVPlan, default_plan

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingPackageError.for_extra("lm_eval", "lm-eval", "evaluating with its tasks") from error

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness calls it, token ids of the context, and of the continuation."""


@register_model("kvmix")
class KVMixLM(HFLM):
    """The harness's `hf` over a packed cache.

    Takes all that `hf` takes, except `batch_size=auto` and encoder-decoders.
    """

    def __init__(
        self,
        pretrained: Any,
        plan: KVPlan | str | Path | None = None,
        *,
        preset: str | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        bits: float | None = None,
        group_size: int | None = None,
        window: int | None = None,
        sink_length: int | None = None,
        step: int = STEP,
        inner: str | None = None,
        **options: Any,
    ) -> None:
        """Load a model as `hf` does, and compile it.

        Args:
            pretrained: a folder, a Hub id or a model.
            plan: a plan, a file or folder that holds one, a Hub id, or the name of one that comes along
                ("kvmix:smollm2-135m/2.5").
            preset: instead, the name of a preset; without a plan "tiers", or "uniform" if there are key_bits.
            key_bits: of the preset, like the five that follow; each None for what the preset has itself.
            value_bits: of the preset.
            bits: of the preset "tiers".
            group_size: of the preset.
            window: of the preset.
            sink_length: of the preset.
            step: tokens of a continuation that are read at a time; 1 is what decoding does.
            inner: as for `kvmix_fx.compile`.
            options: of `hf`.

        Raises:
            EvaluationError: a plan and a preset at once, batch_size="auto", or no causal language model.
            PlanError, HeadSizeError: the plan cannot be read, or does not fit the model.
        """
        given = {
            "key_bits": key_bits,
            "value_bits": value_bits,
            "bits": bits,
            "group_size": group_size,
            "window": window,
            "sink_length": sink_length,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        if plan is not None and (preset is not None or arguments):
            raise EvaluationError("a plan is given: leave out the preset and what it takes")
        if str(options.get("batch_size", 1)).startswith("auto"):
            raise EvaluationError(
                'batch_size="auto" tries forwards that a packed cache does not take: pass a number'
            )
        if step < 1:
            raise EvaluationError(f"step must be at least 1, got {step}")
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise EvaluationError(f"the model type kvmix is for causal language models, not {self.backend}")
        self.step = step
        self._warned = False
        compile(self.model, _plan(plan, preset, arguments, self.model), inner=inner)

    @property
    def plan(self) -> KVPlan:
        """The plan that the model was compiled with."""
        return compiled(self.model).plan

    def get_model_info(self) -> dict[str, Any]:
        """What results say about the model: as `hf`, and the plan."""
        plan = self.plan
        told = {
            "kvmix_plan": plan.name,
            "kvmix_plan_digest": plan.digest,
            "kvmix_bits_per_element": plan.bits_per_element(),
            "kvmix_step": self.step,
        }
        return {**super().get_model_info(), **told}

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """What all kinds of log-likelihood of the harness come down to."""
        asked = [self._fitting(context, tokens) for _, context, tokens in requests]
        self._warn_of_short(asked)
        quiet = disable_tqdm or self.rank != 0
        bar = tqdm(total=len(asked), disable=quiet, desc="loglikelihood, contexts packed")
        half = self.mixed_precision_dtype
        with bar, torch.autocast(self.device.type, half, enabled=half is not None):
            found = log_likelihoods(
                self.model,
                asked,
                batch=override_bs or self.batch_size,
                step=self.step,
                softmax_dtype=self.softmax_dtype,
                advance=bar.update,
            )
        answers = [(one.log_probability, one.is_greedy) for one in found]
        for (name, _, _), answer in zip(requests, answers, strict=True):
            if name is not None:
                self.cache_hook.add_partial("loglikelihood", name, answer)
        return answers

    def _fitting(self, context: list[int], tokens: list[int]) -> Continuation:
        """Cut from the left to what the model takes, as `hf` does."""
        more = len(context) + len(tokens) - (self.max_length + 1)
        if more > 0:
            log.warning("cutting %d tokens from the left: the model takes %d", more, self.max_length)
        return Continuation(context[max(0, more) :], tokens)

    def _warn_of_short(self, asked: Sequence[Continuation]) -> None:
        """Say how many requests read nothing packed: they would be as good under any plan."""
        needed = [
            layer.sink_length + layer.window.length + layer.tile_length
            for layer in self.plan.layers
            if not layer.is_raw
        ]
        # what is stored before the last step of a continuation
        stored = (len(one.context) - 1 + (len(one.tokens) - 1) // self.step * self.step for one in asked)
        short = sum(count < min(needed, default=0) for count in stored)
        if short and not self._warned:
            self._warned = True
            log.warning(
                "%d of %d requests read a cache in which nothing is packed yet, as under any plan: this one "
                "packs from %d tokens on. Give more examples (--num_fewshot), or take longer texts",
                short,
                len(asked),
                min(needed),
            )


def _plan(
    plan: KVPlan | str | Path | None, preset: str | None, arguments: dict[str, Any], model: Any
) -> KVPlan:
    if isinstance(plan, KVPlan):
        return plan
    if plan is not None:
        # a missing file is a missing file, not the name of a Hub repository
        return KVPlan.load(plan) if str(plan).endswith(".json") else KVPlan.from_pretrained(plan)
    if preset is None and not arguments:
        return default_plan(model)
    usual = "uniform" if "key_bits" in arguments else "tiers"
    return KVPlan.preset(preset or usual, model, **arguments)


if __name__ == "__main__":
    importlib.import_module("lm_eval.__main__").cli_evaluate()

__all__ = ["KVMixLM"]
