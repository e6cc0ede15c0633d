from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.testing.tensors import formats
from kvmix_kernels import layout
from kvmix_kernels.errors import FormatError, HeadSizeError


@given(formats(64), st.integers(0, 500))
def test_every_token_has_exactly_one_place(fmt, length):
    packed = range(fmt.sink, fmt.packed_end(length)) if fmt.packed_tiles(length) else range(0)
    raw = [p for p in range(length) if p not in packed]
    if fmt.is_raw:
        assert len(packed) == 0
        return
    slots = [p if p < fmt.sink else fmt.sink + (p - fmt.sink) % fmt.ring for p in raw]
    assert len(set(slots)) == len(slots)
    assert max(slots, default=0) < fmt.residual_slots


@given(formats(64), st.integers(0, 500))
def test_the_window_is_kept_and_no_more_than_a_tile_waits(fmt, length):
    recent = length - fmt.packed_end(length)
    if not fmt.is_raw and fmt.packed_tiles(length):
        assert fmt.window <= recent < fmt.window + fmt.tile


@given(formats(64), st.integers(0, 500))
def test_packed_tiles_grow_by_at_most_one_per_token(fmt, length):
    assert fmt.packed_tiles(length + 1) - fmt.packed_tiles(length) in (0, 1)


@given(formats(64), st.integers(0, 2000))
def test_growing_buffers_have_room_for_the_next_token(fmt, length):
    if fmt.is_raw:
        assert layout.growing_slots(fmt, length) > length
    else:
        assert layout.growing_tiles(fmt, length) >= max(2, fmt.packed_tiles(length + 1))


@pytest.mark.parametrize("bits", layout.WIDTHS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_fields_cover_all_bits_of_all_words_and_codes_once(bits, head_dim):
    words = layout.plane_words(bits, head_dim)
    assert sum(words) == layout.words_per_token(bits, head_dim)
    assert sum(words) * 16 == bits * head_dim
    of_words, of_codes = [], []
    for plane, position, count, above, channel in layout.bit_fields(bits, head_dim):
        of_words += [(plane, j, position + i) for j in range(words[plane]) for i in range(count)]
        of_codes += [(channel + j, above + i) for j in range(words[plane]) for i in range(count)]
    assert sorted(of_words) == [(p, j, i) for p, n in enumerate(words) for j in range(n) for i in range(16)]
    assert sorted(of_codes) == [(c, i) for c in range(head_dim) for i in range(bits)]


@given(formats(64))
def test_blocks_of_planes_are_powers_of_two_that_divide_the_tile(fmt):
    block = layout.plane_block(fmt)
    assert block & (block - 1) == 0
    assert fmt.tile % block == 0
    assert block == 1 or len(layout.plane_words(fmt.code, 64)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"bits": 2, "axis": "row"}, "axis must be"),
        ({"bits": 2, "group_size": 24, "tile": 32}, "does not divide the tile"),
        ({"bits": 2, "axis": "token", "group_size": 20}, "multiple of 16"),
        ({"bits": 2, "tile": 0}, "tile must be"),
        ({"bits": 2, "window": -1}, "must not be negative"),
        ({"bits": 2, "scale_dtype": "int8"}, "scale_dtype must be"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        layout.make_format(**arguments)


@pytest.mark.parametrize("head_dim", [8, 40, 100])
def test_head_sizes_that_do_not_fill_words_are_refused(head_dim):
    with pytest.raises(HeadSizeError, match="multiple of 16"):
        layout.check_head_size(layout.make_format(2), head_dim)


def test_groups_of_channels_must_divide_the_head():
    with pytest.raises(HeadSizeError, match="does not divide the head size 80"):
        layout.check_head_size(layout.make_format(2, "token", 32), 80)


def test_effective_bits_count_scale_and_offset():
    assert layout.bits_per_packed_element(layout.make_format(2, "channel", 32), 64) == 3.0
    assert layout.bits_per_packed_element(layout.make_format(4, "token", layout.WHOLE_HEAD), 128) == 4.25
    assert (
        layout.bits_per_packed_element(layout.make_format(2, "channel", 128, 128, scale_dtype="float32"), 64)
        == 2.5
    )
