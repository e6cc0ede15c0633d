"""Packed KV-cache formats and the ops over them. Knows torch and Triton, never kvmix_fx."""
