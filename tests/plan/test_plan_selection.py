"""Layer selections."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.errors import PlanFieldError, PlanLayerError
from kvmix_fx.plan import join_layers, select_layers


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        (0, (0,)),
        (-1, (9,)),
        (np.int64(3), (3,)),
        ([3, 1, 1, -1], (1, 3, 9)),
        (np.array([2, 5]), (2, 5)),
        ({4}, (4,)),
        (range(2, 5), (2, 3, 4)),
        (slice(None, None, 4), (0, 4, 8)),
        (slice(-2, None), (8, 9)),
        (slice(8, 100), (8, 9)),
        ("all", tuple(range(10))),
        ("5", (5,)),
        ("-1", (9,)),
        ("0-3", (0, 1, 2, 3)),
        ("3-3", (3,)),
        ("7-", (7, 8, 9)),
        ("-2-", (8, 9)),
        ("-4--2", (6, 7, 8)),
        ("8--1", (8, 9)),
        ("first:2", (0, 1)),
        ("last:2", (8, 9)),
        (" 0-1 , -1 ,4", (0, 1, 4, 9)),
    ],
)
def test_selections(selection, layers):
    assert select_layers(selection, 10) == layers


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (10, "there is no layer 10: the plan has 10 layers, 0 to 9"),
        (-11, "there is no layer -11"),
        ([0, 10], "there is no layer 10"),
        ("0-10", "there is no layer 10"),
        (range(12), "there is no layer 10"),
        ("last:11", "'last:11' asks for more layers than the plan has"),
        ("first:0", "selects none of the 10 layers"),
        ([], "selects none of the 10 layers"),
        (slice(20, 30), "selects none of the 10 layers"),
        ("5-3", "'5-3' runs backwards: from layer 5 to layer 3"),
    ],
)
def test_layers_that_are_not_there(selection, message):
    with pytest.raises(PlanLayerError, match=message):
        select_layers(selection, 10)


@pytest.mark.parametrize(
    "selection", ["", "a", "1,,2", "1-2-3", "--1", "1.5", "last", "last:-1", "all:1", "٣"]
)
def test_texts_that_cannot_be_read(selection):
    with pytest.raises(PlanFieldError, match=r"cannot read .* as layers; write parts such as"):
        select_layers(selection, 10)


@pytest.mark.parametrize("selection", [None, 1.0, True, [True], [1.0], ["1"]])
def test_values_that_name_no_layer(selection):
    with pytest.raises(PlanFieldError, match="layer"):
        select_layers(selection, 10)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_joined_layers_select_themselves(layers):
    text = join_layers(sorted(layers))
    assert select_layers(text, 41) == tuple(sorted(layers))
    assert text.count(",") + 1 == sum(1 for layer in layers if layer - 1 not in layers)
