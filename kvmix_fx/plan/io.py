"""Plan files: what they say, and reading them without trusting them.

The written form is explicit, one entry in "layers" for every layer:

    {
      "format": "kvmix_plan",
      "version": 1,
      "library_name": "kvmix_fx",
      "name": "...",
      "base_model": "...",                                            optional
      "digest": "...",                                                verified where present
      "geometry": {"num_layers": ..., "num_kv_heads": ..., "head_dim": ...},   optional
      "provenance": {...},                                            optional
      "layers": [
        {"key": {"bits": 4, "axis": "channel", "group_size": 32, "scale_dtype": "float16"},
         "value": {...}, "window": {"kind": "fixed", "length": 32}, "sink_length": 0, "tile": null},
        ...
      ]
    }

By hand, everything but "bits" may be left out: keys then run along "channel" and values along "token", in
groups of 32. A file may also give "num_layers" and "defaults", an entry like those above; its "layers" are
then changes to the defaults, each with a "match" (an integer, a list of them, or a text such as "0-3,28-",
see `selection`), and later changes win.

A tensor's entry may further have "tiers", "order", "channel_order", "rotation", "symmetric" and
"range_factor", see `QuantSpec`; a plan that uses them is of version 2. A layer's entry may have "token_tier",
an object with the fields of `TokenTier`; a plan that uses it is of version 3.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

from kvmix_fx import hub
from kvmix_fx.errors import (
    FormatError,
    HeadSizeError,
    MissingPackageError,
    PlanError,
    PlanFieldError,
    PlanFileError,
    PlanVersionError,
)
from kvmix_fx.plan.geometry import LayerGeometry, ModelGeometry
from kvmix_fx.plan.schema import PLAIN_FIELDS, KVPlan, LayerPlan, QuantSpec, WindowRule
from kvmix_fx.plan.selection import select_layers
from kvmix_fx.plan.shipped import PREFIX, shipped_text
from kvmix_fx.plan.token_tier import TokenTier

FILE_NAME = "kvmix_plan.json"
FORMAT = "kvmix_plan"
VERSION = 3
"""3 has tiers of tokens; 2 tiers of channels, orders, rotation, symmetric codes and ranges.

A plan is written as the first version that has what it needs.
"""
LIBRARY_NAME = "kvmix_fx"

_TOP_KEYS = (
    "format",
    "version",
    "library_name",
    "name",
    "base_model",
    "digest",
    "geometry",
    "provenance",
    "num_layers",
    "defaults",
    "layers",
)
_GEOMETRY_KEYS = ("num_layers", "num_kv_heads", "head_dim")
_LAYER_GEOMETRY_KEYS = tuple(field.name for field in fields(LayerGeometry))
_SPEC_KEYS = tuple(field.name for field in fields(QuantSpec))
_WINDOW_KEYS = ("kind", "length")
_TIER_KEYS = tuple(field.name for field in fields(TokenTier))
_LAYER_KEYS = ("key", "value", "window", "sink_length", "tile", "token_tier")

_MOST_LAYERS = 10_000
"""Bound on "num_layers", so that a damaged count cannot exhaust memory."""


def to_dict(plan: KVPlan) -> dict[str, Any]:
    """The file's content as plain JSON values."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": max(_first_version(layer) for layer in plan.layers),
        "library_name": LIBRARY_NAME,
        "name": plan.name,
    }
    if plan.base_model is not None:
        content["base_model"] = plan.base_model
    content["digest"] = plan.digest
    if plan.geometry is not None:
        content["geometry"] = plan.geometry.to_dict()
    if plan.provenance:
        content["provenance"] = dict(plan.provenance)
    content["layers"] = [layer.to_dict() for layer in plan.layers]
    return content


def _first_version(layer: LayerPlan) -> int:
    """The first version of the file that has all a layer needs."""
    if layer.token_tier is not None:
        return 3
    specs = (layer.key, layer.value)
    more = any(set(spec.to_dict()) > set(PLAIN_FIELDS) or spec.scale_dtype == "byte" for spec in specs)
    return 2 if more else 1


def from_dict(content: Mapping[str, Any], source: str = "plan") -> KVPlan:
    """The plan that `content` describes.

    Args:
        content: a parsed plan file.
        source: what errors call it.

    Raises:
        PlanFileError: naming the entry that is wrong.
        PlanVersionError: the content is of a newer format.
    """
    return _read_plan(_Entry(dict(content) if isinstance(content, Mapping) else content, "", source))


def to_json(plan: KVPlan) -> str:
    """The file's text: one line for each entry and for each layer."""
    content = to_dict(plan)
    layers = ",\n".join(f"    {json.dumps(layer)}" for layer in content.pop("layers"))
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items())
    return f'{{\n{head}  "layers": [\n{layers}\n  ]\n}}\n'


def from_json(text: str | bytes, source: str = "plan") -> KVPlan:
    """The plan in JSON `text`. Raises as `from_dict` does."""
    if not text.strip():
        raise PlanFileError(f"{source}: is empty")
    try:
        content = json.loads(text, object_pairs_hook=_object_of, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise PlanFileError(f"{source}: is nested too deeply for a plan") from error
    except ValueError as error:
        raise PlanFileError(f"{source}: is not valid JSON ({error}); the file may be truncated") from error
    return from_dict(content, source)


def save(plan: KVPlan, path: str | Path) -> Path:
    """Write the plan to the file `path`; returns it."""
    path = Path(path)
    path.write_text(to_json(plan), encoding="utf-8")
    return path


def load(path: str | Path) -> KVPlan:
    """Read the file `path`. Raises as `from_dict` does, and PlanFileError where it cannot be opened."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PlanFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data[8:9] == b"{" and data[:1] != b"{":  # of safetensors: the header's length, then JSON
        raise PlanFileError(
            f"{path}: is a safetensors file, no plan; if it is a profile, `kvmix plan solve {path}` makes one"
        )
    return from_json(data, str(path))


def save_pretrained(plan: KVPlan, folder: str | Path) -> Path:
    """Write the plan under its usual name into `folder`, made if missing; returns the file's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return save(plan, folder / FILE_NAME)


def from_pretrained(folder_or_hub_id: str | Path, revision: str | None = None) -> KVPlan:
    """Read a plan from a local folder (or file), by the name of one that comes along, or from the Hub.

    Raises:
        PlanFileError: nothing there, or a wrong entry.
        PlanVersionError: the file is of a newer format.
        MissingPackageError: the Hub is needed and huggingface_hub is not installed.
    """
    if isinstance(folder_or_hub_id, str) and folder_or_hub_id.startswith(PREFIX):
        return from_json(shipped_text(folder_or_hub_id), folder_or_hub_id)
    path = Path(folder_or_hub_id)
    if path.is_file():
        return load(path)
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise PlanFileError(f"{path}: holds no {FILE_NAME}; write one with plan.save_pretrained(folder)")
        return load(path / FILE_NAME)
    if isinstance(folder_or_hub_id, Path) or not _may_be_hub_id(folder_or_hub_id):
        raise PlanFileError(f"{path}: there is no such folder or plan file")
    return load(_download(folder_or_hub_id, revision))


def _may_be_hub_id(text: str) -> bool:
    parts = text.split("/")
    return len(parts) <= 2 and all(part and part[0] not in ".~" and "\\" not in part for part in parts)


def _download(hub_id: str, revision: str | None) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingPackageError.for_extra(
            "huggingface_hub", "hf", f"{hub_id!r} is no local folder, and loading a plan from the Hub"
        ) from error
    refusal = hub.refusal(hub_id, FILE_NAME, revision)
    if refusal is not None:
        raise PlanFileError(f"{hub_id}: there is no such folder or plan file, and {refusal}")
    try:
        return hf_hub_download(hub_id, FILE_NAME, revision=revision)
    except (OSError, ValueError) as error:
        raise PlanFileError(
            f"{hub_id}: no local folder has this name and the Hub gave no {FILE_NAME} ({error})"
        ) from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


@dataclass(frozen=True)
class _Entry:
    """A value in a plan file, and the path that leads to it."""

    value: Any
    path: str
    source: str

    def error(self, message: object, kind: type[PlanFileError] = PlanFileError) -> PlanFileError:
        return kind(f"{self.source}: {self.path}: {message}" if self.path else f"{self.source}: {message}")

    def child(self, name: str | int) -> _Entry:
        step = f"[{name}]" if isinstance(name, int) else f".{name}" if self.path else name
        return _Entry(self.value[name], f"{self.path}{step}", self.source)

    def part(self, name: str) -> _Entry:
        """The place called `name` within this one, whether or not the file has it."""
        return _Entry(None, f"{self.path}.{name}", self.source)

    def members(self, allowed: Collection[str]) -> dict[str, _Entry]:
        """The members of an object whose keys must all be `allowed`."""
        self.expect(dict, "an object")
        for name in self.value:
            if name not in allowed:
                close = difflib.get_close_matches(str(name), allowed, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(allowed)}"
                raise self.error(f"unknown key {name!r}; {hint}")
        return {name: self.child(name) for name in self.value}

    def expect(self, kind: type, description: str) -> None:
        if not isinstance(self.value, kind) or isinstance(self.value, bool):
            raise self.error(f"must be {description}, got {_shortened(self.value)}")

    def text(self) -> str:
        self.expect(str, "a text")
        return cast("str", self.value)

    def integer(self) -> int:
        self.expect(int, "an integer")
        return cast("int", self.value)


_Fields: TypeAlias = dict[str, dict[str, _Entry]]
"""Entries of one layer that a file gives, under "key", "value", "window" and, for the rest, "layer"."""

_Built = TypeVar("_Built")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_plan(top: _Entry) -> KVPlan:
    top.expect(dict, "an object")
    _check_version(top)
    members = top.members(_TOP_KEYS)
    if "library_name" in members:
        members["library_name"].text()
    options: dict[str, Any] = {}
    if "name" in members:
        options["name"] = members["name"].text()
    if "base_model" in members and members["base_model"].value is not None:
        options["base_model"] = members["base_model"].text()
    if "provenance" in members:
        members["provenance"].expect(dict, "an object")
        options["provenance"] = members["provenance"].value
    if "geometry" in members and members["geometry"].value is not None:
        options["geometry"] = _read_geometry(members["geometry"])
    layers = _read_layers(top, members)
    try:
        plan = KVPlan(layers, **options)
    except (PlanError, HeadSizeError) as error:
        raise top.error(error) from error
    if "digest" in members and members["digest"].text() != plan.digest:
        raise members["digest"].error(
            "the layers are not those this digest was written for, so the file was damaged or edited; "
            'after an edit by hand, remove the "digest" entry'
        )
    return plan


def _check_version(top: _Entry) -> None:
    if top.value.get("format", FORMAT) != FORMAT:
        raise top.child("format").error(f"must be {FORMAT!r}, got {_shortened(top.value['format'])}")
    if "version" not in top.value:
        return
    entry = top.child("version")
    version = entry.integer()
    if version > VERSION:
        raise entry.error(
            f"the file is of format version {version} and this package reads up to {VERSION}: "
            "pip install --upgrade kvmix-fx",
            PlanVersionError,
        )
    if version < 1:
        raise entry.error(f"versions start at 1, got {version}")


def _read_geometry(entry: _Entry) -> ModelGeometry:
    members = entry.members((*_GEOMETRY_KEYS, "layers"))
    missing = [name for name in _GEOMETRY_KEYS if name not in members]
    if missing:
        raise entry.error(f"lacks {', '.join(missing)}")
    try:
        layers = _read_layer_geometries(members["layers"]) if "layers" in members else ()
        return ModelGeometry(**{name: members[name].value for name in _GEOMETRY_KEYS}, layers=layers)
    except PlanFieldError as error:
        raise members[error.field].error(error) from error


def _read_layer_geometries(entry: _Entry) -> tuple[LayerGeometry, ...]:
    entry.expect(list, "a list")
    found = []
    for index in range(len(entry.value)):
        one = entry.child(index)
        members = one.members(_LAYER_GEOMETRY_KEYS)
        try:
            found.append(LayerGeometry(**{name: member.value for name, member in members.items()}))
        except PlanFieldError as error:
            raise members[error.field].error(error) from error
        except TypeError as error:
            raise one.error(f"needs {', '.join(_LAYER_GEOMETRY_KEYS[:3])}") from error
    return tuple(found)


def _read_layers(top: _Entry, members: dict[str, _Entry]) -> tuple[LayerPlan, ...]:
    listed: list[_Entry] = []
    if "layers" in members:
        members["layers"].expect(list, "a list")
        listed = [members["layers"].child(index) for index in range(len(members["layers"].value))]
    if "defaults" in members or any(
        isinstance(entry.value, dict) and "match" in entry.value for entry in listed
    ):
        return _read_compact_layers(top, members, listed)
    if "layers" not in members:
        raise top.error('lacks "layers", or else "defaults" with "num_layers"')
    if "num_layers" in members and members["num_layers"].integer() != len(listed):
        raise members["num_layers"].error(
            f"is {members['num_layers'].value}, but {len(listed)} layers are listed"
        )
    return tuple(_build_layer(_read_fields(entry), entry) for entry in listed)


def _read_compact_layers(
    top: _Entry, members: dict[str, _Entry], changes: list[_Entry]
) -> tuple[LayerPlan, ...]:
    if "num_layers" not in members:
        raise top.error('lacks "num_layers", which "defaults" and "match" need')
    num_layers = members["num_layers"].integer()
    if not 1 <= num_layers <= _MOST_LAYERS:
        raise members["num_layers"].error(f"must be from 1 to {_MOST_LAYERS}, got {num_layers}")
    defaults = members.get("defaults", _Entry({}, "defaults", top.source))
    layers = [_read_fields(defaults)] * num_layers
    for change in changes:
        fields = _read_fields(change, "match")
        for index in _matched_layers(fields["layer"].pop("match", None), change, num_layers):
            layers[index] = layers[index] | {
                part: layers[index].get(part, {}) | fields[part] for part in fields
            }
    return tuple(
        _build_layer(fields, _Entry(None, f"layer {index}", top.source))
        for index, fields in enumerate(layers)
    )


def _matched_layers(match: _Entry | None, change: _Entry, num_layers: int) -> tuple[int, ...]:
    if match is None:
        raise change.error('lacks "match", the layers it changes')
    if not isinstance(match.value, (int, str, list)):
        raise match.error(f"must be an integer, a list of integers or a text, got {_shortened(match.value)}")
    try:
        return select_layers(match.value, num_layers)
    except PlanError as error:
        raise match.error(error) from error


def _read_fields(entry: _Entry, *extra_keys: str) -> _Fields:
    members = entry.members((*extra_keys, *_LAYER_KEYS))
    found = {
        part: members.pop(part).members(keys) if part in members else {}
        for part, keys in (("key", _SPEC_KEYS), ("value", _SPEC_KEYS), ("window", _WINDOW_KEYS))
    }
    for part in ("key", "value"):
        # the first version had room for tiers, and none in it
        if "tiers" in found[part] and found[part]["tiers"].value is None:
            del found[part]["tiers"]
    tier = members.pop("token_tier", None)
    if tier is not None:
        found["token_tier"] = dict[str, _Entry]() if tier.value is None else tier.members(_TIER_KEYS)
    return {**found, "layer": members}


def _build_layer(fields: _Fields, entry: _Entry) -> LayerPlan:
    for part in ("key", "value"):
        if "bits" not in fields[part]:
            raise entry.error(f"lacks {part}.bits")
    tier = fields.get("token_tier")
    return _build(
        entry,
        LayerPlan,
        fields["layer"],
        key=_build(entry.part("key"), QuantSpec, fields["key"], axis="channel"),
        value=_build(entry.part("value"), QuantSpec, fields["value"], axis="token"),
        window=_build(entry.part("window"), WindowRule, fields["window"]),
        token_tier=_build(entry.part("token_tier"), TokenTier, tier) if tier else None,
    )


def _build(entry: _Entry, kind: type[_Built], fields: dict[str, _Entry], **left_out: object) -> _Built:
    """Make a `kind`, blaming the field it refuses, or `entry` where fields do not fit together."""
    try:
        return kind(**left_out | {name: field.value for name, field in fields.items()})
    except PlanFieldError as error:
        raise fields.get(error.field, entry).error(error) from error
    except FormatError as error:
        raise entry.error(error) from error
