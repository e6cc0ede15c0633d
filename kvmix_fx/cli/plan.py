"""`kvmix plan`, and the options by which every command takes a plan."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvmix_fx.cli.common import Answer, Placement, answers, as_options, load_config, load_model, size
from kvmix_fx.errors import (
    CommandError,
    HeadSizeError,
    PlanError,
    PlanFieldError,
    PlanLayerError,
    PresetError,
)
from kvmix_fx.plan import PRESETS, KVPlan, ModelGeometry, QuantSpec, join_layers
from kvmix_fx.plan.selection import select_layers
from kvmix_fx.plan.text import parse_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTHS = (1024, 4096, 16384, 65536)
"""Contexts that `estimate` shows unless told."""

WIDTH = 80
"""Characters of a line about where a plan came from."""

_PANEL = "Plan"


def _option(help: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=_PANEL)


@dataclass(frozen=True)
class PresetChoice:
    """A preset and changes to it, as given on a command line."""

    preset: Annotated[
        str | None,
        _option(f"{', '.join(PRESETS)}; tiers unless told, uniform if --key-bits is given.", metavar="NAME"),
    ] = None
    key_bits: Annotated[int | None, _option("Bits of the keys.")] = None
    value_bits: Annotated[int | None, _option("Bits of the values.")] = None
    group_size: Annotated[int | None, _option("Elements that share a scale and an offset.")] = None
    window: Annotated[int | None, _option("Recent tokens kept at 16 bits.")] = None
    sink: Annotated[int | None, _option("Leading tokens kept at 16 bits.")] = None
    option: Annotated[
        list[str] | None,
        _option('What else the preset takes: "high_key_layers=0-5".', metavar="NAME=VALUE"),
    ] = None
    change: Annotated[
        list[str] | None,
        _option('Other bits in some layers: "0-3,-1:k4v4".', "--set", metavar="LAYERS:BITS"),
    ] = None

    def make(self, target: object) -> KVPlan:
        """The chosen preset's plan for `target`: a model, its configuration or a ModelGeometry.

        Raises:
            CommandError, PlanError: the choice means nothing, or does not fit.
            FormatError, HeadSizeError: the parts do not fit together, or not the model.
        """
        arguments = self.arguments()
        if self.preset is None and "value_bits" in arguments and "key_bits" not in arguments:
            raise CommandError("--value-bits needs --key-bits beside it")
        usual = "uniform" if "key_bits" in arguments else "tiers"
        with as_options("key_bits", "value_bits", "group_size"):
            plan = _preset(self.preset or usual, target, arguments)
            plan.check_policies()
            return self.changed(plan)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the preset, by their names in Python."""
        common = {
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "group_size": self.group_size,
            "window": self.window,
            "sink_length": self.sink,
        }
        given: dict[str, Any] = {name: value for name, value in common.items() if value is not None}
        for option in self.option or ():
            name, equals, value = option.partition("=")
            if not equals:
                raise CommandError(f"--option takes NAME=VALUE, got {option!r}")
            given[name.replace("-", "_")] = _value(value)
        return given

    def changed(self, plan: KVPlan) -> KVPlan:
        """The plan with the bits given by --set."""
        for change in self.change or ():
            layers, _, bits = change.rpartition(":")
            try:
                key, value = parse_bits(bits if layers else "")
            except PlanFieldError as error:
                raise CommandError(
                    f'--set takes LAYERS:BITS such as "0-3,-1:k4v4" or "last:2:v4", got {change!r}'
                ) from error
            plan = _with_bits(plan, layers, key, value)
        if not self.change:
            return plan
        provenance = dict(plan.provenance) | {"changes": list(self.change)}
        return replace(plan, name=f"{plan.name}, changed", provenance=provenance)


@dataclass(frozen=True)
class PlanChoice(PresetChoice):
    """A plan file or a preset, and changes to it, as given on a command line."""

    plan: Annotated[
        str | None, _option("A plan file, a folder or Hub id with one, or kvmix:NAME.", metavar="FILE")
    ] = None

    def build(self, target: object, model: str | None = None) -> KVPlan:
        """The chosen plan, a file's checked against `target`, which errors call `model`.

        Raises as `make` and `read_plan_for`.
        """
        if self.plan is None:
            return self.make(target)
        if self.preset is not None or self.arguments():
            raise CommandError("--plan names a finished plan: leave out --preset and its options")
        return self.changed(read_plan_for(self.plan, target, model))

    def load(
        self, model: str, placement: Placement
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, KVPlan]:
        """The model, its tokenizer and the plan. A plan that does not fit is refused before loading."""
        plan = self.build(load_config(model), model)
        network, tokenizer = load_model(model, placement)
        return network, tokenizer, plan.for_model(network)


def _value(text: str) -> bool | int | float | str:
    """True, false or a number where the text is one, which no selection of layers is but a single layer's."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_plan(name: str) -> KVPlan:
    """The plan in a file, a folder or a Hub repository. Raises as `KVPlan.from_pretrained`."""
    # a missing file is a missing file, not the name of a Hub repository
    return KVPlan.load(name) if name.endswith(".json") else KVPlan.from_pretrained(name)


def read_plan_for(name: str, target: object, model: str | None = None) -> KVPlan:
    """The plan in a file, with the sizes of `target`, which errors call `model`.

    Raises:
        PlanError, HeadSizeError: as `read_plan`, or it does not fit.
    """
    plan = read_plan(name)
    try:
        return plan.for_model(target)
    except PlanLayerError as error:
        found, wanted = len(plan.layers), ModelGeometry.of(target).num_layers
        if found == wanted:
            raise PlanLayerError(f"{name}: {error}") from error
        called = "the model" if model is None else model
        raise PlanLayerError(
            f"{name} has a plan of {found} layers, {called} has {wanted}: make one for it with "
            f"`kvmix plan new OUT.json --model {model or 'MODEL'}`"
        ) from error
    except HeadSizeError as error:
        raise HeadSizeError(f"{name}: {error}") from error


def summary(plan: KVPlan) -> dict[str, Any]:
    """What a result should say about the plan it was made with; bits by layers."""
    layers: dict[str, list[int]] = {}
    for index, layer in enumerate(plan.layers):
        layers.setdefault(layer.label, []).append(index)
    return {
        "name": plan.name,
        "digest": plan.digest,
        "layers": {join_layers(indices): bits for bits, indices in layers.items()},
    }


def _with_bits(plan: KVPlan, layers: str, key: int | None, value: int | None) -> KVPlan:
    """Other bits in some layers; tiers and rotations that cannot have them make way."""

    def changed(spec: QuantSpec, bits: int | None) -> QuantSpec | int | None:
        if bits is None or bits == spec.bits or not (spec.tiers or spec.rotation != "none"):
            return bits
        if bits == 16:
            return QuantSpec(bits)
        return QuantSpec(bits, spec.axis, spec.group_size, spec.scale_dtype) if spec.tiers else bits

    for index in select_layers(layers, len(plan.layers)):
        layer = plan.layers[index]
        plan = plan.with_layers(index, key=changed(layer.key, key), value=changed(layer.value, value))
    return plan


def _preset(name: str, target: object, arguments: dict[str, Any]) -> KVPlan:
    try:
        return KVPlan.preset(name, target, **arguments)
    except PresetError as error:
        hint = "" if name not in PRESETS else " (give them as --option NAME=VALUE)"
        raise PresetError(f"{error}{hint}") from error


app = typer.Typer(help="Make, show and size plans.", no_args_is_help=True)


@app.command("new")
@answers
def new(
    out: Annotated[Path, typer.Argument(metavar="OUT.json", show_default=False)],
    choice: PresetChoice,
    model: Annotated[str | None, typer.Option(help="Model whose sizes the plan is for.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers, where no model is named.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads, likewise.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a head, likewise.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.json if it exists.")] = False,
) -> Answer:
    """Write a plan file from a preset."""
    if out.exists() and not force:
        raise CommandError(f"{out} exists; pass --force to replace it")
    plan = choice.make(_target(model, layers, kv_heads, head_dim))
    if model is not None and not Path(model).exists():
        plan = replace(plan, base_model=model)
    try:
        plan.save(out)
    except OSError as error:
        raise CommandError(f"{out} cannot be written ({error.strerror or error})") from error
    return Answer({"path": str(out), **described(plan)}, f"{view(plan)}\nwritten to {out}")


@app.command("show")
@answers
def show(file: Annotated[str, typer.Argument(metavar="FILE", show_default=False)]) -> Answer:
    """Show what a plan keeps in how many bits."""
    plan = read_plan(file)
    return Answer(described(plan), view(plan))


@app.command("estimate")
@answers
def estimate(
    file: Annotated[str, typer.Argument(metavar="FILE", show_default=False)],
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    length: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens in the cache; may be repeated.", show_default=False),
    ] = None,
    itemsize: Annotated[int, typer.Option(min=1, help="Bytes of the model's dtype.")] = 2,
    tp: Annotated[
        int, typer.Option(min=1, help="Ranks that share the KV heads; bytes are then those of one rank.")
    ] = 1,
    model: Annotated[str | None, typer.Option(help="Model whose sizes count, if not the plan's.")] = None,
) -> Answer:
    """Show the bytes that a cache under this plan allocates, at several lengths."""
    plan = read_plan(file) if model is None else read_plan_for(file, load_config(model), model)
    if plan.geometry is None:
        raise CommandError(f"{file} does not say which sizes it is for: pass --model")
    rows = [_estimate(plan, plan.geometry, batch, tokens, itemsize, tp) for tokens in length or LENGTHS]
    table = Table("tokens", "cache", "unquantized", "ratio", "bits per element", title=plan.name)
    for row in rows:
        table.add_row(
            f"{row['length']:,}",
            size(row["nbytes"]),
            size(row["nbytes_16bit"]),
            f"{row['ratio']:.2f}x",
            f"{row['bits_per_element']:.2f}",
        )
    table.add_row("limit", "", "", "", f"{plan.bits_per_element():.2f}")
    counted = f", bytes of one rank of {tp}" if tp > 1 else ""
    table.caption = f"batch {batch}, {itemsize} bytes per unquantized element{counted}"
    content = {
        "plan": summary(plan),
        "batch": batch,
        "itemsize": itemsize,
        "tp_size": tp,
        "bits_per_element": plan.bits_per_element(),
        "estimates": rows,
    }
    return Answer(content, table)


def _estimate(
    plan: KVPlan, geometry: ModelGeometry, batch: int, length: int, itemsize: int, tp: int
) -> dict[str, Any]:
    nbytes = plan.nbytes(batch, length, itemsize=itemsize, tp_size=tp)
    heads = geometry.heads_per_rank(tp)
    elements = 2 * batch * length * geometry.num_layers * heads * geometry.head_dim
    return {
        "length": length,
        "nbytes": nbytes,
        "nbytes_16bit": elements * itemsize,
        "ratio": elements * itemsize / nbytes,
        "bits_per_element": 8 * nbytes / elements,
    }


def _target(model: str | None, layers: int | None, kv_heads: int | None, head_dim: int | None) -> object:
    sizes = (layers, kv_heads, head_dim)
    if model is not None:
        if sizes != (None, None, None):
            raise CommandError("pass --model or the sizes, not both")
        return load_config(model)
    if layers is None or kv_heads is None or head_dim is None:
        raise CommandError("pass --model, or all of --layers, --kv-heads and --head-dim")
    return ModelGeometry(layers, kv_heads, head_dim)


def described(plan: KVPlan) -> dict[str, Any]:
    """A whole plan, for --json."""
    try:
        bits_per_element = plan.bits_per_element()
    except PlanError:  # groups of one head, whose size the plan does not say
        bits_per_element = None
    return {"nominal_bits": plan.nominal_bits(), "bits_per_element": bits_per_element, "plan": plan.to_dict()}


def view(plan: KVPlan) -> str:
    """A whole plan, for people."""
    lines = [plan.describe(), f"digest {plan.digest}"]
    if plan.base_model is not None:
        lines.append(f"made for {plan.base_model}")
    for name, value in plan.provenance.items():
        called = {"version": "version of kvmix_fx"}.get(name, name.replace("_", " "))
        told = (_judged(value) if name == "evaluation" else None) or f"{called}: {_told(value)}"
        for line in told.splitlines():
            lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False)
    return "\n".join(lines)


def _told(value: Any) -> str:
    """A value of a plan's provenance; of a table without the digests, which the file and --json have."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(entry)}" for name, entry in value.items() if name != "sha256")
    if isinstance(value, list):
        return "; ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _judged(found: Any) -> str | None:
    """What `Evaluation.summary` left in a plan; None for anything else of that name."""
    lines = []
    try:
        for one in found:
            kl, error = one["kl_mean"]["value"], one["kl_mean"]["standard_error"]
            top = one["same_top"]["value"]
            around = "" if error is None else f" ± {error:.4f}"
            lines.append(
                f"cost: KL {kl:.4f}{around} nats a token, {top:.1%} same top token, on {one['predictions']} "
                f"predictions of {one['data']['source']}"
            )
    except (KeyError, TypeError, ValueError):
        return None
    return "\n".join(lines)
