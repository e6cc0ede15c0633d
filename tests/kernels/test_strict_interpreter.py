"""What `conftest` refuses in the interpreter, and what it lets through."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU nothing is interpreted"
)


@triton.jit
def shifted(out_ptr, by):
    tl.store(out_ptr + tl.arange(0, 4), (tl.arange(0, 4) + 1) >> (by + tl.arange(0, 4)))


@triton.jit
def words_from(x_ptr, out_ptr, first):
    word_ptr = (x_ptr + first).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(out_ptr + tl.arange(0, 4), tl.load(word_ptr + tl.arange(0, 4)))


@needs_interpreter
def test_a_shift_by_all_bits_is_refused():
    out = torch.zeros(4, dtype=torch.int32)
    shifted[(1,)](out, 28)
    with pytest.raises(Exception, match="a number of 32 bits is shifted by 29 to 32"):
        shifted[(1,)](out, 29)


@needs_interpreter
def test_a_word_that_is_not_aligned_is_refused():
    x, out = torch.arange(32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)
    words_from[(1,)](x, out, 4)
    assert out[0] == 0x07060504
    with pytest.raises(Exception, match="numbers of 4 bytes are read or written at no multiple of 4"):
        words_from[(1,)](x, out, 5)
