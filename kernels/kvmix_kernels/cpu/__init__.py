"""Faster plain PyTorch for ops on CPU tensors; equal to `kvmix_kernels.reference` up to rounding."""
