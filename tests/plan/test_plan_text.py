"""Layers as text, and the labels of their bits."""

from __future__ import annotations

import itertools

import pytest

from kvmix_fx.errors import FormatError, PlanFieldError
from kvmix_fx.plan import LayerPlan, QuantSpec, WindowRule
from kvmix_fx.plan.text import LayerText, pair_label, parse_bits, parse_layer
from kvmix_kernels import layout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k2v2", LayerText(2, 2)),
        ("k4v2 g64 w128", LayerText(4, 2, 64, 128)),
        ("K4V2 S4 W0", LayerText(4, 2, None, 0, 4)),
        ("k16v8 g128", LayerText(16, 8, 128)),
        ("  k8v16\tw32 ", LayerText(8, 16, None, 32)),
        ("k12v345 g1000", LayerText(12, 345, 1000)),
    ],
)
def test_words_are_read_in_any_order_and_numbers_of_any_length(text, said):
    assert parse_layer(text) == said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("k4", "bits of keys and of values"),
        ("v4 g32", "bits of keys and of values"),
        ("g32 k4v4", "cannot read 'g32' as bits"),
        ("k4v2g32", "cannot read 'k4v2g32' as bits"),
        ("k4v2 32", "cannot read '32'"),
        ("k4v2 g32 g64", "cannot read 'g64'"),
        ("k4v2 capped", "cannot read 'capped'"),
        ("k4v2 w-1", "cannot read 'w-1'"),
        ("k2.2v2.4 g32", "cannot read 'k2.2v2.4'"),
        ("k\u0664v2", "cannot read"),
    ],
)
def test_what_means_nothing_is_refused_by_word(text, message):
    with pytest.raises(PlanFieldError, match=message):
        parse_layer(text)


def test_bits_alone_name_one_half_or_both():
    assert parse_bits("k4v2") == (4, 2)
    assert parse_bits("k16") == (16, None)
    assert parse_bits("V8") == (None, 8)


def test_a_layer_of_a_text_is_what_its_fields_say():
    layer = LayerPlan.parse("k4v2 g64 w128 s4")
    assert layer == LayerPlan(
        QuantSpec(4, "channel", 64), QuantSpec(2, "token", 64), WindowRule(length=128), 4
    )
    assert LayerPlan.parse("k3v3") == LayerPlan(QuantSpec(3), QuantSpec(3, "token"), WindowRule(length=32))
    assert LayerPlan.parse("k2v2 w16", window=0, tile=128).window.length == 16
    assert LayerPlan.parse("k2v2", window=0, tile=128).formats(64) == (
        layout.make_format(2, "channel", 32, 128, 0, 0),
        layout.make_format(2, "token", 32, 128, 0, 0),
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_values_are_grouped_per_head_where_groups_are_no_smaller(head_dim):
    value = LayerPlan.parse("k2v2 g128", head_dim).value
    assert value.group_size == (128 if head_dim == 256 else "head")


def test_a_layer_that_cannot_exist_is_refused_as_ever():
    with pytest.raises(PlanFieldError, match="bits must be one of"):
        LayerPlan.parse("k5v2")
    with pytest.raises(FormatError, match="multiple of 16"):
        LayerPlan.parse("k4v2 g40")


@pytest.mark.parametrize(("key", "value"), list(itertools.product(layout.BITS, repeat=2)))
def test_labels_name_the_bits_and_can_be_read_again(key, value):
    layer = LayerPlan.parse(f"k{key}v{value}")
    assert layer.labels == (str(key), str(value))
    assert layer.label == f"K{key}V{value}" == pair_label(*(fmt.label for fmt in layer.formats(64)))
    assert parse_bits(layer.label) == (key, value)
