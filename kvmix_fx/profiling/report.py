"""A profile: what was measured of one model, kept so that plans can be solved without the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvmix_fx.errors import (
    KVMixError,
    MissingPackageError,
    PlanGeometryError,
    ProfileFileError,
    ProfileMismatchError,
    SignalError,
)
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, Provenance, QuantSpec
from kvmix_fx.plan.checks import check_choice
from kvmix_fx.plan.orders import decode_order
from kvmix_fx.plan.prices import Drop, Menu, Prices, Scores
from kvmix_fx.plan.schema import Order

FORMAT = "kvmix_profile"
VERSION = 2
"""2 has orders of channels, and what dropping some costs."""
ROLES = ("key", "value")

DEFAULT_ALLOCATOR = "exact"

MAX_DROP_KL = 0.0006
"""Nats per prediction. Layers whose channels cost more when a quarter of them is dropped keep all of them."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was profiled.

    Attributes:
        name: path or Hub id, or the name of its class.
        architecture: digest of the names and shapes of all parameters and buffers; equal for every
            dtype and every fine-tuned copy.
    """

    name: str
    architecture: str

    @classmethod
    def of(cls, model: Any) -> ModelIdentity:
        """Of a torch module."""
        shapes = sorted((name, tuple(p.shape)) for name, p in model.named_parameters())
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        if Path(name).is_dir():
            name = Path(name).name  # where it lies is nobody's business but this machine's
        return cls(str(name), hashlib.sha256(repr(shapes).encode()).hexdigest())


@dataclass(frozen=True)
class Profile:
    """Scores and prices of every layer's keys and values, with what they were measured on.

    Attributes:
        scores: by signal, one number per tensor.
        prices: by signal, one number per tensor and format.
        menu: the formats that were priced.
        geometry: of the model's cache.
        model: which model.
        data: the calibration text: source, prompts, length, tokens, digest.
        settings: window of recent tokens, seed, mean loss on the text (nats per token), package version.
        unavailable: signals that this model does not offer, with the reason.
        skipped: layers that the pass leaves at 16 bits, with the reason; their numbers are 0 and what a
            plan says about them has no effect.
        orders: the order of each layer's channels for formats with tiers, as `QuantSpec.channel_order`
            has it; empty where the menu has none.
        drops: what dropping channels costs each layer, by position of the format in the menu's keys: KL in
            nats per prediction over the text, and in its worst prompt.
    """

    scores: Mapping[str, Scores]
    prices: Mapping[str, Prices]
    menu: Menu
    geometry: ModelGeometry
    model: ModelIdentity
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[int, str] = field(default_factory=dict)
    orders: tuple[str, ...] = ()
    drops: Mapping[int, tuple[Drop, ...]] = field(default_factory=dict)

    @property
    def signals(self) -> tuple[str, ...]:
        """What was measured; the first is what `plan` uses unless told."""
        preferred = [name for name in PREFERENCE if name in self.prices or name in self.scores]
        return (*preferred, *(n for n in (*self.prices, *self.scores) if n not in preferred))

    def signal(self, name: str | None = None) -> Scores | Prices:
        """One signal's numbers; None for the best that was measured.

        Raises:
            SignalError: it was not measured, or this model does not offer it.
        """
        if name is None:
            name = self.signals[0]
        found = self.prices.get(name) or self.scores.get(name)
        if found is None:
            why = self.unavailable.get(name)
            reason = f"is not available for this model: {why}" if why else "was not measured"
            raise SignalError(f"signal {name!r} {reason}; this profile has {', '.join(self.signals)}")
        return found

    def plan(
        self,
        *,
        bits: float | None = None,
        bytes_per_token: float | None = None,
        total_bytes: int | None = None,
        batch: int | None = None,
        length: int | None = None,
        tp_size: int = 1,
        signal: str | None = None,
        allocator: str = DEFAULT_ALLOCATOR,
        menu: Menu | None = None,
        order: Order = "plan",
        max_drop_kl: float = MAX_DROP_KL,
        **options: Any,
    ) -> KVPlan:
        """Spend a budget where it matters; needs no model and no GPU.

        Args:
            bits: effective bits per element, with scales and offsets, in the long-context limit.
            bytes_per_token: of one batch row over all layers and ranks, instead.
            total_bytes: of the cache on one rank, instead; with `batch` and `length`.
            batch: rows, for `total_bytes`.
            length: tokens, for `total_bytes`.
            tp_size: ranks that share the KV heads, for `total_bytes`; with 1 that is the whole cache's.
            signal: what to go by; None for the best that was measured.
            allocator: how to spend; see `kvmix_fx.plan.allocators`.
            menu: some of the formats that were priced; None for all.
            order: of the channels of formats with tiers: "plan", as it was measured, or "prompt".
            max_drop_kl: the largest divergence, nats per prediction, that dropping channels of one layer may
                have cost on the text for a plan to do so there. Formats that drop channels and were not
                measured are never taken.
            options: of the allocator, and `window`, `sink_length` and `tile` of the plan.

        Returns:
            A plan with this model's geometry and its provenance: signal, data, model, budget, version.

        Raises:
            SignalError: the signal was not measured.
            PlanFieldError: the menu has a format without a price, or the order is neither.
            PlanError: the budget or the allocator means nothing, or the budget cannot be met.
            HeadSplitError: the KV heads cannot be shared out among `tp_size` ranks.
        """
        from kvmix_fx.plan.allocators import allocate
        from kvmix_fx.plan.budget import Budget

        budget = Budget(
            bits=bits, bytes_per_token=bytes_per_token, total_bytes=total_bytes,
            batch=batch, length=length, tp_size=tp_size,
        )  # fmt: skip
        check_choice("order", order, ("plan", "prompt"))
        measured = self.signal(signal)
        if isinstance(measured, Scores):
            options["menu"] = menu or self.menu
        else:
            measured = replace(measured, barred=self._barred(max_drop_kl))
            measured = measured if menu is None else measured.within(menu)
        plan = allocate(allocator, measured, budget, self.geometry, **options)
        if order == "plan":
            plan = self.ordered(plan)
        provenance = dict(plan.provenance) | {
            "signal": measured.signal,
            "model": self.model.name,
            "data": dict(self.data),
            "profile": dict(self.settings),
        }
        return replace(plan, provenance=Provenance(provenance), base_model=self.model.name)

    def ordered(self, plan: KVPlan) -> KVPlan:
        """`plan` with this profile's orders in the layers that would choose one from the prompt."""

        def with_order(index: int, layer: LayerPlan) -> LayerPlan:
            if layer.key.order != "prompt" or not self.orders or not self.orders[index]:
                return layer
            return replace(layer, key=replace(layer.key, order="plan", channel_order=self.orders[index]))

        return replace(plan, layers=tuple(with_order(*entry) for entry in enumerate(plan.layers)))

    def droppable(self, max_drop_kl: float = MAX_DROP_KL) -> tuple[int, ...]:
        """Layers that may have every format of the menu that drops channels; see `plan`."""
        barred = {layer for layer, _ in self._barred(max_drop_kl)}
        return tuple(n for n in range(self.geometry.num_layers) if self.drops and n not in barred)

    def _barred(self, max_drop_kl: float) -> frozenset[tuple[int, int]]:
        return frozenset(
            (layer, place)
            for place in self.menu.dropping()
            for layer in range(self.geometry.num_layers)
            if place not in self.drops or not self.drops[place][layer].mean <= max_drop_kl
        )

    def check_model(self, model: Any) -> None:
        """Raise ProfileMismatchError unless `model` has the architecture that was profiled."""
        other = ModelIdentity.of(model)
        if other.architecture == self.model.architecture:
            return
        try:
            geometry = ModelGeometry.of(model)
        except PlanGeometryError:
            geometry = None
        difference = (
            f"{self.geometry} against {geometry}" if geometry != self.geometry else "other parameters"
        )
        raise ProfileMismatchError(
            f"this profile is of {self.model.name!r}, the model is {other.name!r} ({difference}): "
            "profile this model with kvmix_fx.profile(model)"
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: arrays of numbers, and everything else as JSON in its header.

        Raises:
            MissingPackageError: safetensors is not installed.
        """
        numpy = _safetensors()
        arrays = self._arrays()
        content = {
            "format": FORMAT,
            "version": VERSION,
            "scores": list(self.scores),
            "prices": list(self.prices),
            "menu": {role: [asdict(spec) for spec in specs] for role, specs in _menu_roles(self.menu)},
            "geometry": self.geometry.to_dict(),
            "model": asdict(self.model),
            "data": dict(self.data),
            "settings": dict(self.settings),
            "unavailable": dict(self.unavailable),
            "skipped": {str(layer): reason for layer, reason in self.skipped.items()},
            "orders": list(self.orders),
            "drops": {str(place): [list(drop) for drop in found] for place, found in self.drops.items()},
        }
        text = json.dumps(content, allow_nan=False, sort_keys=True)
        path = Path(path)
        numpy.save_file(arrays, path, metadata={FORMAT: text, "digest": _digest(text, arrays)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` wrote.

        Raises:
            ProfileFileError: missing, damaged, or of a newer version.
            MissingPackageError: safetensors is not installed.
        """
        _safetensors()
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except OSError as error:
            raise ProfileFileError(f"{path} cannot be read as a profile: {error}") from error
        except SafetensorError as error:
            with Path(path).open("rb") as file:
                is_json = file.read(64).lstrip().startswith(b"{")
            kind = "looks like a plan" if is_json else "is no safetensors file, or a damaged one"
            raise ProfileFileError(
                f"{path} cannot be read as a profile: it {kind}; "
                "`kvmix profile MODEL --out FILE` writes profiles"
            ) from error
        if FORMAT not in header:
            raise ProfileFileError(
                f"{path} is a safetensors file, but no profile; `kvmix profile` writes them"
            )
        if header.get("digest") != _digest(header[FORMAT], arrays):
            raise ProfileFileError(f"{path} is damaged: its digest does not match its content")
        try:
            content = json.loads(header[FORMAT])
            json.dumps(content, allow_nan=False)  # Python reads numbers that JSON does not have
        except (ValueError, RecursionError) as error:
            raise ProfileFileError(f"{path} is damaged: its header cannot be read ({error})") from error
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ProfileFileError(
                f"{path} has version {version}, this package reads up to {VERSION}: update kvmix-fx"
            )
        try:
            return cls._from(content, arrays)._checked()
        except KeyError as error:
            raise ProfileFileError(
                f"{path} is no profile that this package can read: lacks {error}"
            ) from error
        except (TypeError, ValueError, AttributeError, KVMixError) as error:
            raise ProfileFileError(f"{path} is no profile that this package can read: {error}") from error

    @classmethod
    def _from(cls, content: dict[str, Any], arrays: dict[str, Any]) -> Profile:
        keys, values = (tuple(QuantSpec(**spec) for spec in content["menu"][role]) for role in ROLES)
        menu = Menu(keys, values)

        def columns(kind: str, name: str) -> list[Any]:
            return [arrays[f"{kind}/{name}/{role}"].tolist() for role in ROLES]

        scores = {name: Scores(name, *map(tuple, columns("scores", name))) for name in content["scores"]}
        prices = {}
        for name in content["prices"]:
            key_rows, value_rows = (tuple(map(tuple, rows)) for rows in columns("prices", name))
            prices[name] = Prices(name, menu, key_rows, value_rows)
        return cls(
            scores,
            prices,
            menu,
            ModelGeometry.from_dict(content["geometry"]),
            ModelIdentity(**content["model"]),
            content["data"],
            content["settings"],
            content["unavailable"],
            {int(layer): reason for layer, reason in content["skipped"].items()},
            tuple(content.get("orders", ())),
            {
                int(place): tuple(Drop(*drop) for drop in found)
                for place, found in content.get("drops", {}).items()
            },
        )

    def _checked(self) -> Profile:
        """This one, whose parts come from a file that anybody may have written, if they fit each other."""
        layers = self.geometry.num_layers
        texts = (self.model.name, self.model.architecture, *self.unavailable.values(), *self.skipped.values())
        if not all(isinstance(text, str) for text in (*texts, *self.orders)):
            raise ProfileFileError("names, reasons and orders are texts")
        if not isinstance(self.data, dict) or not isinstance(self.settings, dict):
            raise ProfileFileError("data and settings are objects")
        if not self.signals:
            raise ProfileFileError("it has no signal")
        found = [len(signal.keys) for signal in (*self.scores.values(), *self.prices.values())]
        found += [len(self.orders)] if self.orders else []
        found += [len(drops) for drops in self.drops.values()]
        if set(found) != {layers} or not all(0 <= layer < layers for layer in self.skipped):
            raise ProfileFileError(f"its numbers are not of {layers} layers, which its geometry has")
        if not self.drops.keys() <= set(range(len(self.menu.keys))):
            raise ProfileFileError("drops are priced of formats that its menu does not have")
        costs = [cost for drops in self.drops.values() for drop in drops for cost in drop]
        if not all(isinstance(cost, (int, float)) and math.isfinite(cost) for cost in costs):
            raise ProfileFileError("what dropping channels costs are finite numbers")
        for order in filter(None, self.orders):
            decode_order(order, self.geometry.head_dim)
        return self

    def plot(self, path: str | Path) -> Path:
        """Draw every signal per layer, keys and values, to a file (PNG, SVG or PDF by its name).

        A signal with prices is drawn at the narrowest format of its menu.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingPackageError(
                'drawing a profile needs matplotlib, which is not installed: pip install "kvmix-fx[plot]"'
            ) from error
        names = self.signals
        figure = Figure(figsize=(8, 2.2 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
        for axis, name in zip(axes, names, strict=True):
            for role, numbers in zip(ROLES, self.per_layer(name), strict=True):
                axis.plot(range(len(numbers)), numbers, marker="o", markersize=3, label=f"{role}s")
            axis.set_ylabel(name.replace("_", "\n", 1), fontsize=8)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
        axes[0].legend(loc="upper right")
        axes[0].set_title(self.model.name)
        axes[-1].set_xlabel("layer")
        figure.savefig(path)
        return Path(path)

    def per_layer(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """One number per layer for keys and for values: scores, or prices of the narrowest format."""
        found = self.signal(name)
        if isinstance(found, Scores):
            return found.keys, found.values
        keys, values = (_narrowest(specs) for specs in (found.menu.keys, found.menu.values))
        return tuple(row[keys] for row in found.keys), tuple(row[values] for row in found.values)

    def describe(self) -> str:
        """A few lines for people."""
        data = self.data
        lines = [
            f"{self.model.name}: {self.geometry.num_layers} layers, {self.geometry.num_kv_heads} KV heads of "
            f"{self.geometry.head_dim}",
            f"measured on {data.get('tokens')} tokens, {data.get('prompts')} prompts of {data.get('source')}",
            f"signals: {', '.join(self.signals)}",
            *(f"not available: {name}: {why}" for name, why in self.unavailable.items()),
            *(f"layer {layer} stays at 16 bits: {why}" for layer, why in self.skipped.items()),
            *self._drops_told(),
        ]
        return "\n".join(lines)

    def _drops_told(self) -> list[str]:
        """Where channels may be dropped, and what that costs over the text and in its worst prompt."""
        told = []
        for place, found in self.drops.items():
            allowed = [drop for drop in found if drop.mean <= MAX_DROP_KL]
            line = f"K{self.menu.keys[place].tiers}: {len(allowed)} of {len(found)} layers may have it"
            if allowed:
                line += (
                    f", each at most {max(drop.mean for drop in allowed):.2g} nats, "
                    f"{max(drop.worst for drop in allowed):.2g} in its worst prompt"
                )
            told.append(line)
        return told

    def _arrays(self) -> dict[str, Any]:
        import numpy as np

        return {
            f"{kind}/{name}/{role}": np.asarray(getattr(found, f"{role}s"), dtype=np.float64)
            for kind, table in (("scores", self.scores), ("prices", self.prices))
            for name, found in table.items()
            for role in ROLES
        }


PREFERENCE = ("kl", "fisher_scaled", "fisher", "empirical_fisher", "weight_gradient")
"""Signals from the best plans down, as `benchmarks/planner` and `benchmarks/profile_cost` found them."""


def _menu_roles(menu: Menu) -> tuple[tuple[str, tuple[QuantSpec, ...]], ...]:
    return (("key", menu.keys), ("value", menu.values))


def _narrowest(specs: tuple[QuantSpec, ...]) -> int:
    return min(range(len(specs)), key=lambda n: (specs[n].bits, n))


def _digest(text: str, arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise MissingPackageError.for_extra("safetensors", "hf", "keeping a profile") from error
    return safetensors.numpy
