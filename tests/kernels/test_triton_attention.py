"""The Triton attend against the reference: every geometry, mask and length, poisoned scratch."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    # before the kernels are imported: afterwards it has no effect
    os.environ["TRITON_INTERPRET"] = "1"

from kvmix_fx.testing.tensors import extras
from kvmix_kernels import layout, ops
from kvmix_kernels import triton as kernels
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.errors import CacheShapeError
from kvmix_kernels.layout import TensorFormat, make_format
from kvmix_kernels.reference import storage
from kvmix_kernels.triton import configs
from kvmix_kernels.triton.common import in_pairs
from kvmix_kernels.triton.kernels import bulk
from kvmix_kernels.triton.launch_plan import Step, attend_plan, has_bulk_path
from tests.depth import examples

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# on a GPU nearly every example compiles a kernel: shards are for pytest-xdist
SHARDS = range(8 if torch.cuda.is_available() else 1)
EXAMPLES = 8 if torch.cuda.is_available() else 25
quick = settings(max_examples=examples(EXAMPLES), deadline=None, suppress_health_check=[HealthCheck.too_slow])

# the bulk rounds the scaled query and the scaled probabilities to half precision; outputs are
# rounded to the model dtype, and raw tokens of a bfloat16 model get bfloat16 probabilities
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}

Ranges = tuple[tuple[int, int], ...]


def poisoned_empty(*size: object, **options: object) -> torch.Tensor:
    """torch.empty whose memory would be noticed if it were used."""
    out = torch.zeros(*size, **options)
    return out.fill_(float("nan") if out.is_floating_point() else -21846)


@pytest.fixture(autouse=True, scope="module")
def poison() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        yield


def filled(
    B: int,
    H: int,
    D: int,
    L: int,
    capacity: int,
    fmt: TensorFormat,
    dtype: torch.dtype,
    spread: float,
    g: torch.Generator,
) -> Cached:
    """A cache of L random tokens whose channels differ in size by up to 2**spread; their order is random."""
    x = torch.randn(B, H, L, D, generator=g) * torch.exp2(spread * torch.rand(D, generator=g) - spread / 2)
    cache = allocate(
        B, H, D, layout.fixed_tiles(fmt, capacity), layout.fixed_slots(fmt, capacity), fmt, dtype, DEVICE
    )
    if cache.order is not None and not fmt.by_tile:
        cache.order.copy_(torch.rand(B, H, D, generator=g).argsort(2))
    storage.append(cache, x.to(dtype).to(DEVICE), None, 0)
    return cache


def growth(spread: float) -> float:
    """Root mean square of channels whose sizes are 2**u with u uniform in -spread / 2 .. spread / 2.

    Scores grow by as much, and what rounding the scaled query moves them by, which is what it moves
    probabilities by: seen up to 0.0037 for a spread of 8, where this is 4.8.
    """
    return ((2**spread - 2**-spread) / (2 * spread * math.log(2))) ** 0.5 if spread else 1.0


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    got, expected = got.float(), expected.float()
    assert torch.isfinite(got).all()
    # per row, relative to the largest output: rows are averages of values, elements may cancel
    scale = expected.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-20)
    assert ((got - expected).abs() / scale).max() <= tolerance


def check(
    k: TensorFormat,
    v: TensorFormat,
    B: int,
    Hkv: int,
    group: int,
    Lq: int,
    D: int,
    Dv: int,
    L: int,
    *,
    dtype: torch.dtype = torch.float32,
    mask: str = "none",
    hidden: Ranges = (),
    extra: int = 0,
    new: bool = True,
    spread: float = 0.0,
    softcap: float = 0.0,
    sinks: bool = False,
    seed: int = 0,
    config: configs.AttendConfig | None = None,
) -> None:
    """Compare once; `extra` > 0 makes the cache fixed, with that much spare capacity.

    The mask hides random tokens, or the ranges `hidden` alone, 5 tokens later in each further sequence.
    """
    g = torch.Generator().manual_seed(seed)
    capacity = L + extra
    keys = filled(B, Hkv, D, L, capacity, k, dtype, spread, g)
    values = filled(B, Hkv, Dv, L, capacity, v, dtype, spread, g)
    query = torch.randn(B, Lq, Hkv * group, D, generator=g).to(dtype).to(DEVICE).transpose(1, 2)
    fresh = [torch.randn(B, Lq, Hkv, n, generator=g).to(dtype).to(DEVICE).transpose(1, 2) for n in (D, Dv)]
    S = capacity + Lq
    seen = None
    if mask != "none":
        heads = Hkv * group if "heads" in mask else 1
        seen = torch.rand(B, heads, Lq, S, generator=g) > 0.3
        # a query that sees nothing, and one that sees only the last token
        seen[0, :, 0] = False
        seen[-1, :, -1] = False
        seen[-1, :, -1, L - 1 if not new else L] = True
        if hidden:
            seen[:] = True
            for row, (first, end) in itertools.product(range(B), hidden):
                seen[row, :, :, first + 5 * row : end + 5 * row] = False
        seen = seen.to(DEVICE)
        if "stride 0" in mask:
            seen = seen[:1, :1, :1].expand(B, Hkv * group, Lq, S)
        if "additive" in mask:
            added = torch.zeros(seen.shape) if hidden else torch.randn(seen.shape, generator=g)
            added = added.to(DEVICE)
            seen = added.masked_fill(~seen, -torch.inf if "inf" in mask else torch.finfo(torch.float32).min)
    start = torch.tensor(L, device=DEVICE) if extra else None
    args = (
        query,
        *(fresh if new else (None, None)),
        keys.tensors,
        values.tensors,
        seen,
        start,
        capacity,
        D**-0.5,
        k.encode(),
        v.encode(),
        softcap,
        # from leaving nearly all of attention to leaving nearly nothing
        torch.linspace(-4, 12, Hkv * group).to(dtype).to(DEVICE) if sinks else None,
    )
    expected = ops._attend(*(a.float() if a is query else a for a in args))
    assert_close(kernels.attend(*args, config=config), expected, TOLERANCE[dtype] * growth(spread))


MASKS = ("none", "bool", "bool heads", "bool stride 0", "additive", "additive inf heads")


@pytest.mark.parametrize("shard", SHARDS)
@quick
@given(data=st.data())
def test_attend_equals_the_reference_in_every_geometry(shard: int, data: st.DataObject) -> None:
    D, Dv = data.draw(st.sampled_from(((64, 64), (128, 128), (80, 80), (96, 96), (48, 32), (16, 64))))
    formats = []
    sink, window = data.draw(st.sampled_from((0, 3, 4))), data.draw(st.sampled_from((0, 7, 32)))
    for size in (D, Dv):
        bits = data.draw(st.sampled_from(layout.BITS))
        axis = data.draw(st.sampled_from(("channel", "token")))
        if axis == "channel":
            group = data.draw(st.sampled_from((16, 32, 64)))
            tile = group * data.draw(st.sampled_from((1, 2)))
        else:
            group = data.draw(st.sampled_from([n for n in (16, 32) if size % n == 0] + [0]))
            tile = data.draw(st.sampled_from((16, 64)))
        if data.draw(st.booleans()):
            sink, window = data.draw(st.sampled_from((0, 3, 20))), data.draw(st.sampled_from((0, 7, 64)))
        more = {"bits": bits}
        if bits != layout.RAW_BITS and data.draw(st.booleans()):
            more |= data.draw(extras(size, axis, keys=not formats))
        scale_dtype = data.draw(st.sampled_from(layout.SCALE_DTYPES))
        formats.append(
            make_format(
                axis=axis,
                group_size=group,
                tile=tile,
                sink=sink,
                window=window,
                scale_dtype=scale_dtype,
                **more,
            )
        )
    new = data.draw(st.booleans())
    check(
        *formats,
        B=data.draw(st.sampled_from((1, 2))),
        Hkv=data.draw(st.sampled_from((1, 2))),
        group=data.draw(st.sampled_from((1, 3, 4))),
        Lq=data.draw(st.sampled_from((1, 1, 1, 2, 5, 20))),
        D=D,
        Dv=Dv,
        L=data.draw(st.integers(0 if new else 1, 200)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        mask=data.draw(st.sampled_from(MASKS)),
        extra=data.draw(st.sampled_from((0, 0, 40))),
        new=new,
        softcap=data.draw(st.sampled_from((0.0, 0.0, 0.5, 30.0))),
        sinks=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("shard", SHARDS)
@quick
@given(data=st.data())
def test_the_bulk_path_equals_the_reference(shard: int, data: st.DataObject) -> None:
    D = data.draw(st.sampled_from((64, 128) if not ON_GPU else (64, 80, 96, 128, 256)))
    group = data.draw(st.sampled_from((32, 64, 128) if ON_GPU else (32, 64)))
    sink, window = data.draw(st.sampled_from((0, 4))), data.draw(st.sampled_from((0, 32)))
    both = []
    for axis in (data.draw(st.sampled_from(("channel", "token"))), "token"):
        keys = not both
        # of keys per token halves of a head: groups of whole fields at any width
        tiles = data.draw(st.sampled_from((2, 3)))
        sizes = [n for n in ((D // 2,) if keys else (32, 64)) if D % n == 0 and n % 16 == 0] + [0]
        size = group if axis == "channel" else data.draw(st.sampled_from(sizes))
        more = {"bits": data.draw(st.sampled_from(layout.WIDTHS))}
        if data.draw(st.booleans()) and (axis == "channel" or not keys):
            more |= data.draw(extras(D, axis, keys=keys))
        both.append(
            make_format(
                axis=axis, group_size=size, tile=tiles * group, sink=sink, window=window,
                scale_dtype=data.draw(st.sampled_from(layout.SCALE_DTYPES)), **more,
            )
        )  # fmt: skip
    k, v = both
    assert has_bulk_path(k, v, D, D, 1)
    check(
        k,
        v,
        B=1,
        Hkv=2,
        group=data.draw(st.sampled_from((1, 4, 8))),
        Lq=data.draw(st.sampled_from((1, 1, 2))),
        D=D,
        Dv=D,
        L=data.draw(st.integers(100, 400)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        mask=data.draw(st.sampled_from(MASKS)),
        extra=data.draw(st.sampled_from((0, 300))),
        spread=data.draw(st.sampled_from((0.0, 8.0))),
        softcap=data.draw(st.sampled_from((0.0, 0.0, 0.5, 30.0))),
        sinks=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**31)),
        config=configs.AttendConfig(
            tokens=data.draw(st.sampled_from((32, 64, 128))),
            spread=data.draw(st.sampled_from((1, 2, 4))),
            warps=data.draw(st.sampled_from((1, 2))),
            programs=data.draw(st.sampled_from((2, 8))),
            rest_tokens=16,
        ),
    )


@pytest.mark.parametrize("bits", layout.WIDTHS)
@pytest.mark.parametrize("D", [32, 80, 96, 192, 256])
def test_the_bulk_path_at_every_width_and_head_size(D: int, bits: int) -> None:
    half = D // 2 if D % 32 == 0 else 0
    v = make_format(bits, "token", half, 32, 0, 0)
    for k in (make_format(bits, "channel", 32, 32, 0, 0), v):
        assert has_bulk_path(k, v, D, D, 1)
        config = configs.AttendConfig(tokens=32, warps=1)
        check(k, v, B=1, Hkv=1, group=2, Lq=1, D=D, Dv=D, L=70, config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "bits", "tiers"), [(144, 1, ()), (128, 4, ((4, 24), (2, 104)))])
def test_fields_of_an_odd_number_of_channels(D: int, bits: int, tiers: Ranges, dtype: torch.dtype) -> None:
    """Whose queries do not begin at pairs, beside those that do."""
    k = make_format(bits, "channel", 32, 32, 0, 0, tiers=tiers, order="prompt" if tiers else "none")
    v = make_format(2, "token", 0, 32, 0, 0)
    config = configs.AttendConfig(tokens=32, warps=1)
    check(k, v, B=1, Hkv=1, group=2, Lq=1, D=D, Dv=D, L=70, dtype=dtype, config=config)


def test_keys_with_scales_per_token_that_take_the_general_path() -> None:
    """Groups that are no whole fields, many groups, rotated keys, odd tiles."""
    v = make_format(2, "token", 0, 32)
    assert has_bulk_path(make_format(2, "token", 16, 32), v, 128, 128, 1)
    for D, k in (
        (128, make_format(8, "token", 32, 32)),
        (80, make_format(4, "token", 16, 32)),
        (256, make_format(1, "token", 16, 32)),
        (128, make_format(4, "token", 0, 32, rotation=True)),
        (128, make_format(4, "token", 0, 40)),
    ):
        assert not has_bulk_path(k, v, D, D, 1)
        check(k, v, B=1, Hkv=1, group=2, Lq=1, D=D, Dv=D, L=130)


@pytest.mark.parametrize("mask", ["none", "bool", "additive inf heads"])
@pytest.mark.parametrize("L", [40, 130, 250])
def test_steps_longer_than_tiles_of_keys_with_scales_per_token(L: int, mask: str) -> None:
    """Shares that are fewer tokens than a step, whole steps and parts of one."""
    k, v = make_format(2, "token", 32, 16, 0, 0), make_format(3, "token", 32, 16, 3, 8)
    config = configs.AttendConfig(tokens=64, programs=4, rest_tokens=16)
    assert attend_plan(k, v, Step(2, 3, 64, 64, L, 1, True, True, True), configs.Gpu(), config).tokens == 64
    check(k, v, B=2, Hkv=1, group=3, Lq=1, D=64, Dv=64, L=L, mask=mask, extra=40, config=config)


@pytest.mark.parametrize(
    ("D", "tiers"),
    [
        (64, ((4, 16), (2, 48))),
        (128, ((4, 32), (2, 96))),
        (128, ((4, 64), (2, 64))),
        (128, ((4, 32), (2, 64), (0, 32))),
        (128, ((16, 8), (4, 16), (2, 104))),
        (96, ((4, 24), (2, 64), (0, 8))),
        (80, ((4, 72), (2, 8))),
        (256, ((4, 64), (2, 192))),
    ],
)
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_the_bulk_path_of_tiers_and_rotated_values(D: int, tiers: Ranges, mask: str) -> None:
    """Tiers read as one field and others, odd counts of words, values of whole heads and of groups."""
    k = make_format(4, "channel", 32, 32, 4, 8, "byte", tiers=tiers, order="prompt")
    config = configs.AttendConfig(tokens=64, spread=2, programs=4, rest_tokens=16)
    for more in ({"group_size": 0, "symmetric": True}, {"group_size": 16}):
        v = make_format(2, "token", tile=32, sink=4, window=8, scale_dtype="byte", rotation=True, **more)
        assert has_bulk_path(k, v, D, D, 1) is (D // (more["group_size"] or D) <= 8)
        check(k, v, B=2, Hkv=2, group=2, Lq=1, D=D, Dv=D, L=170, mask=mask, extra=40, config=config)


def test_values_with_orders_of_tiles_take_the_reference_and_say_so() -> None:
    v = make_format(4, "channel", 16, 32, 0, 0, tiers=((4, 16), (2, 48)), order="tile_keys")
    with pytest.warns(UserWarning, match="slow reference"):
        check(make_format(16), v, B=1, Hkv=1, group=2, Lq=1, D=64, Dv=64, L=70, extra=40)


def test_many_shares_of_rotated_values_are_turned_back_as_one() -> None:
    k = make_format(4, "channel", 32, 32, 0, 0, "byte", tiers=((4, 16), (2, 48)), order="prompt")
    v = make_format(2, "token", 0, 32, 0, 0, "byte", rotation=True, symmetric=True)
    config = configs.AttendConfig(tokens=32, programs=100, rest_tokens=16)
    plan = attend_plan(k, v, Step(1, 2, 64, 64, 450, 1, True, False, False), configs.Gpu(), config)
    assert plan.bulk_splits > plan.merge_chunk
    check(k, v, B=1, Hkv=1, group=2, Lq=1, D=64, Dv=64, L=450, spread=4.0, sinks=True, config=config)


@pytest.mark.parametrize(("D", "parts"), [(128, 4), (80, 4), (64, 2), (32, 1)])
def test_channels_of_few_rows_are_merged_by_several_programs(D: int, parts: int) -> None:
    k, v = make_format(2, "channel", 32, 32, 0, 0), make_format(2, "token", 16, 32, 0, 0)
    config = configs.AttendConfig(tokens=32, programs=100, rest_tokens=16)
    plan = attend_plan(k, v, Step(2, 2, D, D, 700, 1, True, False, False), configs.Gpu(), config)
    assert plan.bulk_splits > 16
    assert plan.merge_parts == parts
    check(k, v, B=1, Hkv=2, group=2, Lq=1, D=D, Dv=D, L=700, sinks=True, config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_begin_between_pairs_are_copied(dtype: torch.dtype) -> None:
    """Two numbers are read at once: from an address that is no multiple of both that is a fault on a GPU."""
    k, v = make_format(2, "channel", 32, 32, 0, 0), make_format(2, "token", 0, 32, 0, 0)
    g = torch.Generator().manual_seed(7)
    caches = [filled(1, 2, 128, 96, 96, fmt, dtype, 0.0, g).tensors for fmt in (k, v)]
    rows = torch.randn(4 * 129 + 1, generator=g).to(dtype).to(DEVICE)
    apart, odd = rows[1 : 1 + 4 * 128].view(1, 4, 1, 128), rows[: 4 * 129].view(1, 4, 1, 129)[..., :128]
    for query in (apart, odd):
        assert in_pairs(query) is not query
        args = (query, None, None, *caches, None, None, 96, 128**-0.5, k.encode(), v.encode())
        expected = ops._attend(query.float(), *args[1:])
        assert_close(kernels.attend(*args), expected, TOLERANCE[dtype])
    whole = rows[: 4 * 128].view(1, 4, 1, 128)
    assert in_pairs(whole) is whole


@pytest.mark.parametrize("wrong", ["order", "basis"])
def test_another_order_or_basis_would_show(wrong: str) -> None:
    """A control: the comparison is not blind to what the formats add."""
    k = make_format(4, "channel", 32, 32, 0, 0, "byte", tiers=((4, 16), (2, 48)), order="prompt")
    v = make_format(2, "token", 0, 32, 0, 0, "byte", rotation=True, symmetric=True)
    g = torch.Generator().manual_seed(0)
    keys, stored = (filled(1, 1, 64, 96, 96, fmt, torch.float32, 0.0, g) for fmt in (k, v))
    query = torch.randn(1, 2, 1, 64, generator=g).to(DEVICE)
    args = (query, None, None, keys.tensors, stored.tensors, None, None, 96, 0.125, k.encode(), v.encode())
    expected = ops._attend(*args)
    assert_close(kernels.attend(*args), expected, TOLERANCE[torch.float32])
    if wrong == "order":
        other = (*args[:3], (*keys.tensors[:4], keys.tensors[4].flip(2)), *args[4:])
    else:
        other = (*args[:10], v._replace(rotation=0).encode())
    with pytest.raises(AssertionError):
        assert_close(kernels.attend(*other), expected, 10 * TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("D", "bits", "size"),
    [
        (96, 1, 32),
        (96, 2, 32),
        (96, 3, 32),
        (96, 4, 32),
        (80, 4, 16),
        (128, 8, 32),
        (192, 3, 64),
        (256, 4, 32),
    ],
)
def test_the_bulk_path_where_a_field_has_channels_of_several_groups(D: int, bits: int, size: int) -> None:
    k, v = make_format(bits, "channel", 32, 32, 0, 0), make_format(bits, "token", size, 32, 0, 0)
    assert has_bulk_path(k, v, D, D, 1)
    config = configs.AttendConfig(tokens=64, spread=2)
    check(k, v, B=1, Hkv=2, group=3, Lq=1, D=D, Dv=D, L=170, spread=8.0, config=config)


@pytest.mark.parametrize("mask", ["none", "bool heads", "additive"])
@pytest.mark.parametrize(("group", "Lq"), [(1, 1), (3, 1), (2, 2), (8, 1)])
@pytest.mark.parametrize("L", [33, 130, 250])
def test_columns_without_a_query_row_take_other_groups(L: int, group: int, Lq: int, mask: str) -> None:
    """Fewer groups than a step has, some that fill no step, and no free columns."""
    k, v = make_format(2, "channel", 32, 32, 0, 0), make_format(3, "token", 32, 32, 0, 0)
    config = configs.AttendConfig(tokens=128, spread=4, programs=4, rest_tokens=16)
    check(k, v, B=1, Hkv=2, group=group, Lq=Lq, D=64, Dv=64, L=L, mask=mask, extra=40, config=config)


def test_steps_of_several_groups_that_begin_within_a_block_of_planes() -> None:
    k, v = make_format(3, "channel", 16, 32, 0, 0), make_format(3, "token", 0, 32, 0, 0)
    config = configs.AttendConfig(tokens=32, spread=2, programs=4, max_groups=3, rest_tokens=16)
    check(k, v, B=1, Hkv=1, group=2, Lq=1, D=64, Dv=64, L=170, config=config)


@pytest.mark.parametrize("mask", ["bool", "additive", "additive inf"])
@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize(
    "hidden",
    [((0, 3),), ((0, 32),), ((0, 100),), ((0, 150), (170, 171)), ((130, 131),), ((40, 400),), ((0, 400),)],
)
def test_tokens_hidden_from_all_query_rows(hidden: Ranges, group: int, mask: str) -> None:
    """Groups that are hidden are left out, and behind the last hidden token the mask is not read."""
    k, v = make_format(2, "channel", 32, 32, 0, 0), make_format(4, "token", 0, 32, 0, 0)
    config = configs.AttendConfig(tokens=64, spread=2, programs=4, max_groups=4, rest_tokens=16)
    check(
        k, v, B=2, Hkv=1, group=group, Lq=1, D=64, Dv=64, L=330, mask=mask, hidden=hidden, extra=40,
        config=config,
    )  # fmt: skip


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4])
def test_the_bulk_path_survives_values_of_any_size(size: float, axis: str) -> None:
    g = torch.Generator().manual_seed(3)
    k, v = (make_format(2, axis, 32, 32, 0, 0, "float32") for axis in (axis, "token"))
    assert has_bulk_path(k, v, 64, 64, 1)
    x = [torch.randn(1, 1, 96, 64, generator=g).to(DEVICE) * size for _ in range(2)]
    caches = []
    for tokens, fmt in zip(x, (k, v), strict=True):
        cache = allocate(1, 1, 64, 3, fmt.residual_slots, fmt, torch.float32, DEVICE)
        storage.append(cache, tokens, None, 0)
        caches.append(cache.tensors)
    # scores of ordinary size, so that the softmax is not a single token
    query = torch.randn(1, 1, 1, 64, generator=g).to(DEVICE) / size
    args = (query, None, None, *caches, None, None, 96, 0.125, k.encode(), v.encode())
    assert_close(kernels.attend(*args), ops._attend(*args), 3e-3)


@pytest.mark.parametrize("place", [4, 36])
@pytest.mark.parametrize("what", ["values", "keys", "keys without a code of 0"])
def test_scales_larger_than_they_were_guessed(what: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 37 groups four are looked at. In another one scales are 10,000 times as large: operands overflow.

    The last group fills no step of two.
    """
    k, v = make_format(2, "channel", 32, 32, 0, 0), make_format(2, "token", 32, 32, 0, 0)
    D, L, first = 64, 37 * 32, place * 32
    g = torch.Generator().manual_seed(5)
    caches = []
    for name, fmt in (("keys", k), ("values", v)):
        tokens = torch.randn(1, 1, L, D, generator=g)
        if what == name:
            tokens[:, :, first + 5 : first + 8] *= 10000
        elif name == "values":
            # so that it shows whether the group is there
            tokens[:, :, first : first + 32] += 30
        cache = allocate(1, 1, D, L // 32, fmt.residual_slots, fmt, torch.float32, DEVICE)
        storage.append(cache, tokens.to(DEVICE), None, 0)
        caches.append(cache)
    if what == "keys without a code of 0":
        # of queries below 0 all products are minus infinity: offsets make ordinary scores of these keys
        caches[0].qdata[:, :, first : first + 32] = -1
        caches[0].scale[:, :, place] = 3000.0
        caches[0].zero_point[:, :, place] = -9000.0
    query = torch.rand(1, 3, 1, D, generator=g).to(DEVICE) * -1e-4
    tensors = (cache.tensors for cache in caches)
    args = (query, None, None, *tensors, None, None, L, 0.125, k.encode(), v.encode())
    config = configs.AttendConfig(tokens=64, warps=1, spread=2, programs=1, max_groups=64, rest_tokens=16)
    expected = ops._attend(*args)
    assert_close(kernels.attend(*args, config=config), expected, 3e-3)
    if not ON_GPU:
        # without a second try they would be wrong
        monkeypatch.setattr(bulk, "_fit", lambda *_: True)
        once = kernels.attend(*args, config=config)
        assert not torch.allclose(once, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("groups", [24, 40])
@pytest.mark.parametrize("D", [80, 128])
def test_offsets_of_many_groups_are_multiplied_by_all_channels_at_once(D: int, groups: int) -> None:
    """In one turn and in several; of a head whose channels do not fill the tile that is multiplied."""
    g = torch.Generator().manual_seed(D)
    k, v = make_format(3, "channel", 32, 32, 0, 0), make_format(2, "token", 0, 32, 0, 0)
    L = 32 * groups
    caches = [filled(1, 2, D, L, L, fmt, torch.float16, 6.0, g) for fmt in (k, v)]
    query = torch.randn(1, 4, 1, D, generator=g).to(DEVICE, torch.float16)
    tensors = (cache.tensors for cache in caches)
    args = (query, None, None, *tensors, None, None, L, D**-0.5, k.encode(), v.encode())
    config = configs.AttendConfig(tokens=32, warps=1, programs=1, max_groups=64, rest_tokens=16)
    plan = attend_plan(k, v, Step(2, 2, D, D, L, 0, True, True, False), configs.Gpu(), config)
    assert (plan.part, plan.room > plan.part) == (32, groups > 32)
    assert_close(kernels.attend(*args, config=config), ops._attend(*args), TOLERANCE[torch.float16])


@triton.jit
def order_of_rows(rows_ptr, tokens_ptr, TOKENS: tl.constexpr, N: tl.constexpr):
    token = tl.arange(0, TOKENS)
    rows = bulk._rows_by_fours(tl.broadcast_to(token[:, None], [TOKENS, N]))
    tl.store(rows_ptr + token[:, None] * N + tl.arange(0, N)[None, :], rows)
    tl.store(tokens_ptr + token, bulk._by_fours(token))


def test_weights_and_values_change_to_the_same_order() -> None:
    """That of some versions of Triton, which only a GPU shows otherwise."""
    rows = torch.empty(32, 8, dtype=torch.int32, device=DEVICE)
    tokens = torch.empty(32, dtype=torch.int32, device=DEVICE)
    order_of_rows[(1,)](rows, tokens, 32, 8)
    assert tokens[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert torch.equal(rows, tokens[:, None].expand(32, 8))


def test_an_empty_cache_without_new_tokens_gives_zeros() -> None:
    fmt = make_format(2)
    cache = allocate(1, 1, 32, 0, fmt.residual_slots, fmt, torch.float32, DEVICE)
    query = torch.ones(1, 2, 1, 32, device=DEVICE)
    args = (query, None, None, cache.tensors, cache.tensors, None, None, 0, 1.0, fmt.encode(), fmt.encode())
    assert not kernels.attend(*args).any()


@pytest.mark.parametrize("mask", ["none", "bool", "bool heads", "additive inf heads"])
@pytest.mark.parametrize(("Lq", "L"), [(33, 20), (33, 170), (13, 170)])
def test_more_query_rows_than_columns_use_several_blocks(Lq: int, L: int, mask: str) -> None:
    """On the general path, and with up to 64 rows on the fast one."""
    k, v = make_format(4, "channel", 32, 32, 0, 0), make_format(4, "token", 0, 32, 0, 0)
    check(k, v, B=1, Hkv=2, group=4, Lq=Lq, D=32, Dv=32, L=L, mask=mask)


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """A copy whose third sequence begins 2**31 elements behind the first; what lies between is not used."""
    out = torch.empty_strided(x.shape, (1 << 30, *x.stride()[1:]), dtype=x.dtype, device=x.device)
    return out.copy_(x)


@pytest.mark.parametrize("names", [("qdata",), ("scale", "zero_point"), ("residual",)])
def test_places_that_32_bits_do_not_hold(names: tuple[str, ...]) -> None:
    k, v = make_format(2, "channel", 32, 32, 2, 8), make_format(3, "token", 0, 32, 2, 8)
    g = torch.Generator().manual_seed(5)
    near = [filled(3, 1, 64, 105, 160, fmt, torch.float16, 0.0, g) for fmt in (k, v)]
    near = [cache.tensors for cache in near]
    far = [
        [far_apart(b) if name in names else b for name, b in zip(layout.BUFFER_NAMES, cache, strict=True)]
        for cache in near
    ]
    tokens = torch.randn(2, 3, 1, 1, 64, generator=g).half().to(DEVICE)
    query = torch.randn(3, 2, 1, 64, generator=g).half().to(DEVICE)
    # the append packs a tile
    start = torch.tensor(105, device=DEVICE)
    results = []
    for keys, stored in (near, far):
        kernels.append_(keys, stored, *tokens, None, start, 160, k.encode(), v.encode())
        args = (query, None, None, keys, stored, None, start + 1, 160, 0.125, k.encode(), v.encode())
        results.append(kernels.attend(*args))
        results += [
            kernels.dequantize(cache, start + 1, 160, f.encode()) for cache, f in ((keys, k), (stored, v))
        ]
    expected = ops._attend(query.float(), *args[1:])
    assert_close(results[0], expected, TOLERANCE[torch.float16])
    for one, other in zip(results[:3], results[3:], strict=True):
        assert torch.equal(one, other)
    assert (expected - ops._attend(query.float(), *args[1:5], None, start, *args[7:])).abs().max() > 1e-3


def test_scales_and_offsets_that_lie_differently_are_refused() -> None:
    fmt = make_format(2, "channel", 32, 32, 0, 0)
    cache = allocate(2, 1, 64, 2, fmt.residual_slots, fmt, torch.float32, DEVICE)
    cache = cache.tensors
    apart = (*cache[:2], cache[2].repeat(1, 2, 1, 1)[:, :1], cache[3])
    x = torch.ones(2, 1, 1, 64, device=DEVICE)
    formats = fmt.encode(), fmt.encode()
    for keys, values in ((apart, cache), (cache, apart)):
        with pytest.raises(CacheShapeError, match="zero points"):
            kernels.attend(x, None, None, keys, values, None, None, 64, 1.0, *formats)
        with pytest.raises(CacheShapeError, match="zero points"):
            kernels.append_(keys, values, x, x, None, None, 0, *formats)
    with pytest.raises(CacheShapeError, match="zero points"):
        kernels.dequantize(apart, None, 64, fmt.encode())
