"""Triton implementations of the ops, with the signatures of `kvmix_kernels.ops`.

Imported on the first call on a GPU, never at import of `kvmix_kernels`.
"""

from kvmix_kernels.triton.attention import attend, attend_lse
from kvmix_kernels.triton.reading import dequantize
from kvmix_kernels.triton.storage import append_, quantize_pack

__all__ = ["append_", "attend", "attend_lse", "dequantize", "quantize_pack"]
