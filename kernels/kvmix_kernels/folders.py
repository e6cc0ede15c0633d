"""Where things are kept that are made once on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`KVMIX_CACHE_DIR`, or `~/.cache/kvmix_fx`: compiled kernels, launch parameters, converted models."""
    return Path(os.environ.get("KVMIX_CACHE_DIR") or Path.home() / ".cache" / "kvmix_fx")
