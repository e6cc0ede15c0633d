"""`kvmix env`: what a bug report should say about the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

from rich.table import Table

from kvmix_fx.cli.common import Answer, answers

PACKAGES = ("kvmix-fx", "torch", "triton", "transformers", "torchao", "safetensors", "huggingface-hub")

EXTRAS = {
    "hf": ("transformers", "safetensors", "huggingface_hub"),
    "ao": ("torchao",),
    "tp": ("transformers", "safetensors", "huggingface_hub", "accelerate"),
    "server": ("transformers", "safetensors", "huggingface_hub", "fastapi", "uvicorn", "openai"),
    "serve": ("transformers", "safetensors", "huggingface_hub", "gguf", "ray", "openai"),
    "demo": ("transformers", "safetensors", "huggingface_hub", "gguf"),
    "plot": ("matplotlib",),
    "lm-eval": ("transformers", "safetensors", "huggingface_hub", "lm_eval", "accelerate"),
}
"""The modules that each extra of the package installs."""


@answers
def env() -> Answer:
    """Show versions, devices and installed extras; for bug reports."""
    content: dict[str, Any] = {
        "versions": versions(),
        "platform": platform.platform(),
        "extras": {name: all(map(_is_installed, modules)) for name, modules in EXTRAS.items()},
        **_devices(),
    }
    table = Table(show_header=False, box=None)
    for name, found in content["versions"].items():
        table.add_row(name, found or "not installed")
    table.add_row("platform", content["platform"])
    table.add_row("device", content["device"])
    table.add_row("cuda", content["cuda"] or "none")
    for number, gpu in enumerate(content["gpus"]):
        capability = f"compute capability {gpu['compute_capability']}"
        table.add_row(f"gpu {number}", f"{gpu['name']}, {capability}, {gpu['memory_gib']} GiB")
    for name, present in content["extras"].items():
        table.add_row(f"extra {name}", "present" if present else "not installed")
    return Answer(content, table)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None for what is not installed."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def version(package: str) -> str | None:
    """The installed version of a distribution, None if there is none (as in a bare source tree)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _devices() -> dict[str, Any]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"device": accelerator.type if accelerator else "cpu", "cuda": torch.version.cuda, "gpus": gpus}
