"""What formats may have beside bits: tiers of channels, scales of a byte, rotation, symmetric codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.testing.tensors import values
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.cpu import attention as cpu_attention
from kvmix_kernels.errors import FormatError, HeadSizeError
from kvmix_kernels.layout import TensorFormat, make_format
from kvmix_kernels.reference import quantize as q
from kvmix_kernels.reference import scales, storage

TIERS = {
    64: (((4, 16), (2, 48)), ((4, 32), (2, 32)), ((4, 16), (2, 32), (0, 16)), ((4, 24), (0, 40))),
    128: (((4, 32), (2, 96)), ((4, 64), (2, 64)), ((4, 32), (2, 64), (0, 32))),
}


def shuffled(B, H, D, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(D, generator=g) for _ in range(B * H)]).view(B, H, D).to(torch.int32)


def packed(x, fmt, order=None):
    """Whole tiles x as a `Cached` without sink or window."""
    codes, scale, zero = q.quantize(x, None, fmt, order)
    words = q.pack(codes, fmt.code, layout.plane_block(fmt), fmt.channels(x.shape[3])[1])
    return Cached(fmt, (words, scale, zero, x[:, :, :0], *(() if order is None else (order,))))


@given(st.sampled_from((64, 128)), st.data())
def test_a_format_survives_its_encoding(D, data):
    fmt = make_format(
        4, "channel", 32, 64, 4, 32, data.draw(st.sampled_from(layout.SCALE_DTYPES)),
        tiers=data.draw(st.sampled_from(TIERS[D])), order=data.draw(st.sampled_from(layout.ORDERS[1:])),
        span=data.draw(st.sampled_from((None, 65, 100))),
    )  # fmt: skip
    assert TensorFormat.decode(fmt.encode()) == fmt
    plain = make_format(3, "token", 16, 32, 1, 7)
    assert TensorFormat.decode(plain.encode()) == plain
    # caches that were saved before there were tiers
    assert len(plain.encode()) == 7
    with pytest.raises(FormatError, match="encode"):
        TensorFormat.decode(fmt.encode()[:-1])


@pytest.mark.parametrize(("D", "tiers"), [(D, tiers) for D in TIERS for tiers in TIERS[D]])
@pytest.mark.parametrize("scale_dtype", ["float16", "byte"])
def test_channels_get_the_bits_of_their_tier_in_the_order_given(D, tiers, scale_dtype):
    fmt = make_format(4, "channel", 32, 32, 0, 0, scale_dtype, tiers=tiers, order="plan", span=100)
    x = values("normal", (2, 3, 64, D), 1)
    order = shuffled(2, 3, D, 2)
    cached = packed(x, fmt, order)
    assert cached.qdata.shape[3] == sum(bits * count for bits, count in tiers) // 16
    back = q.in_order(q.dequantize(cached, 0, 64), order)
    x = q.in_order(x, order)
    spread = (x.view(2, 3, 2, 32, D).amax(3) - x.view(2, 3, 2, 32, D).amin(3)).repeat_interleave(32, 2)
    first = 0
    for bits, count in tiers:
        part = slice(first, first + count)
        error = (back - x)[..., part].abs()
        if bits == 0:
            mean = x[..., part].view(2, 3, 2, 32, count).mean(3).repeat_interleave(32, 2)
            torch.testing.assert_close(back[..., part], mean, rtol=0.02, atol=0.02)
        else:
            # half a step; a byte rounds it by up to 1/16, what is then cut off at the ends included
            half = spread[..., part] / (2**bits - 1) / 2
            loose = 1.01 if scale_dtype == "float16" else 1 + (2 ** (bits + 1) - 1) / 16 + 0.25
            assert (error <= half * loose + 1e-2).all()
            assert error.mean() > half.mean() / 4  # it is these bits and not more
        first += count


@given(st.sampled_from((64, 128)), st.data(), st.integers(0, 1000))
def test_the_order_is_only_an_order(D, data, seed):
    """Packed in any order, keys with all channels at the same bits read the same."""
    tiers = ((4, D // 2), (2, D // 2))
    fmt = make_format(4, "channel", 16, 32, 0, 0, tiers=tiers, order="plan")
    x = values("normal", (1, 2, 32, D), seed)
    order = shuffled(1, 2, D, seed)
    # exchanging channels within a tier changes nothing
    mixed = torch.cat([order[..., : D // 2].flip(2), order[..., D // 2 :].flip(2)], 2)
    a, b = packed(x, fmt, order), packed(x, fmt, mixed)
    assert torch.equal(q.dequantize(a, 0, 32), q.dequantize(b, 0, 32))
    other = packed(x, fmt, order.flip(2))
    assert not torch.equal(q.dequantize(a, 0, 32), q.dequantize(other, 0, 32))


@given(st.integers(0, 0xF7), st.integers(-128, 127))
def test_a_byte_is_the_float16_it_is_shifted_to(byte, zero):
    fmt = make_format(2, scale_dtype="byte")
    step = scales.load_scale(torch.tensor([byte], dtype=torch.uint8), fmt, torch.float32)
    half = torch.tensor([byte << 7], dtype=torch.int16).view(torch.float16)
    assert step.item() == half.item()
    stored = scales.load_zero(step, torch.tensor([zero], dtype=torch.int8), fmt)
    assert stored.item() == step.item() * zero / 4
    # a number that a byte can hold is kept
    again, kept = scales.store(step, stored, fmt)
    if byte and abs(zero) <= 127:
        assert (again.item(), kept.item()) == (byte, zero)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 5.0, 300.0, -3e4])
def test_a_group_far_from_zero_gets_a_step_that_reaches_it(bits, offset):
    """An offset of a byte reaches 32 steps; further away steps are larger, and nothing is silently wrong."""
    fmt = make_format(bits, "channel", 32, 32, 0, 0, "byte")
    x = values("normal", (1, 1, 32, 64), 0) + offset
    back = q.dequantize(packed(x, fmt), 0, 32)
    step = scales.load_scale(packed(x, fmt).scale, fmt, torch.float32)
    low = x.amin(2)
    assert (step >= low.abs() * 4 / 128).all()
    # within a step: half by rounding, an eighth by the offset, the rest where rounding a step cut the top off
    assert ((back - x).abs() <= step * (0.63 + 2**bits / 16)).all()


def test_numbers_beyond_a_byte_saturate_and_small_ones_become_the_offset():
    fmt = make_format(2, "channel", 32, 32, 0, 0, "byte")
    x = values("normal", (1, 1, 32, 16), 0)
    huge = q.dequantize(packed(x * 1e6, fmt), 0, 32)
    assert huge.isfinite().all()
    assert huge.abs().max() <= 4 * 61440 * 32
    tiny = q.dequantize(packed(x * 1e-7, fmt), 0, 32)
    assert (tiny - x * 1e-7).abs().max() <= 1e-5


@pytest.mark.parametrize("D", [16, 48, 64, 80, 96, 128, 256])
def test_rotation_is_orthonormal_and_its_own_inverse(D):
    x = torch.randn(3, D, dtype=torch.float64)
    turned = scales.rotate(x)
    torch.testing.assert_close(scales.rotate(turned), x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(scales.rotate_sums(x), turned)
    one = torch.zeros(1, D, dtype=torch.float64)
    one[0, 0] = 1
    block = layout.hadamard_block(D)
    torch.testing.assert_close(
        scales.rotate(one)[0, :block].abs(), torch.full((block,), block**-0.5).double()
    )


def test_rotation_saves_values_with_an_outlier_channel():
    x = values("outlier channels", (2, 2, 64, 64), 3)
    plain = make_format(2, "token", 0, 32, 0, 0, "byte")
    turned = make_format(2, "token", 0, 32, 0, 0, "byte", rotation=True)
    symmetric = make_format(2, "token", 0, 32, 0, 0, "byte", rotation=True, symmetric=True)
    lost = [(q.dequantize(packed(x, fmt), 0, 64) - x).norm() for fmt in (plain, turned, symmetric)]
    assert lost[1] < lost[0] * 0.8
    assert lost[2] < lost[0] * 0.8
    # no offsets are stored at all
    assert packed(x, symmetric).zero_point.numel() == 0
    assert layout.bits_per_packed_element(symmetric, 64) == 2 + 8 / 64


def test_symmetric_codes_lie_on_both_sides_of_zero():
    fmt = make_format(2, "token", 0, 32, 0, 0, "float32", rotation=True, symmetric=True, span=100)
    x = values("normal", (1, 1, 32, 16), 4)
    turned = scales.rotate(q.dequantize(packed(x, fmt), 0, 32))
    step = packed(x, fmt).scale
    levels = torch.unique((turned / step).round(decimals=3))
    assert levels.tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_an_order_is_chosen_from_queries_and_ranges():
    """A channel matters if it is wide and the queries look at it: not if either is missing."""
    x = torch.randn(1, 1, 64, 16) * 0.1
    query = torch.rand(1, 2, 64, 16) * 0.1
    x[..., 3] *= 50
    query[..., 3] = 1
    x[..., 5] *= 100  # wide, but nobody looks
    query[..., 5] = 0
    query[..., 9] = 5  # looked at, but nearly constant
    x[..., 9] *= 1e-3
    fmt = make_format(4, "channel", 32, 64, 0, 0, tiers=((4, 8), (2, 8)), order="prompt")
    order = q.choose_order(x, None, query, fmt)[0, 0].tolist()
    assert order[0] == 3
    assert order[-1] == 5
    # padding has no say
    padded = x.clone()
    padded[:, :, :16, 7] = 1e6
    valid = torch.arange(64).view(1, 64) >= 16
    assert q.choose_order(padded, valid, query, fmt)[0, 0].tolist()[0] == 3
    assert q.choose_order(padded, None, query, fmt)[0, 0].tolist()[0] == 7


def by_tile(order, tiers=((16, 8), (4, 8), (2, 48)), **more):
    more = {"group_size": 16, "tile": 32, "sink": 2, "window": 8, "scale_dtype": "byte"} | more
    return make_format(4, "channel", tiers=tiers, order=order, **more)


@given(
    st.sampled_from(("tile", "tile_keys")),
    st.sampled_from((((16, 8), (4, 8), (2, 48)), ((4, 16), (2, 40), (0, 8)))),
    st.sampled_from((0, 8, 40)),
    st.lists(st.integers(1, 90), min_size=1, max_size=4),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.sampled_from(("normal", "outlier channels")),
    st.booleans(),
)
def test_orders_of_tiles_come_from_the_tokens_not_from_the_steps(
    order, tiers, window, pieces, dtype, family, pads
):
    """Every buffer of a cache that was filled step by step is that of one filled at once."""
    fmt, total = by_tile(order, tiers, window=window), sum(pieces)
    values_format = make_format(16)
    x = values(family, (2, 2, total, 64), 1, dtype)
    query = (values("normal", (2, 4, total, 64), 2) * torch.logspace(-1, 1, 64).roll(13)).to(dtype)
    seen = torch.ones(2, total, dtype=torch.bool)
    seen[0, : total // 3] = not pads

    def filled(steps, dirty=False):
        buffers = [
            allocate(2, 2, 64, layout.fixed_tiles(f, total), layout.fixed_slots(f, total), f, dtype, "cpu")
            for f in (fmt, values_format)
        ]
        if dirty and buffers[0].seen is not None:
            buffers[0].seen.fill_(1e6)  # of the sequence that it held before
        start = 0
        for n in steps:
            part = slice(start, start + n)
            mask = seen[:, None, None, : start + n]
            ops.append_(
                *(b.tensors for b in buffers), x[:, :, part], x[:, :, part], mask, None, start,
                fmt.encode(), values_format.encode(), query[:, :, part],
            )  # fmt: skip
            start += n
        return buffers[0]

    slow, fast = filled(pieces), filled([total], dirty=True)
    for name, a, b in zip(fmt.buffer_names, slow.tensors, fast.tensors, strict=True):
        # raw slots may keep what was overwritten later
        if name not in ("residual", "seen"):
            assert torch.equal(a, b), name
    if fast.seen is not None:
        torch.testing.assert_close(slow.seen, fast.seen)
        counted = query.double().abs() * seen.view(2, 1, -1, 1)
        torch.testing.assert_close(fast.seen, counted.view(2, 2, 2, total, 64).sum((2, 3)))


def test_each_tile_has_the_order_of_its_keys_and_of_the_queries_until_it_is_packed():
    x = values("normal", (1, 1, 120, 64), 3) * torch.logspace(-1, 1, 64).roll(7)
    query = values("normal", (1, 2, 120, 64), 4)
    query[:, :, :60, :32] *= 20  # later queries look elsewhere
    query[:, :, 60:, 32:] *= 20
    orders = {}
    for kind in ("tile", "tile_keys"):
        fmt = by_tile(kind)
        buffers = ops.quantize_pack(x, None, fmt.encode(), query)
        orders[kind] = buffers[4][0, 0, : fmt.packed_tiles(120)].long()
        for tile, order in enumerate(orders[kind]):
            first = fmt.sink + tile * fmt.tile
            keys = x[0, 0, first : first + fmt.tile]
            looks = query[0, :, : first + fmt.tile + fmt.window].abs().sum((0, 1))
            score = (keys.amax(0) - keys.amin(0)) * looks if kind == "tile" else keys.abs().mean(0)
            ranked = score.argsort(descending=True)
            # the raw channels are the last of what is packed
            assert order[-8:].tolist() == ranked[:8].tolist()
            assert order[:-8].tolist() == ranked[8:].tolist()
    assert not torch.equal(orders["tile"][0], orders["tile"][-1])
    assert not torch.equal(orders["tile"], orders["tile_keys"])
    # without queries, the range of keys decides
    fmt = by_tile("tile")
    alone = ops.quantize_pack(x, None, fmt.encode())[4][0, 0, 0].long()
    keys = x[0, 0, fmt.sink : fmt.sink + fmt.tile]
    assert alone[-8:].tolist() == (keys.amax(0) - keys.amin(0)).argsort(descending=True)[:8].tolist()


@pytest.mark.parametrize("order", ["plan", "prompt", "tile", "tile_keys"])
def test_raw_channels_are_kept_in_bfloat16_and_are_the_most_important(order):
    fmt = by_tile(order, sink=0, window=0)
    x = values("normal", (2, 2, 64, 64), 5)
    x[..., 3:40:5] *= 9
    query = values("normal", (2, 4, 64, 64), 6)
    hint = query
    if order == "plan":
        hint = q.order_by(q.ranges(x, None, fmt), query, fmt._replace(tiers=fmt.tiers[:2]))
    cached = Cached(fmt, tuple(ops.quantize_pack(x, None, fmt.encode(), hint)))
    back = q.dequantize(cached, 0, 64)
    for b in range(2):
        for h in range(2):
            for tile in range(2):
                rows = slice(tile * 32, tile * 32 + 32)
                raw = (cached.order[b, h, tile] if fmt.by_tile else cached.order[b, h])[-8:].long()
                assert set(raw.tolist()) == set(range(3, 40, 5))
                assert torch.equal(back[b, h, rows][:, raw], x[b, h, rows][:, raw].bfloat16().float())
    lost = (back - x).abs().amax((0, 1, 2))
    rest = [c for c in range(64) if c not in range(3, 40, 5)]
    assert lost[rest].min() > 0.05  # and only they are


def test_another_order_of_a_tile_would_show():
    """A control: what is read depends on every tile's own order."""
    fmt = by_tile("tile", sink=0, window=0)
    x = values("normal", (1, 2, 64, 64), 7)
    cached = Cached(fmt, tuple(ops.quantize_pack(x, None, fmt.encode(), values("normal", (1, 2, 64, 64), 8))))
    swapped = cached.replace(order=cached.order[:, :, :2].flip(2))
    query = values("normal", (1, 2, 1, 64), 9)
    raw = make_format(16)
    stored = ops.quantize_pack(x, None, raw.encode())

    def attended(keys):
        args = (keys.tensors, stored, None, None, 64, 1.0, fmt.encode(), raw.encode())
        return ops.attend(query, None, None, *args)

    exact = ops.attend(query, None, None, stored, stored, None, None, 64, 1.0, raw.encode(), raw.encode())
    near, far = (attended(keys) - exact for keys in (cached, swapped))
    assert far.norm() > 3 * near.norm()


def test_ops_declare_the_buffers_of_orders_of_tiles_and_raw_channels():
    fmt, raw = by_tile("tile"), make_format(16)
    x, query = values("normal", (1, 2, 40, 64), 11), values("normal", (1, 4, 40, 64), 12)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.quantize_pack, (x, None, fmt.encode(), query), test_utils=tests)
    keys, stored = ops.quantize_pack(x, None, fmt.encode(), query), ops.quantize_pack(x, None, raw.encode())
    step = (keys, stored, x[:, :, :9], x[:, :, :9], None, None, 40, fmt.encode(), raw.encode())
    torch.library.opcheck(ops.append_, (*step, query[:, :, :9]), test_utils=tests)


def test_orders_of_tiles_and_raw_channels_are_counted():
    plain = make_format(4, "channel", 32, 128, tiers=((4, 16), (2, 112)), order="prompt")
    assert layout.bits_per_packed_element(plain, 128) == 2.25 + 1
    own = plain._replace(order=layout.ORDER_TILE)
    assert layout.bits_per_packed_element(own, 128) == 2.25 + 1 + 8 / 128
    raw = make_format(4, "channel", 32, 128, tiers=((16, 8), (4, 16), (2, 104)), order="tile")
    assert layout.bits_per_packed_element(raw, 128) == 3.125 + 1 + 8 / 128
    cached = allocate(1, 1, 128, 3, raw.residual_slots, raw, torch.bfloat16, "cpu")
    nbytes = sum(b.numel() * b.element_size() for b in cached.tensors)
    assert nbytes == layout.buffer_nbytes(raw, 128, 3, raw.residual_slots, 2)
    assert cached.order.dtype == torch.uint8
    wide = raw._replace(tiers=(*raw.tiers[:1], raw.tiers[1]._replace(channels=488), raw.tiers[2]))
    assert allocate(1, 1, 512, 1, 1, wide, torch.bfloat16, "cpu").order.dtype == torch.int16


def test_who_takes_the_slow_reference_is_told():
    fmt = by_tile("tile", ((4, 16), (2, 256)), sink=0, window=0)
    x = values("normal", (1, 1, 32, 272), 10)
    keys = ops.quantize_pack(x, None, fmt.encode())
    cpu_attention._say_reference.cache_clear()
    with pytest.warns(UserWarning, match="more than 256 channels"):
        ops.attend(x[:, :, :1], None, None, keys, keys, None, None, 32, 1.0, fmt.encode(), fmt.encode())


def test_an_order_from_the_prompt_is_chosen_once_and_kept():
    fmt = make_format(4, "channel", 32, 32, 2, 8, "byte", tiers=((4, 16), (2, 48)), order="prompt")
    x = values("normal", (2, 2, 200, 64), 5) * torch.logspace(-1, 1, 64)[torch.randperm(64)]
    query = values("normal", (2, 4, 100, 64), 6)
    cached = allocate(2, 2, 64, 6, fmt.residual_slots, fmt, x.dtype, "cpu")
    storage.append(cached, x[:, :, :20], None, 0, query[:, :, :20])
    assert torch.equal(cached.order, torch.arange(64).expand(2, 2, 64).int())  # nothing is packed yet
    storage.append(cached, x[:, :, 20:120], None, 20, query)
    chosen = cached.order.clone()
    expected = q.choose_order(x[:, :, 2:98], None, query, fmt)
    assert torch.equal(chosen, expected)
    assert not torch.equal(chosen, torch.arange(64).expand(2, 2, 64).int())
    storage.append(cached, x[:, :, 120:], None, 120, query.flip(3))
    assert torch.equal(cached.order, chosen)


def test_ops_take_orders_and_queries():
    fmt = make_format(4, "channel", 32, 32, 0, 0, "byte", tiers=((4, 16), (2, 48)), order="plan")
    x = values("normal", (2, 3, 64, 64), 7)
    order = shuffled(1, 3, 64, 8)[0]
    buffers = ops.quantize_pack(x, None, fmt.encode(), order)
    assert torch.equal(buffers[4], order.expand(2, 3, 64))
    assert torch.equal(buffers[0][:, :, :64], packed(x, fmt, order.expand(2, 3, 64)).qdata)
    prompt = fmt._replace(order=layout.ORDER_PROMPT)
    query = values("normal", (2, 6, 64, 64), 9)
    buffers = ops.quantize_pack(x, None, prompt.encode(), query)
    assert torch.equal(buffers[4], q.choose_order(x, None, query, prompt))
    with pytest.raises(FormatError, match="order"):
        ops.quantize_pack(x, None, fmt.encode())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4, "tiers": ((4, 32), (2, 32))}, 'order="plan" or "prompt"'),
        ({"bits": 4, "tiers": ((2, 32), (4, 32)), "order": "plan"}, "in this order"),
        ({"bits": 4, "tiers": ((4, 8), (16, 8), (2, 48)), "order": "tile"}, r"of \(16, 4, 2, 0\) bits"),
        ({"bits": 4, "tiers": ((16, 8), (2, 56)), "order": "tile"}, "some channels at 4 bits"),
        ({"bits": 4, "tiers": ((16, 8), (4, 56)), "order": "tile"}, "others below"),
        ({"bits": 4, "tiers": ((16, 4), (4, 8), (2, 52)), "order": "tile"}, "multiples of 8"),
        ({"bits": 2, "order": "tile"}, "needs tiers"),
        ({"bits": 4, "tiers": ((4, 30), (2, 34)), "order": "plan"}, "multiples of 8"),
        ({"bits": 4, "tiers": ((4, 64),), "order": "plan"}, "others below"),
        ({"bits": 2, "tiers": ((4, 32), (2, 32)), "order": "plan"}, "use bits=4"),
        (
            {"bits": 4, "axis": "token", "group_size": 0, "tiers": ((4, 32), (2, 32)), "order": "plan"},
            'axis="channel"',
        ),
        ({"bits": 2, "order": "plan"}, "needs tiers"),
        ({"bits": 4, "order": "best"}, "must be one of"),
        ({"bits": 2, "rotation": True}, "leave rotation to values"),
        ({"bits": 2, "axis": "token", "group_size": 0, "symmetric": True}, "need rotation"),
        ({"bits": 2, "span": 0}, "between 1 and 100"),
    ],
)
def test_formats_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        make_format(**arguments)


def test_tiers_that_do_not_add_up_to_the_head_are_refused():
    fmt = make_format(4, tiers=((4, 32), (2, 32)), order="plan")
    with pytest.raises(HeadSizeError, match=r"32, 32.*128"):
        layout.check_head_size(fmt, 128)
