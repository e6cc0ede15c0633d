from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.testing.tensors import FAMILIES, error_budget, formats, poison, split_sums_lose, values
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import SCALE_DTYPES, Cached, allocate
from kvmix_kernels.layout import AXIS_CHANNEL
from kvmix_kernels.reference import quantize as q
from kvmix_kernels.reference import storage

PACKED = layout.WIDTHS
HEADS = (16, 64, 80, 96, 128, 256)


def grown(x, fmt, pieces, valid=None):
    """Append x in pieces to poisoned buffers of the final size."""
    B, H, L, D = x.shape
    tiles, slots = layout.growing_tiles(fmt, L), layout.growing_slots(fmt, L)
    buffers = poison(allocate(B, H, D, tiles, slots, fmt, x.dtype, x.device))
    start = 0
    for n in pieces:
        storage.append(buffers, x[:, :, start : start + n], valid, start)
        start += n
    assert start == L
    return buffers


def partition(length, cuts):
    edges = sorted({0, length, *(c % (length + 1) for c in cuts)})
    return [b - a for a, b in zip(edges, edges[1:], strict=False)]


@given(st.sampled_from(PACKED), st.sampled_from(HEADS), st.sampled_from([1, 4, 32]), st.integers(0, 2**31))
def test_unpack_inverts_pack(bits, head_dim, block, seed):
    codes = torch.randint(0, 2**bits, (2, 64, head_dim), generator=torch.Generator().manual_seed(seed))
    words = q.pack(codes.to(torch.int16), bits, block)
    assert words.dtype == torch.int16
    assert words.shape[-1] * 16 == bits * head_dim
    assert torch.equal(q.unpack(words, bits, head_dim, block), codes.to(torch.int16))


def test_words_are_field_major():
    # 2 bits, D = 32: 4 words; field f of word j is channel 4 f + j
    codes = torch.zeros(32, dtype=torch.int16)
    codes[4 * 5 + 2] = 3
    assert q.pack(codes, 2).tolist() == [0, 0, 3 << 10, 0]


def test_three_bits_are_columns_in_two_planes_block_by_block():
    # D = 128: 16 columns of 24 bits; code f of column c is channel 16 f + c. Codes 0 to 4 and the high bit of
    # code 5 are in word c, codes 6 and 7 and the low bits of code 5 in a byte of word 16 * block + c % 8
    codes = torch.zeros(4, 128, dtype=torch.int16)
    token, column = 1, 9
    for f, code in enumerate((1, 2, 3, 4, 5, 6, 7, 1)):
        codes[token, 16 * f + column] = code
    rows = (q.pack(codes, 3, block=2).flatten().int() & 0xFFFF).tolist()
    wide = 1 | 2 << 3 | 3 << 6 | 4 << 9 | 5 << 12 | (6 >> 2) << 15
    narrow = 7 | 1 << 3 | (6 & 3) << 6
    assert {i: word for i, word in enumerate(rows) if word} == {
        16 * token + column: wide,
        2 * 16 + 8 * token + 1: narrow << 8,
    }


@given(
    st.sampled_from(FAMILIES),
    st.integers(0, 1000),
    st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    formats(64, PACKED, plain=True),
)
def test_error_is_at_most_half_a_step(family, seed, dtype, fmt):
    x = values(family, (2, 2, fmt.tile * 2, 64), seed, dtype)
    codes, scale, zero_point = q.quantize(x, None, fmt)
    packed = (q.pack(codes, fmt.bits, layout.plane_block(fmt)), scale, zero_point, x)
    back = q.dequantize(Cached(fmt, packed), 0, fmt.tile * 2)
    group = fmt.group_size if fmt.axis == AXIS_CHANNEL else layout.channel_group(fmt, 64)
    spread = (
        (lambda t: t.repeat_interleave(group, 2))
        if fmt.axis == AXIS_CHANNEL
        else (lambda t: t.repeat_interleave(group, 3))
    )
    step, offset = spread(scale.double()), spread(zero_point.double())
    eps = torch.finfo(SCALE_DTYPES[fmt.scale_dtype]).eps
    # half a step, plus what storing the step and the offset in few bits moves the ends of the range,
    # plus what the smallest subnormal cannot express
    floor = torch.finfo(SCALE_DTYPES[fmt.scale_dtype]).tiny
    budget = step / 2 + eps * (step * (2**fmt.bits - 1) + offset.abs()) + floor * 2**fmt.bits
    assert ((back.double() - x.double()).abs() <= budget * 1.001 + 1e-12).all()


@pytest.mark.parametrize("fmt", [layout.make_format(2), layout.make_format(3, "token")])
def test_constant_groups_are_exact(fmt):
    x = torch.full((1, 2, 64, 64), 1.2345, dtype=torch.float16)
    codes, scale, zero_point = q.quantize(x, None, fmt)
    packed = (q.pack(codes, fmt.bits, layout.plane_block(fmt)), scale, zero_point, x)
    back = q.dequantize(Cached(fmt, packed), 0, 64)
    assert torch.equal(back.half(), x)


@given(
    formats(64),
    st.lists(st.integers(0, 10**6), max_size=6),
    st.integers(1, 150),
    st.sampled_from(FAMILIES),
    st.integers(0, 1000),
)
def test_append_in_pieces_equals_append_at_once(fmt, cuts, length, family, seed):
    x = values(family, (2, 2, length, 64), seed)
    whole, pieces = grown(x, fmt, [length]), grown(x, fmt, partition(length, cuts))
    a = storage.read(whole, 0, length, length)
    b = storage.read(pieces, 0, length, length)
    assert a.isfinite().all()  # nothing uninitialised was read
    assert torch.equal(a, b)
    packed = fmt.packed_tiles(length) * fmt.tile
    assert torch.equal(whole.qdata[:, :, :packed], pieces.qdata[:, :, :packed])


@given(formats(64), st.integers(1, 120))
def test_window_and_sink_are_exact(fmt, length):
    x = values("normal", (1, 2, length, 64), length, torch.bfloat16)
    buffers = grown(x, fmt, [1] * length)
    back = storage.read(buffers, 0, length, length)
    assert torch.equal(back[:, :, : fmt.sink], x[:, :, : fmt.sink].float())
    end = fmt.packed_end(length)
    assert torch.equal(back[:, :, end:], x[:, :, end:].float())


@given(formats(64, PACKED, plain=True), st.integers(0, 1000))
def test_padding_does_not_widen_groups(fmt, seed):
    """Masked tokens may hold anything: the codes of the others do not change."""
    length = fmt.sink + fmt.tile * 2 + fmt.window
    x = values("normal", (2, 2, length, 64), seed)
    pad = length // 3
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, :, :, :pad] = False
    noisy = x.clone()
    noisy[1, :, :pad] = 1e4
    noisy[1, :, :pad, ::2] = float("nan")
    valid = storage.valid_tokens(mask, 2)
    clean = storage.read(grown(x, fmt, [length], valid), 0, length, length)
    dirty = storage.read(grown(noisy, fmt, [length], valid), 0, length, length)
    assert torch.equal(clean[1, :, pad:], dirty[1, :, pad:])
    assert torch.equal(clean[0], dirty[0])


@given(formats(64, PACKED, plain=True), st.integers(0, 1000))
def test_non_finite_elements_leave_their_neighbours_alone(fmt, seed):
    x = values("normal", (1, 1, fmt.tile, 64), seed)
    bad = x.clone()
    spots = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    bad[spots] = torch.tensor([float("nan"), float("inf"), float("-inf")])[
        torch.randint(0, 3, (int(spots.sum()),), generator=torch.Generator().manual_seed(seed))
    ]
    codes, scale, zero_point = q.quantize(bad, None, fmt)
    packed = (q.pack(codes, fmt.bits, layout.plane_block(fmt)), scale, zero_point, x)
    back = q.dequantize(Cached(fmt, packed), 0, fmt.tile)
    assert back.isfinite().all()
    # the others are coded as if the bad ones did not exist
    alone, scale_alone, zero_alone = q.quantize(x.masked_fill(spots, float("nan")), None, fmt)
    assert torch.equal(scale, scale_alone)
    assert torch.equal(zero_point, zero_alone)
    assert torch.equal(codes[~spots], alone[~spots])


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_valid_tokens_reads_the_last_query_row(mask_dtype):
    mask = torch.tensor([[True, True, True], [False, True, True]])[:, None, None]
    if mask_dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    valid = storage.valid_tokens(mask.expand(2, 4, 5, 3), 2)
    assert valid is not None
    assert valid.tolist() == [[True, True, True], [False, True, True]]


@st.composite
def attention_cases(draw):
    key_dim = draw(st.sampled_from((64, 80, 128)))
    Hkv, group = draw(st.sampled_from(((1, 4), (2, 3), (3, 1))))
    length = draw(st.integers(0, 130))
    return {
        "D": key_dim,
        "Hkv": Hkv,
        "group": group,
        "length": length,
        "Lq": draw(st.integers(1, 5)),
        "key_format": draw(formats(key_dim)),
        "value_format": draw(formats(key_dim)),
        "mask": draw(st.sampled_from(("none", "bool", "additive", "padding"))),
        "softcap": draw(st.sampled_from((0.0, 0.0, 0.5, 30.0))),
        "sinks": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        "family": draw(st.sampled_from(("normal", "outlier channels", "constant", "offset"))),
        "seed": draw(st.integers(0, 1000)),
        "block": draw(st.sampled_from((1, 1 << 21))),
    }


def make_case(case, device="cpu"):
    B, D, H, n = 2, case["D"], case["Hkv"], case["Lq"]
    x = values(case["family"], (B, H, case["length"] + n, D), case["seed"], case["dtype"]).to(device)
    y = values("normal", (B, H, case["length"] + n, D), case["seed"] + 1, case["dtype"]).to(device)
    query = values("normal", (B, H * case["group"], n, D), case["seed"] + 2, case["dtype"]).to(device)
    k = ops.quantize_pack(x[:, :, : case["length"]], None, case["key_format"].encode())
    v = ops.quantize_pack(y[:, :, : case["length"]], None, case["value_format"].encode())
    S = case["length"] + n
    mask = None
    generator = torch.Generator().manual_seed(case["seed"])
    if case["mask"] == "bool":
        mask = torch.rand(B, 1, n, S, generator=generator) < 0.7
        mask[..., -1] = True
    elif case["mask"] == "additive":
        mask = torch.randn(1, H * case["group"], n, S, generator=generator)
    elif case["mask"] == "padding":
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
        mask[1, ..., : S // 2] = False
        mask = mask.expand(B, 1, n, S)
    if mask is not None:
        mask = mask.to(device)
        mask = mask.to(case["dtype"]) if case["mask"] == "additive" else mask
    return query, x[:, :, case["length"] :], y[:, :, case["length"] :], k, v, mask


def written_out(query, k, v, mask, scale, softcap, sinks):
    """Attention as Gemma 2 and gpt-oss write it out."""
    group = query.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = query @ k.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return torch.softmax(scores, -1) @ v
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, column], 3), -1)[..., :-1] @ v


@given(attention_cases())
def test_attention_over_packed_equals_sdpa_over_dequantized(case):
    from kvmix_kernels.reference import attention

    query, new_k, new_v, k, v, mask = make_case(case)
    kf, vf, length = case["key_format"].encode(), case["value_format"].encode(), case["length"]
    scale = case["D"] ** -0.5
    sinks = torch.linspace(-3, 9, query.shape[1]) if case["sinks"] else None
    old = attention.BLOCK_ELEMENTS
    attention.BLOCK_ELEMENTS = case["block"]
    try:
        got = ops.attend(query, new_k, new_v, k, v, mask, None, length, scale, kf, vf, case["softcap"], sinks)
    finally:
        attention.BLOCK_ELEMENTS = old

    def dense(dtype):
        full_k = torch.cat([storage.read(Cached.of(k, kf), 0, length, length).to(dtype), new_k.to(dtype)], 2)
        full_v = torch.cat([storage.read(Cached.of(v, vf), 0, length, length).to(dtype), new_v.to(dtype)], 2)
        m = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
        if case["softcap"] or sinks is not None:
            return written_out(query.to(dtype), full_k, full_v, m, scale, case["softcap"], sinks)
        return F.scaled_dot_product_attention(
            query.to(dtype), full_k, full_v, attn_mask=m, scale=scale, enable_gqa=True
        )

    exact = dense(torch.float64)
    low = dense(case["dtype"]) if case["dtype"] != torch.float32 else dense(torch.float32)
    assert got.dtype == query.dtype
    lost = split_sums_lose(query, Cached.of(k, kf), Cached.of(v, vf), scale, exact)
    assert (got.double() - exact).abs().max().item() <= error_budget(low, exact) + lost


def test_a_query_that_may_see_nothing_gets_zeros():
    fmt = layout.make_format(2).encode()
    x = torch.randn(1, 1, 70, 64)
    buffers = ops.quantize_pack(x, None, fmt)
    mask = torch.zeros(1, 1, 1, 70, dtype=torch.bool)
    out = ops.attend(x[:, :, :1], None, None, buffers, buffers, mask, None, 70, 0.1, fmt, fmt)
    assert torch.equal(out, torch.zeros_like(out))


def test_batch_and_head_permutations_commute():
    fmt = layout.make_format(3, sink=2).encode()
    x, y = torch.randn(3, 2, 100, 64), torch.randn(3, 4, 1, 64)
    a = ops.quantize_pack(x, None, fmt)
    b = ops.quantize_pack(x.flip(0, 1), None, fmt)
    out = ops.attend(y, None, None, a, a, None, None, 100, 0.1, fmt, fmt)
    flipped = ops.attend(y.flip(0, 1), None, None, b, b, None, None, 100, 0.1, fmt, fmt)
    torch.testing.assert_close(out, flipped.flip(0, 1))
