"""What a cache may cost, in one of three units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kvmix_fx.errors import BudgetError
from kvmix_fx.plan.checks import check_integer
from kvmix_fx.plan.geometry import ModelGeometry
from kvmix_fx.plan.schema import KVPlan, LayerPlan
from kvmix_kernels import layout

_UNITS = ("bits", "bytes_per_token", "total_bytes")

_SLACK = 1e-9
"""Relative: costs are sums of floats."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """An upper bound on the cost of a cache. Exactly one of the first three is given.

    Attributes:
        bits: mean effective bits per cached element (codes, scales and offsets) in the limit of long
            contexts, where windows and sinks vanish; what `KVPlan.bits_per_element()` says.
        bytes_per_token: bytes that one more token of one batch row costs over all layers and ranks, in the
            same limit; what `KVPlan.bytes_per_token` says.
        total_bytes: bytes allocated by a growing cache of `batch` rows and `length` tokens, on each of
            `tp_size` ranks. Windows, sinks, tiles and slack count; what
            `KVPlan.nbytes(batch, length, tp_size=tp_size)` says.
        batch: rows, for total_bytes only.
        length: tokens in each row, for total_bytes only.
        itemsize: bytes of one element of the model's dtype, for total_bytes only.
        tp_size: ranks that share the KV heads, for total_bytes only; 1: total_bytes is the whole cache's.

    Raises:
        BudgetError: none or several of the three are given, batch, length and tp_size do not go with them,
            or a number is not positive and finite.
        PlanFieldError: batch, length, itemsize or tp_size is no integer, or is below 1.
    """

    bits: float | None = None
    bytes_per_token: float | None = None
    total_bytes: float | None = None
    batch: int | None = None
    length: int | None = None
    itemsize: int = 2
    tp_size: int = 1

    def __post_init__(self) -> None:
        given = [unit for unit in _UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise BudgetError(
                f"a budget is one of {', '.join(_UNITS)}; got {' and '.join(given) or 'none of them'}"
            )
        amount = getattr(self, given[0])
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise BudgetError(f"the budget's {given[0]} must be a number, got {amount!r}")
        if not (math.isfinite(amount) and amount > 0):
            raise BudgetError(f"the budget's {given[0]} must be positive and finite, got {amount}")
        sized = self.batch is not None or self.length is not None or self.tp_size != 1
        if self.total_bytes is None and sized:
            raise BudgetError(
                "batch and length go with total_bytes, like tp_size; the other budgets do not depend on them"
            )
        if self.total_bytes is not None:
            if self.batch is None or self.length is None:
                raise BudgetError("total_bytes needs the batch and the length of the cache that must fit")
            check_integer("batch", self.batch, 1)
            check_integer("length", self.length, 1)
        check_integer("itemsize", self.itemsize, 1)
        check_integer("tp_size", self.tp_size, 1)

    @property
    def unit(self) -> str:
        """Which of the three is given."""
        return next(unit for unit in _UNITS if getattr(self, unit) is not None)

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(getattr(self, self.unit))

    def cost(self, plan: KVPlan) -> float:
        """What `plan` costs in this budget's unit.

        Raises:
            PlanGeometryError: the plan carries no geometry and the figure depends on it.
            HeadSplitError: its KV heads cannot be shared out among `tp_size` ranks.
        """
        if self.bits is not None:
            return plan.bits_per_element()
        if self.bytes_per_token is not None:
            return plan.bytes_per_token
        assert self.batch is not None
        assert self.length is not None
        return float(plan.nbytes(self.batch, self.length, itemsize=self.itemsize, tp_size=self.tp_size))

    def allows(self, cost: float) -> bool:
        """Whether a plan of this `cost`, in this budget's unit, is within the budget."""
        return cost <= self.amount * (1 + _SLACK)

    def layer_cost(self, layer: LayerPlan, geometry: ModelGeometry) -> float:
        """What a plan of one such layer costs; `of_layers` takes the sum of these over a plan's layers."""
        return self.cost(KVPlan((layer,), geometry.one_layer()))

    def of_layers(self, total: float, geometry: ModelGeometry) -> float:
        """Cost of a plan from the sum of its layers' costs: bits are a mean over layers, bytes a sum."""
        return total / self._share(geometry)

    def layer_limit(self, geometry: ModelGeometry) -> float:
        """The largest sum of layers' costs that the budget allows."""
        return self.amount * (1 + _SLACK) * self._share(geometry)

    def _share(self, geometry: ModelGeometry) -> int:
        return geometry.num_layers if self.bits is not None else 1

    def check(self, cheapest: float, geometry: ModelGeometry) -> None:
        """Refuse a budget that no plan of the menu meets, or that a plain cache meets.

        Args:
            cheapest: cost of the cheapest plan that the menu offers, in this budget's unit.
            geometry: of the model.

        Raises:
            BudgetError: the budget is below `cheapest`, or above a cache of 16 bits.
        """
        if not self.allows(cheapest):
            raise BudgetError(
                f"a budget of {self} is below the {cheapest:,.6g} of the cheapest plan: raise it (of "
                "the formats that were measured, none takes less)"
            )
        raw = self._raw_cost(geometry)
        if self.amount > raw * (1 + _SLACK):
            raise BudgetError(
                f"a budget of {self} is above the {raw:,.6g} of an unquantized cache, which needs no plan"
            )

    def _raw_cost(self, geometry: ModelGeometry) -> float:
        elements = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim
        if self.bits is not None:
            return float(layout.RAW_BITS)
        if self.bytes_per_token is not None:
            return elements * layout.RAW_BITS / 8
        assert self.batch is not None
        assert self.length is not None
        return elements * self.batch * self.length * self.itemsize / self.tp_size

    def to_dict(self) -> dict[str, Any]:
        """The fields that are given, for a plan's provenance."""
        fields = {self.unit: getattr(self, self.unit)}
        if self.total_bytes is not None:
            fields |= {"batch": self.batch, "length": self.length, "itemsize": self.itemsize}
            fields |= {"tp_size": self.tp_size} if self.tp_size != 1 else {}
        return fields

    def __str__(self) -> str:
        text = f"{self.amount:,.10g} {self.unit.replace('_', ' ')}"
        if self.length is None:
            return text
        each = f" on each of {self.tp_size} ranks" if self.tp_size != 1 else ""
        return f"{text}{each} (batch {self.batch}, {self.length:,} tokens)"
