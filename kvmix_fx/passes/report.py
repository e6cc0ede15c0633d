"""What was rewritten, what was not, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from kvmix_fx.passes.sites import ADOPT, APPEND, ATTEND, LEAVE, STORAGE

REWRITTEN = (ATTEND, ADOPT, APPEND)


@dataclass(frozen=True)
class SiteReport:
    """One attention site of one traced graph.

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

    @property
    def rewritten(self) -> bool:
        """Whether this site's tokens are stored packed and its attention needs no 16-bit history."""
        return self.action in REWRITTEN


@dataclass
class GraphReport:
    """The sites of one traced graph.

    replay: why its steps are not replayed as CUDA graphs; empty if they are.
    """

    sites: list[SiteReport]
    replay: str = "nothing was rewritten"

    @property
    def changed(self) -> bool:
        """Whether anything was rewritten."""
        return any(site.action != LEAVE for site in self.sites)


@dataclass
class CompileReport:
    """All graphs one compiled model was traced into, in order."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[SiteReport]:
        """The sites of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    def rewritten_layers(self) -> list[int]:
        """Layers that are packed in at least one graph and left unpacked in none."""
        packed = {site.layer for site in self.sites if site.rewritten}
        return sorted(layer for layer in packed if layer is not None)

    def layers(self) -> list[int]:
        """All layers seen."""
        return sorted({site.layer for site in self.sites if site.layer is not None})

    def skipped(self) -> list[SiteReport]:
        """Sites that were not fully rewritten, each with its reason."""
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
            lines.append(f"graph {number}: {len(graph.sites)} attention sites, {launched}")
            lines.extend(_lines(graph.sites))
        return "\n".join(lines) or "nothing has been traced yet"


def _lines(sites: Iterable[SiteReport]) -> list[str]:
    return [
        f"  layer {site.layer}: {site.idiom}, query length {site.query_length}, {site.action}, "
        f"K{site.key_bits}V{site.value_bits}"
        + (f", {site.bytes_per_token:.0f} bytes/token" if site.bytes_per_token is not None else "")
        + (f" ({site.reason})" if site.reason else "")
        for site in sites
    ]


__all__ = ["LEAVE", "STORAGE", "CompileReport", "GraphReport", "SiteReport"]
