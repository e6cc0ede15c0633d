"""Token tiers: a second segment for the tokens that matter, in PyTorch and over the other ops.

The low tier keeps every token; attention reads a token of the high tier there alone, and merges both by their
log-sum-exp. Nothing waits for the device: counts may be tensors, so one path serves CPUs and CUDA graphs.
MiKV (arXiv 2402.18096) has the idea, "no token left behind"; the layout is ours.
"""
