"""The attention a token has got from all queries so far: H2O (arXiv 2306.14048), MiKV (2402.18096)."""

from kvmix_kernels.importance.policy import EVERY_QUERY, Policy

POLICY = Policy(queries=EVERY_QUERY, decay=1.0)
