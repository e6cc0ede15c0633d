"""Triton implementations of the ops, with the signatures of `kvmix_kernels.ops`.

Imported on the first call on a GPU, never at import of `kvmix_kernels`.
"""

import os

from triton import knobs

from kvmix_kernels.triton.attention import attend, attend_lse
from kvmix_kernels.triton.reading import dequantize
from kvmix_kernels.triton.storage import append_, quantize_pack

# Inductor, too, sets this, to a folder of its own, but only where it compiles: a process that finds its code in
# Inductor's cache would not find these kernels where the process that made it has put them
os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)

__all__ = ["append_", "attend", "attend_lse", "dequantize", "quantize_pack"]
