"""The report's text: a line for all layers to which the same is done."""

from __future__ import annotations

from kvmix_fx.passes.report import CompileReport, GraphReport, SiteReport
from kvmix_fx.passes.sites import ATTEND, LEAVE, NOT_RECOGNIZED


def site(layer, action=ATTEND, bits=2, reason=""):
    size = None if action == NOT_RECOGNIZED else 40.0
    return SiteReport(
        layer, f"layers.{layer}", "sdpa", action, reason, bits, bits, size, "1", f"K{bits}V{bits}"
    )


def test_layers_that_are_alike_share_a_line():
    sites = [site(n) for n in range(30)]
    sites[7] = site(7, bits=4)
    sites[9] = site(9, LEAVE, 16, "kept")
    sites += [site(None, NOT_RECOGNIZED, reason="odd"), site(None, NOT_RECOGNIZED, reason="odd")]
    _, *lines = str(CompileReport([GraphReport(sites)])).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "  layers 0-6,8,10-29",
        "  layer 7",
        "  layer 9",
        "  layer ?",
        "  layer ?",
    ]
    assert "K4V4" in lines[1]
    assert lines[2].endswith("(kept)")
