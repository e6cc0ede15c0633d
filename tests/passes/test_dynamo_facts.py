"""One canary per private fact of Dynamo that kvmix_fx.passes.dynamo relies on."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.source import AttrSource

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.passes import dynamo
from kvmix_kernels import layout

FMT = layout.make_format(2, window=8)


@pytest.fixture(scope="module")
def graph():
    seen = []

    def backend(gm, example_inputs):
        seen.append((gm, example_inputs))
        return gm.forward

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(32, 32)

        def forward(self, x, cache):
            return torch.cat([cache, self.proj(x)], -2)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])

        def forward(self, x, cache):
            return self.layers[0](x, cache)

    cache = QuantizedKVTensor.from_hp(torch.randn(1, 2, 70, 32), FMT)
    with torch.no_grad():
        torch.compile(Model(), backend=backend)(torch.randn(1, 2, 1, 32), cache)
    return seen[0]


def placeholder(gm):
    return next(
        n
        for n in gm.graph.nodes
        if n.op == "placeholder" and isinstance(dynamo.example(n), QuantizedKVTensor)
    )


def test_nodes_carry_example_values(graph):
    gm, _ = graph
    values = [dynamo.example(n) for n in gm.graph.nodes if n.op == "call_function"]
    assert values
    assert all(isinstance(v, torch.Tensor) for v in values)


def test_a_packed_input_is_one_placeholder_with_a_symbolic_length(graph):
    gm, _ = graph
    fake = dynamo.example(placeholder(gm))
    assert dynamo.is_symbolic(fake.shape[2])
    assert dynamo.is_symbolic(fake.qdata.shape[2])
    assert not dynamo.is_symbolic(fake.residual.shape[2])
    assert fake.format == FMT


def test_the_length_symbol_is_an_input_of_its_own(graph):
    gm, _ = graph
    fake = dynamo.example(placeholder(gm))
    symbols = [dynamo.example(n) for n in gm.graph.nodes if n.op == "placeholder"]
    lengths = [s for s in symbols if isinstance(s, torch.SymInt)]
    assert any(dynamo.expression(s) == dynamo.expression(fake.shape[2]) for s in lengths)


def test_placeholders_have_sources_that_can_be_extended(graph):
    gm, _ = graph
    node = placeholder(gm)
    assert "cache" in dynamo.source_name(node)
    assert AttrSource(node._dynamo_source, "qdata") is not None


def test_modules_tell_where_a_node_comes_from(graph):
    gm, _ = graph
    cat = next(n for n in gm.graph.nodes if n.target is torch.cat)
    assert "layers" in dynamo.module_path(cat)
    assert "0" in dynamo.module_path(cat)


def test_the_module_carries_what_makes_inputs_static(graph):
    gm, _ = graph
    assert "dynamo_compile_id" in gm.meta
    assert hasattr(gm, "_param_name_to_source")
    copied, mapping = dynamo.copy_module(gm)
    assert copied.meta["dynamo_compile_id"] == gm.meta["dynamo_compile_id"]
    assert copied._param_name_to_source is gm._param_name_to_source
    assert all(hasattr(mapping[n], "_dynamo_source") for n in gm.graph.nodes if n.op == "placeholder")


def test_buffers_and_weights_are_static_inputs_of_the_inner_graph():
    from torch._functorch.aot_autograd import aot_module_simplified

    import kvmix_fx
    from kvmix_fx.testing.models import tiny_llama

    static = {}

    def inner(gm, example_inputs):
        def count(fx_gm, inputs):
            context = torch._guards.TracingContext.get()
            static[len(static)] = (len(context.fw_metadata.static_input_indices), gm)
            return fx_gm

        return aot_module_simplified(gm, example_inputs, fw_compiler=count)

    model = tiny_llama()
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2), inner=inner)
    ids = torch.randint(1, 128, (1, 80))
    model.generate(ids, max_new_tokens=3, do_sample=False)
    count, gm = static[1]
    packed = [
        n for n in gm.graph.nodes if n.op == "placeholder" and "past_key_values" in dynamo.source_name(n)
    ]
    buffers = [n for n in packed if n.name.endswith(("qdata", "scale", "zero_point", "residual"))]
    assert len(buffers) == 2 * 2 * 4
    parameters = len(list(model.parameters()))
    assert count >= len(buffers) + parameters
