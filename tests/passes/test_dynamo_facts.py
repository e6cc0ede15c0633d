"""One canary per private fact of Dynamo that kvmix_fx.dynamo relies on."""

from __future__ import annotations

import ast
import gc
import inspect
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo import guards
from torch._dynamo.source import AttrSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

import kvmix_fx
from kvmix_fx import dynamo, errors
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.contracts import NAMES
from kvmix_kernels import layout

FMT = layout.make_format(2, window=8)
PARAMETERS = inspect.signature(torch.compile).parameters


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
        n
        for n in gm.graph.nodes
        if n.op == "placeholder" and any(f"'{name}'" in dynamo.source_name(n) for name in NAMES)
    ]
    buffers = [n for n in packed if n.name.endswith(("qdata", "scale", "zero_point", "residual"))]
    assert len(buffers) == 2 * 2 * 4
    parameters = len(list(model.parameters()))
    assert count >= len(buffers) + parameters


def graphs_of(function, *calls):
    """How many graphs several calls are traced into."""
    graphs = []

    def backend(gm, _inputs):
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(function, backend=backend)
    for call in calls:
        compiled(*call)
    return len(graphs)


@pytest.mark.parametrize("mark", [dynamo.mark_tokens, lambda x: dynamo.mark_dimension(x, -2)])
def test_a_marked_dimension_is_a_symbol_from_the_first_trace_on(mark):
    plain, marked = ([torch.randn(1, 2, n, 4) for n in (5, 6, 7)] for _ in range(2))
    for x in marked:
        mark(x)
    assert graphs_of(lambda x: x + 1, *([x] for x in marked)) == 1
    torch._dynamo.reset()
    assert graphs_of(lambda x: x + 1, *([x] for x in plain)) == 2  # so the mark makes the difference


@pytest.mark.parametrize("marked", [True, False])
def test_packed_tensors_are_marked_when_they_are_made(marked, monkeypatch):
    if not marked:
        monkeypatch.setattr("kvmix_fx.cache.tensor.mark_tokens", lambda *_, **__: None)
    caches = [QuantizedKVTensor.from_hp(torch.randn(1, 2, n, 32), FMT) for n in (70, 71, 300)]
    graphs = graphs_of(lambda x: torch.ones(1) * x.shape[2], *([c] for c in caches))
    assert (graphs == 1) == marked


@pytest.mark.parametrize("fixed", [True, False])
def test_equal_capacities_are_one_symbol_until_they_differ(fixed):
    symbols = []

    def backend(gm, inputs):
        symbols.append(len({str(x) for x in inputs if isinstance(x, torch.SymInt)}))
        return gm.forward

    def drawn(*lengths):
        tensors = [torch.randn(1, 2, n, 4) for n in lengths]
        dynamo.mark_tokens(*tensors, fixed=fixed)
        return tensors

    compiled = torch.compile(lambda a, b, c: (a + 1, b + 1, c + 1), backend=backend)
    # the last two equal one another by chance: once they do not, all are traced anew, and for good
    for lengths in ((9, 5, 5), (16, 8, 8), (9, 5, 6), (10, 6, 5), (20, 3, 9)):
        given = drawn(*lengths)
        for x, out in zip(given, dynamo.unwrapped(compiled, *given), strict=True):
            assert torch.equal(out, x + 1)
    assert symbols == ([2, 3] if fixed else [3])


def test_fixed_caches_share_the_symbols_of_their_capacity():
    def backend(gm, inputs):
        symbols.extend({str(x) for x in inputs if isinstance(x, torch.SymInt)})
        return gm.forward

    def run(count, fixed):
        symbols.clear()
        torch._dynamo.reset()
        x = torch.randn(1, 2, 70, 32)
        live = torch.tensor(5)
        sizes = (1, 2, 70, 32, FMT, torch.float32, torch.device("cpu"), live)
        caches = [
            QuantizedKVTensor.empty_fixed(*sizes) if fixed else QuantizedKVTensor.from_hp(x, FMT)
            for _ in range(count)
        ]
        step = torch.compile(
            lambda *given: [torch.ones(1) * x.shape[2] + x.qdata.shape[2] for x in given], backend=backend
        )
        dynamo.unwrapped(step, *caches)
        return len(symbols)

    symbols = []
    assert run(1, fixed=True) == run(3, fixed=True)
    assert run(3, fixed=False) == 3 * run(1, fixed=False)


@pytest.mark.parametrize("once", [True, False])
def test_sizes_of_packed_inputs_are_guarded_once(once, monkeypatch):
    build, texts, traced = guards.build_guard_function, [], []
    monkeypatch.setattr(
        guards, "build_guard_function", lambda parts, *a: texts.extend(parts) or build(parts, *a)
    )

    def backend(gm, _inputs):
        traced.append(gm)
        if once:
            dynamo.guard_once()
        return gm.forward

    def caches(capacity):
        sizes = (1, 2, capacity, 32, FMT, torch.float32, torch.device("cpu"), live)
        return [QuantizedKVTensor.empty_fixed(*sizes) for _ in range(2)]

    live = torch.tensor(5)
    step = torch.compile(lambda a, b: torch.ones(1) * (a.shape[2] + b.shape[2]), backend=backend)
    dynamo.unwrapped(step, *caches(200))
    texts = [text for text in texts if "size" in text or "stride" in text]
    assert (len(texts) == len(set(texts))) == once
    dynamo.unwrapped(step, *caches(300))
    assert len(traced) == 1
    # the same sizes, but buffers that lie apart
    dynamo.unwrapped(step, *(cache.narrowed(200) for cache in caches(300)))
    assert len(traced) == 2


@pytest.mark.parametrize(
    "text",
    [
        "L['kwargs'].layers[10].keys.size()[2]",
        "a",
        "a.b(1).c",
        "(a + b).c[0]",
        "a[b]",
        "a[-1]",
        "a == 2 * b[0]",
    ],
)
def test_guards_are_written_as_ast_writes_them(text):
    [statement] = ast.parse(text).body
    theirs = guards._ast_unparse
    with dynamo.quick_paths():
        assert guards._ast_unparse is not theirs
        for node in ast.walk(statement.value):
            if isinstance(node, ast.expr):
                assert guards._ast_unparse(node) == theirs(node)
    assert guards._ast_unparse is theirs


@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("disturbed", [True, False])
def test_what_tracing_leaves_is_collected_once(due, disturbed):
    class Cycle:
        pass

    left = []
    before = gc.get_stats()
    after_compile = torch._dynamo.config.run_gc_after_compile
    with dynamo.one_collection(lambda: due):
        assert not gc.isenabled()
        assert not torch._dynamo.config.run_gc_after_compile
        for _ in range(2000):
            cycle = Cycle()
            cycle.itself = cycle
            left.append(weakref.ref(cycle))
        if disturbed:
            gc.collect()
        del cycle
    assert gc.isenabled()
    assert torch._dynamo.config.run_gc_after_compile == after_compile
    if due:
        assert not any(ref() for ref in left)
        made = [
            now["collections"] - then["collections"] for now, then in zip(gc.get_stats(), before, strict=True)
        ]
        assert made[2] == (2 if disturbed else 0)


def test_who_has_switched_collection_off_finds_it_so():
    gc.disable()
    try:
        with dynamo.one_collection(lambda: True):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_modules_that_a_backend_makes_are_written_when_they_are_called():
    made = []

    def backend(gm, _inputs):
        copied, _ = dynamo.copy_module(gm)
        made.append(copied)
        return dynamo.forward(copied)

    x = torch.randn(3)
    assert torch.equal(torch.compile(lambda x: x + 1, backend=backend)(x), x + 1)
    assert isinstance(made[0], _LazyGraphModule)


def test_inductor_knows_torch_by_what_is_kept_for_the_process():
    dynamo.load_inductor()
    from torch._inductor import codecache

    assert codecache.torch_key() is codecache.torch_key()
    assert codecache.CacheBase.get_system() is codecache.CacheBase.get_system()


def test_a_mark_that_the_code_contradicts_is_dropped():
    x = torch.randn(1, 2, 5, 4)
    dynamo.mark_dimension(x, 2)
    assert graphs_of(lambda x: x + 1 if x.shape[2] == 5 else x, [x]) == 1


def test_fake_tensors_are_told_from_real_ones_also_inside_a_subclass():
    real = torch.randn(2)
    with FakeTensorMode() as mode:
        assert dynamo.is_fake(mode.from_tensor(real))
        assert dynamo.is_fake(torch.empty(3))
    assert not dynamo.is_fake(real)


def test_the_limit_of_recompilations_can_be_set_for_a_while():
    was = torch._dynamo.config.recompile_limit
    with dynamo.recompile_limit(was + 3):
        assert torch._dynamo.config.recompile_limit == was + 3
    with dynamo.recompile_limit(None):
        assert torch._dynamo.config.recompile_limit == was
    assert torch._dynamo.config.recompile_limit == was


@pytest.mark.parametrize(("pattern", "expected"), [(r".*\.stored$", 1), ("", 2)])
def test_a_number_that_changes_is_a_symbol_from_the_first_trace_on(pattern, expected):
    class Counter:
        def __init__(self, stored):
            self.stored = stored

    theirs = "L['somebody_elses']"
    with torch.compiler.config.patch(dynamic_sources=theirs), dynamo.changing_numbers(pattern):
        assert torch.compiler.config.dynamic_sources.startswith(theirs)
        graphs = graphs_of(lambda c: torch.ones(3) * c.stored, [Counter(5)], [Counter(6)], [Counter(9)])
    assert graphs == expected
    assert not torch.compiler.config.dynamic_sources


@pytest.mark.skipif("isolate_recompiles" not in PARAMETERS, reason="torch.compile has no regions")
def test_threads_share_the_region_in_which_compiled_code_is_sought():
    """If they do not any more, threads need not wait for each other."""
    frames = torch._C._dynamo.eval_frame
    before = frames.get_eval_frame_isolate_recompiles_id()
    frames.set_eval_frame_isolate_recompiles_id(12345)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(frames.get_eval_frame_isolate_recompiles_id).result() == 12345
    finally:
        frames.set_eval_frame_isolate_recompiles_id(before)


@pytest.mark.parametrize("raised", [errors.PlanLayerError, ZeroDivisionError])
def test_errors_of_ours_come_out_of_a_backend_as_themselves(raised):
    def backend(gm, _inputs):
        raise raised("no")

    function = torch.compile(lambda x: x + 1, backend=backend)
    wanted = raised if issubclass(raised, errors.KVMixError) else torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(wanted) as caught:
        dynamo.unwrapped(function, torch.ones(1))
    assert type(caught.value) is wanted


def test_backends_are_found_by_name():
    assert dynamo.is_backend("eager")
    assert dynamo.is_backend("inductor")
    assert not dynamo.is_backend("no-such-backend")
    assert callable(dynamo.find_backend("eager"))


def test_nothing_else_in_the_package_touches_the_private_surface():
    package = Path(kvmix_fx.__file__).parent
    private = re.compile(r"torch\._dynamo|torch\._guards|torch\._subclasses|(?<!\w)_dynamo_\w+")
    found = [file for file in package.rglob("*.py") if private.search(file.read_text())]
    assert found == [package / "dynamo.py"]


class Slot:
    keys = None


class Box:
    def __init__(self):
        self.slots = [Slot(), Slot()]


def test_a_backend_can_see_where_values_go():
    """New objects that are returned, objects that were there before, and several returned values."""
    seen = []

    def backend(gm, example_inputs):
        copied, _ = dynamo.copy_module(gm)
        seen.extend(dynamo.place(node) for node in copied.graph.nodes)
        return gm.forward

    def function(x, box, *more):
        new = Box()
        new.slots[1].keys = x + 1
        box.slots[0].keys = x + 2
        return x + 3, new, {"a": [x + 4]}, more[1] + x

    args = torch.ones(2), Box(), torch.ones(3, 2), torch.ones(4, 2)
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    assert {place for place in seen if place} == {
        "L['x']",
        "L['more']<1>",
        "L['box'].slots[0].keys",
        "result<0>",
        "result<1>.slots[1].keys",
        "result<2>['a'][0]",
        "result<3>",
    }
