"""What 16-bit attention with learned sinks is, to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.kernels import decode_attention


def test_sinks_join_attention_after_the_fact():
    """By its log-sum-exp, as a column of the scores would have; without them it differs."""
    q, sink = torch.randn(2, 2, 4, 32), torch.randn(2, 4) + 4
    k, v = torch.randn(2, 2, 2, 50, 32)
    out, lse = F.scaled_dot_product_attention(q, k, v), (q @ k.mT * 32**-0.5).logsumexp(-1)
    expected = decode_attention.eager_with_sinks(q, k, v, sink)
    torch.testing.assert_close(decode_attention.rescaled(out, lse, sink), expected)
    assert (out - expected).norm() > 0.1 * expected.norm()


def test_words_of_providers_leave_formats_alone():
    """Windows and sinks are work around a format."""
    for provider in decode_attention.SLIDING_PROVIDERS:
        bare = " ".join(provider.split()[:3])
        assert decode_attention.formats(provider, 64) == decode_attention.formats(bare, 64)
        assert decode_attention.most_in_front(decode_attention.formats(bare, 64)[0]) == 127
