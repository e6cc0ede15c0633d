from __future__ import annotations

import os
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.testing.tensors import FAMILIES, error_budget, formats, poison, split_sums_lose, values
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.cpu import attention as cpu
from kvmix_kernels.cpu import native
from kvmix_kernels.reference import attention as reference
from kvmix_kernels.reference import quantize, storage

PACKED = layout.WIDTHS


def can_compile():
    """Whether there is a compiler. If it fails on our source, tests must fail, not be skipped."""
    try:
        return sys.platform.startswith("linux") and bool(native._compiler())
    except FileNotFoundError:
        return False


needs_compiler = pytest.mark.skipif(not can_compile(), reason="no C compiler, or not Linux")


@needs_compiler
def test_the_kernel_compiles():
    assert native.kernel() is not None


@pytest.fixture(params=[pytest.param("kernel", marks=needs_compiler), "vectorised"])
def path(request):
    """Both ways `cpu.attend` can go."""
    if request.param == "kernel":
        yield native.attend
    else:
        with mock.patch.object(native, "attend", return_value=None):
            yield cpu.attend


@pytest.fixture
def no_kernel():
    with mock.patch.object(native, "attend", return_value=None):
        yield


@st.composite
def cases(draw, longest=200):
    """Arguments of `attend`, with buffers that hold NaN wherever no live token lies."""
    D = draw(st.sampled_from((16, 64, 80, 128, 256)))
    B, H, group = draw(st.sampled_from(((1, 1, 4), (2, 2, 3), (1, 3, 1))))
    length, new, Lq = draw(st.integers(0, longest)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    if length + new == 0:
        length = 1
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    family, seed = draw(st.sampled_from(FAMILIES)), draw(st.integers(0, 1000))
    query = values("normal", (B, H * group, Lq, D), seed, dtype)

    def stored(fmt, of, seed):
        x = values(of, (B, H, length + new, D), seed, dtype)
        tiles, slots = layout.growing_tiles(fmt, length), layout.growing_slots(fmt, length)
        buffers = poison(allocate(B, H, D, tiles, slots, fmt, dtype, x.device))
        storage.append(buffers, x[:, :, :length], None, 0, query)  # which chooses an order of channels
        return buffers, x[:, :, length:] if new else None

    key_format, value_format = draw(formats(D)), draw(formats(D, keys=False))
    (keys, new_keys), (stored_values, new_values) = (
        stored(key_format, family, seed + 1),
        stored(value_format, draw(st.sampled_from(FAMILIES)), seed + 2),
    )
    # a mask may be longer than the tokens there are
    S = length + new + draw(st.sampled_from((0, 5)))
    generator = torch.Generator().manual_seed(seed)
    mask = None
    match draw(
        st.sampled_from(("none", "all", "padding", "random", "hidden", "additive", "two-dimensional"))
    ):
        case "all":
            mask = torch.ones(B, 1, Lq, S, dtype=torch.bool)
        case "padding":
            mask = (torch.arange(S) >= (length + new) // 2).expand(B, 1, Lq, S)
        case "random":
            mask = torch.rand(B, H * group, Lq, S, generator=generator) < 0.5
        case "hidden":
            mask = torch.zeros(B, 1, 1, S, dtype=torch.bool)
        case "additive":
            mask = torch.randn(1, H * group, Lq, S, generator=generator).to(dtype)
            mask[..., :1] = -torch.inf
        case "two-dimensional":
            mask = torch.rand(Lq, S, generator=generator) < 0.5
    return (
        query,
        new_keys,
        new_values,
        keys,
        stored_values,
        mask,
        length,
        D**-0.5,
        draw(st.sampled_from((0.0, 0.0, 0.5, 30.0))),
        draw(st.sampled_from((None, None, *sinks(H * group, seed)))),
    )


def sinks(heads, seed):
    """Logits of a learned sink that leave nearly nothing, nearly all and something of attention."""
    some = values("normal", (1, 1, 1, heads), seed + 3).flatten()
    return some + 6, some - 200, some.half(), torch.full((heads,), -torch.inf)


def in_float64(case):
    """The same arguments, so that the reference computes in float64."""
    query, new_keys, new_values, keys, stored, *rest = case

    def wide(cached):
        return cached.replace(residual=cached.residual.double())

    more = [None if t is None else t.double() for t in (new_keys, new_values)]
    return (query.double(), *more, wide(keys), wide(stored), *rest)


def assert_equals_the_reference(got, case):
    low, exact = reference.attend(*case), reference.attend(*in_float64(case))
    assert got.dtype == low.dtype
    assert got.shape == low.shape
    assert torch.equal(got.isnan(), low.isnan())
    query, _, _, keys, stored, _, _, scale, _, _ = case
    budget = error_budget(low, exact, 4.0) + split_sums_lose(query, keys, stored, scale, exact)
    assert (got.double() - exact).abs().max().item() <= budget


@given(cases(), st.sampled_from((1, 1 << 12, 1 << 20)))
def test_equals_the_reference(case, chunk):
    with (
        mock.patch.object(native, "attend", return_value=None),
        mock.patch.object(cpu, "CHUNK_ELEMENTS", chunk),
    ):
        assert_equals_the_reference(cpu.attend(*case), case)


@needs_compiler
@given(cases(longest=900), st.sampled_from((1, 2, 3)))
def test_kernel_equals_the_reference(case, threads):
    with mock.patch.object(torch, "get_num_threads", return_value=threads):
        got = native.attend(*case)
    assert got is not None
    assert_equals_the_reference(got, case)


@given(st.sampled_from(PACKED), st.sampled_from((16, 64, 80, 256)), st.integers(0, 1000))
def test_fields_times_factors_are_the_codes(bits, head_dim, seed):
    """Exactly, for every word there is, also those with the top bit set."""
    fmt = layout.make_format(bits, "channel", 32, 32)
    words = layout.words_per_token(bits, head_dim)
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(-(1 << 15), 1 << 15, (2, 3, 64, words), generator=generator).to(torch.int16)
    grid = torch.zeros(2, 3, 2, head_dim, dtype=torch.float16)
    cached = Cached(fmt, (qdata, grid, grid, torch.zeros(2, 3, 64, head_dim)))
    total = torch.zeros(head_dim, 6, 32)
    for fields, power in cpu._fields(cached, 32, 64):
        total += fields * power[:, None, None]
    expected = quantize.unpack(qdata[:, :, 32:], bits, head_dim, layout.plane_block(fmt))
    assert torch.equal(total, expected.flatten(0, 1).permute(2, 0, 1).float())


def packed(x, fmt, mask=None):
    return Cached.of(ops.quantize_pack(x, mask, fmt.encode()), fmt.encode())


def attend(query, new_keys, new_values, keys, values, mask, live, length, scale):
    """The op, on two `Cached`."""
    buffers, formats = (keys.tensors, values.tensors), (keys.format.encode(), values.format.encode())
    return ops.attend(query, new_keys, new_values, *buffers, mask, live, length, scale, *formats)


def filled(length, key_format, value_format, B=1, H=2, D=64):
    x = torch.randn(2, B, H, length, D, generator=torch.Generator().manual_seed(length))
    return [packed(t, f) for t, f in zip(x, (key_format, value_format), strict=True)]


def test_the_op_takes_this_path_on_cpu_tensors():
    fmt = layout.make_format(2)
    k, v = filled(100, fmt, fmt)
    query = torch.randn(1, 4, 1, 64)
    with mock.patch.object(native, "attend", wraps=native.attend) as called:
        attend(query, None, None, k, v, None, None, 100, 0.1)
    assert called.call_count == 1


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_live_length_in_a_tensor(axis):
    """A fixed cache with room to spare gives what a growing one of the same tokens gives."""
    kf, vf = layout.make_format(4, axis), layout.make_format(2, "token", 32)
    length, capacity = 150, 300
    x = torch.randn(1, 2, length, 64)
    query = torch.randn(1, 6, 1, 64)
    fixed = []
    for fmt in (kf, vf):
        tiles, slots = layout.fixed_tiles(fmt, capacity), layout.fixed_slots(fmt, capacity)
        buffers = poison(allocate(1, 2, 64, tiles, slots, fmt, x.dtype, x.device))
        storage.append(buffers, x, None, 0)
        fixed.append(buffers)
    grown = [packed(x, fmt) for fmt in (kf, vf)]
    live = torch.tensor(length)
    out = attend(query, x[:, :, :1], x[:, :, :1], *fixed, None, live, capacity, 0.1)
    expected = attend(query, x[:, :, :1], x[:, :, :1], *grown, None, None, length, 0.1)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("rows", "dtype"), [(cpu.MAX_ROWS + 1, torch.float32), (1, torch.float64)])
def test_long_and_double_queries_go_to_the_reference(rows, dtype):
    fmt = layout.make_format(2)
    k, v = filled(100, fmt, fmt)
    query = torch.randn(1, 2, rows, 64, dtype=dtype)
    with mock.patch.object(cpu, "_scores", side_effect=AssertionError("not this path")):
        cpu.attend(query, None, None, k, v, None, 100, 0.1)


def test_scratch_is_bounded_and_kept(no_kernel):
    fmt = layout.make_format(2)
    k, v = filled(2000, fmt, fmt)
    query = torch.randn(1, 2, 1, 64)
    with (
        mock.patch.object(cpu, "CHUNK_ELEMENTS", 1 << 14),
        mock.patch.object(cpu, "_scratch", cpu._Scratch()),
    ):
        first = cpu.attend(query, None, None, k, v, None, 2000, 0.1)
        assert 0 < len(cpu._scratch._floats) <= 1 << 14
        place = cpu._scratch._floats.data_ptr()
        again = cpu.attend(query, None, None, k, v, None, 2000, 0.1)
        assert cpu._scratch._floats.data_ptr() == place
    assert torch.equal(first, again)


def test_scratch_made_in_inference_mode_serves_outside_of_it(no_kernel):
    fmt = layout.make_format(3)
    k, v = filled(100, fmt, fmt)
    query = torch.randn(1, 2, 1, 64)
    with mock.patch.object(cpu, "_scratch", cpu._Scratch()):
        with torch.inference_mode():
            inside = cpu.attend(query, None, None, k, v, None, 100, 0.1)
        outside = cpu.attend(query, None, None, k, v, None, 100, 0.1)
    assert torch.equal(inside, outside)


def test_non_finite_raw_tokens_spoil_what_they_spoil_in_the_reference(path):
    fmt = layout.make_format(2, sink=1)
    k, v = filled(600, fmt, fmt, H=1)
    query = torch.randn(1, 2, 1, 64)
    new = torch.randn(2, 1, 1, 3, 64)
    ring = fmt.sink + (599 - fmt.sink) % fmt.ring  # of the last token
    for where, channel, value in (
        (v.residual[:, :, ring], 3, torch.inf),
        (v.residual[:, :, 0], 4, torch.nan),
        (new[1, :, :, 1], 5, -torch.inf),
        (new[0, :, :, 1], slice(None), -1e30),  # its weight is exactly 0, and 0 * inf is NaN
        (k.residual[:, :, ring], 0, torch.nan),
    ):
        where[..., channel] = value
        case = (query, *new, k, v, None, 600, 0.1)
        got, expected = path(*case), reference.attend(*case)
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert got.isnan().all()


def test_hidden_everywhere_gives_zeros_also_over_many_blocks(path):
    fmt = layout.make_format(2)
    k, v = filled(1000, fmt, fmt)
    query = torch.randn(1, 4, 1, 64)
    additive = torch.full((1, 1, 1, 1000), -torch.inf)
    for mask in (additive, additive > 0):
        out = path(query, None, None, k, v, mask, 1000, 0.1)
        assert torch.equal(out, torch.zeros_like(out))


@needs_compiler
def test_kernel_reads_views_in_place_and_leaves_others():
    fmt = layout.make_format(4)
    k, v = filled(100, fmt, fmt)
    query, new = torch.randn(1, 1, 4, 64), torch.randn(2, 1, 1, 2, 64)
    case = (query.transpose(1, 2), *new.transpose(2, 3), k, v, None, 100, 0.1)
    torch.testing.assert_close(native.attend(*case), reference.attend(*case))
    strided = torch.randn(1, 4, 1, 128)[..., ::2]
    assert native.attend(strided, *case[1:]) is None
    torch.testing.assert_close(cpu.attend(strided, *case[1:]), reference.attend(strided, *case[1:]))


@needs_compiler
def test_kernel_takes_no_arguments_that_do_not_fit_each_other():
    """What a caller of the op got wrong must not become a read of other memory."""
    fmt = layout.make_format(2)
    k, v = filled(200, fmt, fmt)
    query, new = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1, 64)
    good = {
        "query": query,
        "new_keys": new,
        "new_values": new,
        "keys": k,
        "values": v,
        "mask": torch.ones(1, 1, 1, 201, dtype=torch.bool),
        "length": 200,
        "scale": 0.1,
    }
    assert native.attend(**good) is not None
    for wrong in (
        {"query": query[:, :3]},
        {"query": query.expand(2, -1, -1, -1)},
        {"query": query[..., :32]},
        {"query": query.int()},
        {"new_keys": None},
        {"new_keys": new[..., :32]},
        {"keys": k.replace(qdata=k.qdata[:, :, :100])},
        {"keys": k.replace(qdata=k.qdata.int())},
        {"keys": k.replace(qdata=k.qdata.repeat(1, 1, 1, 2)[..., :8])},
        {"keys": k.replace(scale=k.scale[:, :, :1])},
        {"keys": k.replace(zero_point=k.zero_point[:, :1])},
        {"values": v.replace(scale=v.scale.repeat_interleave(2, 3)[..., ::2])},
        {"values": v.replace(residual=v.residual[:, :, :8])},
        {"mask": torch.ones(1, 1, 1, 200, dtype=torch.bool)},
        {"mask": torch.ones(201, dtype=torch.float64)},
        {"length": 1000},
        {"length": -1},
        {"sink_logits": torch.zeros(3)},
        {"keys": k._replace(format=fmt._replace(group_size=0))},
        {"keys": k._replace(format=fmt._replace(group_size=24))},
        {"keys": k._replace(format=layout.make_format(4))},
        {"values": v._replace(format=fmt._replace(axis=layout.AXIS_TOKEN, group_size=8))},
    ):
        assert native.attend(**{**good, **wrong}) is None, wrong


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("change", ["nothing", "order", "rotation", "offsets"])
def test_order_rotation_and_offsets_are_heeded(path, head_dim, change):
    """Tiers with an order of their own in every head, and symmetric values; what is heeded must matter."""
    tiers = ((4, 16), (2, head_dim - 24), (0, 8))
    kf = layout.make_format(4, "channel", 32, 64, 3, 20, "byte", tiers=tiers, order="prompt")
    vf = layout.make_format(2, "token", 0, 32, 4, 32, "byte", rotation=True, symmetric=True)
    x, query = torch.randn(2, 2, 2, 700, head_dim), torch.randn(2, 6, 2, head_dim)
    k, v = (
        Cached.of(ops.quantize_pack(t, None, f.encode(), query), f.encode())
        for t, f in zip(x, (kf, vf), strict=True)
    )
    expected = reference.attend(query, None, None, k, v, None, 700, 0.1)
    match change:
        case "order":
            assert k.order is not None
            k = k.replace(order=k.order.flip(2))
        case "rotation":
            v = v._replace(format=v.format._replace(rotation=0))
        case "offsets":
            k = k.replace(zero_point=k.zero_point + 1)
    error = (path(query, None, None, k, v, None, 700, 0.1) - expected).abs().max()
    assert error < 1e-4 if change == "nothing" else error > 1e-2


@needs_compiler
def test_kernel_takes_no_tiers_and_bytes_that_do_not_fit():
    tiered = layout.make_format(4, scale_dtype="byte", tiers=((4, 16), (2, 40), (0, 8)), order="prompt")
    rotated = layout.make_format(2, "token", scale_dtype="byte", rotation=True)
    k, v = filled(200, tiered, rotated)
    assert k.order is not None
    good = {
        "query": torch.randn(1, 4, 1, 64),
        "new_keys": None,
        "new_values": None,
        "keys": k,
        "values": v,
        "mask": None,
        "length": 200,
        "scale": 0.1,
    }
    assert native.attend(**good) is not None
    outside, negative = k.order.clone(), k.order.clone()
    outside[0, 1, 63], negative[0, 1, 0] = 64, -1
    for wrong in (
        {"keys": k.replace(order=k.order.long())},
        {"keys": k.replace(order=k.order[:, :1])},
        {"keys": k.replace(order=k.order[..., :32])},
        {"keys": k.replace(order=k.order[0])},
        {"keys": k.replace(order=k.order.repeat_interleave(2, 2)[..., ::2])},
        {"keys": k.replace(order=outside)},
        {"keys": k.replace(order=negative)},
        {"values": k.replace(order=outside)},
        {"keys": k.replace(qdata=k.qdata[..., :8])},
        {"keys": k.replace(scale=k.scale.half())},
        {"keys": k.replace(scale=k.scale.view(torch.int8))},
        {"keys": k.replace(scale=k.scale[..., :32])},
        {"keys": k.replace(zero_point=k.zero_point.view(torch.uint8))},
        {"keys": k.replace(zero_point=k.zero_point[:, :, :1])},
        {"keys": k.replace(zero_point=k.zero_point[..., :0])},
        {"values": v.replace(scale=v.scale.repeat_interleave(2, 3)[..., ::2])},
        {"values": v.replace(zero_point=v.zero_point[..., :0])},
        {"values": v._replace(format=rotated._replace(scale_dtype=0))},
        *(
            {"keys": k._replace(format=tiered._replace(tiers=tuple(layout.Tier(*tier) for tier in tiers)))}
            for tiers in (
                ((4, 16), (2, 48)),
                ((4, 64), (2, 40), (0, 8)),
                ((4, 16), (2, 56), (0, -8)),
                ((4, 20), (2, 36), (0, 8)),
                ((2, 40), (4, 16), (0, 8)),
                ((4, 16), (3, 40), (0, 8)),
            )
        ),
        {"keys": k._replace(format=tiered._replace(axis=layout.AXIS_TOKEN))},
    ):
        assert native.attend(**{**good, **wrong}) is None, wrong
    with pytest.raises(RuntimeError, match="index"):
        cpu.attend(**{**good, "keys": k.replace(order=outside)})


def broken(monkeypatch, tmp_path, how):
    monkeypatch.setattr(native, "_kernels", [])
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path))
    match how:
        case "no compiler":
            monkeypatch.setattr(native.shutil, "which", lambda _: None)
        case "compiler fails":
            monkeypatch.setenv("CC", "false")
        case "cache cannot be written":
            (tmp_path / "file").touch()
            monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path / "file"))


@needs_compiler
@pytest.mark.parametrize("how", ["no compiler", "compiler fails", "cache cannot be written"])
def test_without_a_kernel_one_warning_and_the_vectorised_path(monkeypatch, tmp_path, how):
    broken(monkeypatch, tmp_path, how)
    fmt = layout.make_format(2)
    k, v = filled(100, fmt, fmt)
    case = (torch.randn(1, 4, 1, 64), None, None, k, v, None, 100, 0.1)
    with pytest.warns(UserWarning, match="slower PyTorch ops instead: .*name a C compiler in CC"):
        out = cpu.attend(*case)
    torch.testing.assert_close(out, reference.attend(*case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.attend(*case)


@needs_compiler
def test_two_processes_may_need_the_kernel_first(tmp_path):
    script = "from kvmix_kernels.cpu import native; assert native.kernel() is not None"
    environment = {**os.environ, "KVMIX_CACHE_DIR": str(tmp_path / "new")}
    both = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".so"]


@needs_compiler
def test_a_library_that_others_could_have_written_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path))
    library = native.build()
    for _ in range(2):
        assert native.build() == library
        library.write_bytes(b"somebody else's")
        library.chmod(0o666)
    monkeypatch.setattr(native, "_kernels", [])
    assert native.kernel() is not None
    assert library.stat().st_mode & 0o022 == 0
    library.rename(tmp_path / "elsewhere")
    library.symlink_to(tmp_path / "elsewhere")
    native.build()
    assert not library.is_symlink()
    if os.geteuid() == 0:
        os.chown(library, 4321, -1)
    else:
        monkeypatch.setattr(native.os, "geteuid", lambda: 4321)
    with pytest.raises(PermissionError, match="belongs to another user"), native._own(library):
        pass


def test_padding_is_left_out_by_the_step_that_flushes_it():
    """Token by token, with a mask that only matters when a tile is packed, equals all at once."""
    fmt = layout.make_format(2, window=4)
    length, pad = 80, 10
    x = torch.randn(2, 2, length, 64)
    x[1, :, :pad] = 1e4
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, ..., :pad] = False
    whole = packed(x, fmt, mask)
    tiles, slots = layout.growing_tiles(fmt, length), layout.growing_slots(fmt, length)
    k, v = (allocate(2, 2, 64, tiles, slots, fmt, x.dtype, x.device) for _ in range(2))
    for p in range(length):
        token = x[:, :, p : p + 1]
        ops.append_(k.tensors, v.tensors, token, token, mask[..., : p + 1], None, p, *[fmt.encode()] * 2)
    unmasked = packed(x, fmt)
    assert torch.equal(k.scale, whole.scale)
    assert torch.equal(v.qdata, whole.qdata)
    assert not torch.equal(k.scale, unmasked.scale)  # the padding would have been seen
