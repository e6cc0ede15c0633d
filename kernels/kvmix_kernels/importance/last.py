"""The attention a token gets from the last queries: SnapKV (arXiv 2404.14469).

Of a prompt the last 32 queries count. SnapKV leaves it at that; here later queries are added to a score that
fades as fast, so tokens of the answer can be ranked too. Scores are not smoothed over neighbours.
"""

from kvmix_kernels.importance.policy import Policy

QUERIES = 32

POLICY = Policy(queries=QUERIES, decay=1 - 1 / QUERIES)
