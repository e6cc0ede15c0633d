"""What was rewritten, what was not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from kvmix_fx.passes.sites import ADOPT, APPEND, ATTEND, LEAVE, NOT_RECOGNIZED, STORAGE
from kvmix_fx.plan.selection import join_layers
from kvmix_kernels import layout

RAW_BITS = layout.RAW_BITS
REWRITTEN = (ATTEND, ADOPT, APPEND)


@dataclass(frozen=True)
class SiteReport:
    """One attention site of one traced graph, or what nearly is one.

    label: the bits of keys and values for people, "K4V2".
    bytes_per_token: of keys and values of this layer for one batch row, scales and offsets
    included, windows not; None where the shape is unknown.
    """

    layer: int | None
    module: str
    idiom: str
    action: str
    reason: str
    key_bits: int
    value_bits: int
    bytes_per_token: float | None
    query_length: str
    label: str

    @property
    def recognized(self) -> bool:
        """Whether this is an attention site, whatever was done to it."""
        return self.action != NOT_RECOGNIZED

    @property
    def rewritten(self) -> bool:
        """Whether this site's tokens are stored packed and its attention needs no 16-bit history."""
        return self.action in REWRITTEN


@dataclass
class GraphReport:
    """The sites of one traced graph, then what was not recognized, the nearest first.

    replay: why its steps are not replayed as CUDA graphs; empty if they are. forms: functions that it was
    compiled to, one for all layers that are alike; 0 where it was compiled whole. branches: groups of
    products of one tensor that a replay does side by side.
    """

    sites: list[SiteReport]
    replay: str = "nothing was rewritten"
    forms: int = 0
    branches: int = 0

    @property
    def changed(self) -> bool:
        """Whether anything is packed here, or comes in packed although no known attention reads it."""
        return any(
            site.action not in (LEAVE, NOT_RECOGNIZED)
            or (site.action == NOT_RECOGNIZED and min(site.key_bits, site.value_bits) < RAW_BITS)
            for site in self.sites
        )


@dataclass
class CompileReport:
    """All graphs one compiled model was traced into, in order."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[SiteReport]:
        """The sites of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    def rewritten_layers(self) -> list[int]:
        """Layers that are packed in at least one graph."""
        packed = {site.layer for site in self.sites if site.rewritten}
        return sorted(layer for layer in packed if layer is not None)

    def layers(self) -> list[int]:
        """All layers seen."""
        return sorted({site.layer for site in self.sites if site.layer is not None})

    def skipped(self) -> list[SiteReport]:
        """Sites that were not fully rewritten and what was not recognized, each with its reason."""
        return [site for site in self.sites if site.reason]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "graphs": [[asdict(site) for site in graph.sites] for graph in self.graphs],
            "replay": [graph.replay for graph in self.graphs],
        }

    def __str__(self) -> str:
        lines = []
        for number, graph in enumerate(self.graphs):
            launched = f"no CUDA graph ({graph.replay})" if graph.replay else "replayed as a CUDA graph"
            sites = sum(site.recognized for site in graph.sites)
            missed = len(graph.sites) - sites
            counted = f"{sites} attention sites" + (f", {missed} not recognized" if missed else "")
            forms = f", compiled in {graph.forms} forms" if graph.forms else ""
            branches = f", {graph.branches} groups of products side by side" if graph.branches else ""
            lines.append(f"graph {number}: {counted}, {launched}{forms}{branches}")
            lines.extend(_lines(graph.sites))
        return "\n".join(lines) or "nothing has been traced yet"


def _lines(sites: Iterable[SiteReport]) -> Iterator[str]:
    """A line for all layers to which the same is done; for each site whose layer is not known."""
    alike: dict[str, list[int]] = {}
    lines: list[tuple[int | None, str]] = []
    for site in sites:
        size = "" if site.bytes_per_token is None else f", {site.bytes_per_token:.0f} bytes/token"
        reason = f" ({site.reason})" if site.reason else ""
        step = f"{site.idiom}, query length {site.query_length}"
        told = f"{step}, {site.action}, {site.label}{size}{reason}"
        if site.layer is None or told not in alike:
            lines.append((site.layer, told))
        if site.layer is not None:
            alike.setdefault(told, []).append(site.layer)
    for layer, told in lines:
        layers = [] if layer is None else sorted(set(alike[told]))
        yield f"  layer{'s' * (len(layers) > 1)} {join_layers(layers) if layers else '?'}: {told}"


__all__ = ["LEAVE", "NOT_RECOGNIZED", "STORAGE", "CompileReport", "GraphReport", "SiteReport"]
