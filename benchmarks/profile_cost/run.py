"""What profiling costs: ours against KVmix's scheme as published, on the same prompts.

KVmix (arXiv 2506.08018) profiles a prompt with L forwards and 2 L backwards, one per projection weight; here
one forward and one backward serve all layers, whatever the number of signals that share their labels. Each
provider runs in a process of its own, so that its peak is its own: resident memory on a CPU, allocated memory
on CUDA, beyond what a plain forward took before. Time and memory of tracing, the same for any number of
prompts, are printed apart.

    python -m benchmarks.profile_cost.run
    python -m benchmarks.profile_cost.run --shape llama-3.1-8b --device cuda

The second command profiles a random bfloat16 model of Llama-3.1-8B's shape and fails above 40 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kvmix_fx
from benchmarks.e2e.models import SHAPES, build
from benchmarks.rows import make_row, save
from kvmix_fx.profiling.calibration import Calibration, load_calibration
from kvmix_fx.profiling.observe import Observer, observing
from kvmix_fx.testing import texts
from kvmix_fx.testing.smollm2 import load_smollm2

LIMIT_GIB = 40


def kvmix_scheme(model: nn.Module, calibration: Calibration, prompts: int) -> dict[str, float]:
    """L forwards and 2 L backwards for each prompt; returns what it took."""
    model.requires_grad_(False)
    layers = model.model.layers
    scores: list[Tensor] = []
    for row in calibration.ids[:prompts]:
        ids = row[None].to(next(model.parameters()).device)
        for layer in layers:
            weights = (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight)
            for weight in weights:
                weight.requires_grad_(True)
            loss = cross_entropy(model(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:])
            for weight in weights:
                (gradient,) = torch.autograd.grad(loss, weight, retain_graph=weight is weights[0])
                scores.append(gradient.norm())
            for weight in weights:
                weight.requires_grad_(False)
    return {"forwards": len(layers), "backwards": 2 * len(layers), "check": float(torch.stack(scores).sum())}


def ours(
    model: nn.Module, calibration: Calibration, prompts: int, signals: list[str], checkpointing: bool
) -> dict[str, float]:
    """One forward and one backward per kind of label; returns what it took, tracing excluded and apart."""
    from kvmix_fx.plan.prices import Menu
    from kvmix_fx.profiling.measure import measure

    part = calibration.first(prompts)
    observer = Observer(model, checkpointing=checkpointing)
    device = next(model.parameters()).device
    with observing(model):
        started, untraced = time.perf_counter(), _peak(device)
        observer.look(part.ids[:1].to(device))
        trace, traced = time.perf_counter() - started, _peak(device)
        found = measure(observer, part, signals, Menu.default(observer.geometry))
    check = sum(sum(s.keys) + sum(s.values) for name, s in found.scores.items() if name == "weight_gradient")
    return {
        "forwards": found.forwards / prompts,
        "backwards": found.backwards / prompts,
        "check": check * prompts,
        "trace_seconds": trace,
        "trace_peak": traced - untraced,
    }


PROVIDERS: dict[str, tuple[list[str], bool]] = {
    "kvmix_fx weight_gradient": (["weight_gradient"], False),
    "kvmix_fx weight_gradient, checkpointing": (["weight_gradient"], True),
    "kvmix_fx default signals": (list(kvmix_fx.profiling.DEFAULT_SIGNALS), False),
}
BASELINE = "kvmix scheme"


def run_one(provider: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one provider in this process."""
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    model, tokenizer = load_smollm2(device=device)
    calibration = load_calibration(
        texts.prose()[:60000], tokenizer, prompts=options.prompts, length=options.length
    )
    with torch.no_grad():
        model(calibration.ids[:1].to(device))
    before = _peak(device)
    started = time.perf_counter()
    if provider == BASELINE:
        # every prompt takes the same: one is measured
        taken = kvmix_scheme(model, calibration, options.baseline_prompts)
        prompts = options.baseline_prompts
    else:
        taken = ours(model, calibration, options.prompts, *PROVIDERS[provider])
        prompts = options.prompts
    _finish(device)
    seconds = time.perf_counter() - started - taken.get("trace_seconds", 0.0)
    more = _peak(device) - before - taken.get("trace_peak", 0)
    return taken | {"seconds": seconds / prompts, "peak": more, "check": taken["check"] / prompts}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(device: torch.device) -> int:
    """Bytes: allocated at most on CUDA, resident at most on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(options: argparse.Namespace) -> None:
    """All providers, each in its own process; rows and a table."""
    case = f"smollm2-135m {options.length} tokens a prompt"
    results = {}
    for provider in (BASELINE, *PROVIDERS):
        command = [sys.executable, "-m", "benchmarks.profile_cost.run", "--provider", provider]
        for name in ("device", "prompts", "length", "threads", "baseline_prompts"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        results[provider] = json.loads(done.stdout.splitlines()[-1])
    rows = []
    base = results[BASELINE]
    print(f"{'provider':42}{'forwards':>9}{'backwards':>10}{'s/prompt':>10}{'MiB more':>10}  tracing")
    for provider, found in results.items():
        trace = ""
        if "trace_peak" in found:
            trace = f"{found['trace_seconds']:.1f} s, {found['trace_peak'] / 2**20:.0f} MiB"
        print(
            f"{provider:42}{found['forwards']:9.0f}{found['backwards']:10.0f}{found['seconds']:10.2f}"
            f"{found['peak'] / 2**20:10.0f}  {trace}"
        )
        passes = found["forwards"] + found["backwards"]
        ratios = {
            "passes": (passes, "passes/prompt", (base["forwards"] + base["backwards"]) / passes),
            "time": (found["seconds"], "s/prompt", base["seconds"] / found["seconds"]),
            "peak_memory": (found["peak"], "bytes", base["peak"] / max(found["peak"], 1)),
        }
        for metric, (value, unit, ratio) in ratios.items():
            against = {} if provider == BASELINE else {"baseline": BASELINE, "ratio": ratio}
            rows.append(make_row("profile_cost", case, provider, metric, float(value), unit, **against))
    save(rows)
    same = results["kvmix_fx weight_gradient"]["check"]
    if abs(same / base["check"] - 1) > 0.5:
        raise SystemExit(f"the norms do not agree: {same} against {base['check']}")
    if rows[3].ratio is None or rows[3].ratio < 10:
        raise SystemExit("fewer than 10x fewer passes")


def profile_shape(options: argparse.Namespace) -> None:
    """A large random model: does it fit, and how long does it take."""
    device = torch.device(options.device)
    started = time.perf_counter()
    model = build(options.shape, options.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    _finish(device)
    print(
        f"{options.shape}: {weights / 2**30:.1f} GiB of weights in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    vocabulary = SHAPES[options.shape]["vocab_size"]
    ids = torch.randint(
        vocabulary, (options.prompts, options.length), generator=torch.Generator().manual_seed(0)
    )
    case = f"{options.shape} bf16 {options.prompts}x{options.length}"
    rows = []
    for checkpointing in (True, False):
        name = "kvmix_fx default signals" + (", checkpointing" if checkpointing else "")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        profile = kvmix_fx.profile(model, ids, checkpointing=checkpointing, progress=False)
        _finish(device)
        seconds, peak = time.perf_counter() - started, _peak(device)
        print(f"{name}: {seconds:.1f} s with tracing, peak {peak / 2**30:.1f} GiB", flush=True)
        print(profile.plan(bits=3.0).describe().splitlines()[0], flush=True)
        rows.append(make_row("profile_cost", case, name, "peak_memory", float(peak), "bytes"))
        rows.append(make_row("profile_cost", case, name, "time", seconds, "s"))
        if checkpointing and peak > LIMIT_GIB * 2**30:
            raise SystemExit(f"more than {LIMIT_GIB} GiB")
    save(rows)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a random model of this shape instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--baseline-prompts", type=int, default=1)
    parser.add_argument("--length", type=int, help="tokens of a prompt; 256, or 1024 with --shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--provider", choices=(BASELINE, *PROVIDERS), help="this one only, in this process")
    options = parser.parse_args()
    options.length = options.length or (1024 if options.shape else 256)
    if options.provider is not None:
        print(json.dumps(run_one(options.provider, options)))
    elif options.shape is not None:
        profile_shape(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
