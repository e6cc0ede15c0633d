"""The attention a token has got, divided by how many queries could see it: ZipCache (arXiv 2405.14256).

Old tokens no longer win for their age. ZipCache looks at a sample of the queries, here all count.
"""

from __future__ import annotations

from torch import Tensor

from kvmix_kernels.importance.policy import EVERY_QUERY, Policy


def per_query(scores: Tensor, positions: Tensor, length: Tensor | int) -> Tensor:
    """Scores over the number of queries from the token itself to the last one."""
    return scores / (length - positions).clamp(min=1)


POLICY = Policy(queries=EVERY_QUERY, decay=1.0, rank=per_query)
