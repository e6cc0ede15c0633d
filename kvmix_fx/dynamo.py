"""All that touches Dynamo's private surface. tests/passes/test_dynamo_facts.py has a canary per fact.

Facts relied on: nodes carry `example_value`; placeholders carry `_dynamo_source`; the module carries
`meta["dynamo_compile_id"]` and `_param_name_to_source`, without which AOTAutograd treats no input as
static; `nn_module_stack` names the module of a node; the example value of a packed input is a fake
QuantizedKVTensor whose buffers are fakes with symbols of their own; a dimension in a tensor's
`_dynamo_weak_dynamic_indices` is a symbol from the first trace on, and `_automatic_dynamic` says of which
kind; an error in a backend comes out as `BackendCompilerFailed` with `inner_exception`, code that cannot be
traced as `Unsupported` with `real_stack`; while a backend runs, the current translator holds what the
traced code returns (`stack`) and what it changes (`output.side_effects`), and the list `tracked_fakes` of its
ShapeEnv what sizes are guarded afterwards, by text that `guards._ast_unparse` takes part in.

It lies below caches and passes, which both need it. Dynamo itself is imported where it is used first, so
that a packed cache without a compiler does not wait for it.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake as is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvmix_fx.errors import KVMixError

_STATIC = "_dynamo_static_input_type"
_PLACE = "kvmix_place"
_TOKENS, _CAPACITY = {2}, {2}
"""The dimension of tokens, [B, Hkv, L, D]: a set for all tensors that grow, one for all of fixed capacity."""


def mark_tokens(*tensors: Tensor, fixed: bool = False) -> None:
    """Have the number of tokens of caches, dimension 2, traced as a symbol, for it grows or differs.

    With `fixed` it is a capacity, which layers have in common: see `common_capacity`. What
    `torch._dynamo.maybe_mark_dynamic` does, without its cost: decode steps call this.
    """
    for x in tensors:
        x._dynamo_weak_dynamic_indices = _CAPACITY if fixed else _TOKENS  # type: ignore[attr-defined]


@contextlib.contextmanager
def common_capacity() -> Iterator[None]:
    """For the time of a block, equal capacities are traced as one symbol instead of one for each tensor.

    Those of 32 layers would be over 200, and a quarter of what tracing takes. Where capacities were
    equal by chance, the first cache in which they are not is traced once more, and then each has its own.
    """
    from torch._dynamo.variables import builder
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    theirs = getattr(builder, "_automatic_dynamic", None)
    if theirs is None:
        yield
        return

    def chosen(e: Any, *args: Any, **kwargs: Any) -> Any:
        context = theirs(e, *args, **kwargs)
        if getattr(e, "_dynamo_weak_dynamic_indices", None) is _CAPACITY:
            sizes, constraints = context.dynamic_sizes, context.constraint_sizes
            # one with a constraint differed from that of an earlier trace
            if sizes[2] is DimDynamic.DYNAMIC and constraints[2] is None:
                sizes[2] = DimDynamic.DUCK
        return context

    builder._automatic_dynamic = chosen
    try:
        yield
    finally:
        builder._automatic_dynamic = theirs


@contextlib.contextmanager
def quick_paths() -> Iterator[None]:
    """For the time of a block, what guards read is written as text without the detours of `ast.unparse`.

    Dynamo looks for what guards of sizes have in common by the text of every part of them.
    """
    from torch._dynamo import guards

    theirs = getattr(guards, "_ast_unparse", None)
    if theirs is None:
        yield
        return
    guards._ast_unparse = lambda node: _path(node) or theirs(node)
    try:
        yield
    finally:
        guards._ast_unparse = theirs


def _path(node: ast.AST) -> str:
    """The text of `name.attribute[constant]()`, in any order and number; '' for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base, step = node.value, f".{node.attr}"
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        base, step = node.value, f"[{node.slice.value!r}]"
    elif isinstance(node, ast.Call) and not node.args and not node.keywords:
        base, step = node.func, "()"
    else:
        return ""
    path = _path(base)
    return path and path + step


def guard_once() -> None:
    """Have Dynamo guard the sizes of packed inputs once; for a backend to call.

    It has noted every buffer three times, twice by itself and once as a part of its tensor, and compares each
    size and stride as often, in text that it takes apart and compiles.
    """
    from torch._guards import TracingContext

    mode = getattr(TracingContext.try_get(), "fake_mode", None)
    tracked: list[Any] | None = getattr(getattr(mode, "shape_env", None), "tracked_fakes", None)
    if not tracked:
        return
    parts = {
        (f"{_name(one.source)}.{attribute}", id(getattr(one.fake, attribute)))
        for one in tracked
        if is_traceable_wrapper_subclass(one.fake)
        for attribute in one.fake.__tensor_flatten__()[0]
    }
    # other objects hold this very list
    tracked[:] = [one for one in tracked if (_name(one.source), id(one.fake)) not in parts]


def mark_dimension(x: Tensor, dim: int) -> None:
    """Have one dimension of any tensor traced as a symbol, unless the code itself needs its number."""
    torch._dynamo.maybe_mark_dynamic(x, dim % x.dim())


def recompile_limit(limit: int | None) -> contextlib.AbstractContextManager[Any]:
    """For the time of a block, how many graphs one function may be traced into; None changes nothing."""
    if limit is None:
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=limit)
    return patched


def changing_numbers(pattern: str) -> contextlib.AbstractContextManager[Any]:
    """For the time of a block, take numbers from sources that match for symbols; "" changes nothing.

    Else the first value is compiled in, and the second step, which has another, is traced and compiled anew.
    """
    if not pattern:
        return contextlib.nullcontext()
    config: Any = torch.compiler.config
    known = config.dynamic_sources
    patched: contextlib.AbstractContextManager[Any] = config.patch(
        dynamic_sources=f"{known},{pattern}" if known else pattern
    )
    return patched


_alone = threading.RLock()
"""Held in compiled code. Where Dynamo looks for what it has compiled is one variable of the whole process:
two threads would look in each other's places, find nothing, and compile in every step."""


def _not_held() -> None:
    """In a forked process there is nobody who could let go of it."""
    global _alone
    _alone = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_not_held)


def unwrapped(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call compiled code, when no other thread does; errors of ours come out as themselves."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        with _alone, common_capacity(), quick_paths():
            return function(*args, **kwargs)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, KVMixError):
            raise error.inner_exception from None
        raise


@contextlib.contextmanager
def one_collection(is_due: Callable[[], bool]) -> Iterator[None]:
    """For the time of a block, no garbage is collected; once in its end, of what it has made, if `is_due`.

    Tracing makes so many objects that Python looks through all of the process several times meanwhile, and
    leaves reference cycles that would keep the memory of a cache.
    """
    if not gc.isenabled():
        yield
        if is_due():
            gc.collect()
        return
    config: Any = torch._dynamo.config
    after_compile = getattr(config, "run_gc_after_compile", False)
    gc.disable()
    try:
        if after_compile:
            # while what is to be let go of is still in use
            config.run_gc_after_compile = False
        before = _collections()
        yield
        if is_due():
            # what is new is the youngest generation, unless somebody has collected
            gc.collect(1 if _collections() == before else 2)
    finally:
        gc.enable()
        if after_compile:
            config.run_gc_after_compile = True


def _collections() -> list[int]:
    return [generation["collections"] for generation in gc.get_stats()]


def graph_break_errors() -> tuple[type[Exception], ...]:
    """What tracing raises where a function cannot be one graph and has to be.

    The second is said to be a fault of Dynamo itself, the third one of the user: both are raised for numbers
    that depend on data.
    """
    from torch._dynamo.exc import InternalTorchDynamoError, Unsupported, UserError

    return Unsupported, InternalTorchDynamoError, UserError


def break_place(error: Exception) -> str:
    """Where the code is that could not be traced, and what kind of code: for people, one line."""
    stack = getattr(error, "real_stack", None)
    kind = str(error).strip().splitlines()[0]
    return f"{stack[-1].filename}:{stack[-1].lineno}: {kind}" if stack else kind


def is_backend(name: str) -> bool:
    """Whether Dynamo knows a backend of this name."""
    return name in torch._dynamo.list_backends(exclude_tags=())


def find_backend(name: Any) -> Callable[..., Any]:
    """The backend of this name; a callable is returned as it is."""
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return backend


def example(node: Any) -> Any:
    """The fake value of a node, or the argument itself if it is no node."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module whose forward made this node, '' if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return str(path)


def source_name(node: fx.Node) -> str:
    """How the caller reaches a placeholder's value, for people."""
    source = getattr(node, "_dynamo_source", None)
    return node.name if source is None else _name(source)


def _name(source: Any) -> str:
    """A method in older releases."""
    name = source.name
    return str(name() if callable(name) else name)


def place(node: fx.Node) -> str:
    """Where a value lies outside the graph, as a path: an input by its source, an output by where it goes.

    "L['past_key_values'].layers[3].keys", say. Which argument of `*args` and which value of several that are
    returned is written <3>. '' for what is neither input nor output, or cannot be followed.
    """
    return str(node.meta.get(_PLACE, ""))


def _places(graph: fx.Graph) -> dict[str, str]:
    """Names of nodes -> their `place`. Outside a backend call inputs only."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    found = {node.name: source_name(node) for node in graph.nodes if getattr(node, "_dynamo_source", None)}
    try:
        root: Any = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return found
    found = {**_destinations(root), **found}
    code = root.f_code
    if code.co_flags & inspect.CO_VARARGS:
        several = f"L['{code.co_varnames[code.co_argcount + code.co_kwonlyargcount]}']["
        for name, path in found.items():
            if path.startswith(several):
                found[name] = several[:-1] + "<" + path[len(several) :].replace("]", ">", 1)
    return found


def _destinations(root: Any) -> dict[str, str]:
    """Names of nodes whose values the code that `root` translates returns or stores -> paths of where to."""
    from torch._dynamo.variables import ConstantVariable, TensorVariable

    effects = root.output.side_effects
    found: dict[str, str] = {}
    seen: set[int] = set()

    def parts(variable: Any) -> list[tuple[str, Any]]:
        if isinstance(variable, ConstantVariable):
            return []
        fields = [(f".{k}", v) for k, v in effects.store_attr_mutations.get(variable, {}).items()]
        for holder in (variable, getattr(variable, "_base_vt", None)):
            items = getattr(holder, "items", None)
            if isinstance(items, dict):
                fields += [(f"[{_key(k)!r}]", v) for k, v in items.items()]
            elif isinstance(items, (list, tuple)):
                fields += [(f"[{i}]", v) for i, v in enumerate(items)]
        return fields

    def walk(variable: Any, path: str) -> None:
        if isinstance(variable, TensorVariable):
            found.setdefault(variable.as_proxy().node.name, path)
        elif id(variable) not in seen:
            seen.add(id(variable))
            for step, part in parts(variable):
                walk(part, path + step)

    changed = [v for v in effects.id_to_variable.values() if effects.is_modified(v)]
    changed += list(effects.store_attr_mutations)
    for variable in changed:
        if name := _existing(variable):
            walk(variable, name)
    for variable in root.stack:
        returned = [] if isinstance(variable, TensorVariable) else parts(variable)
        for step, part in returned:
            walk(part, f"result{step}" if step[0] == "." else f"result<{step[1:-1]}>")
        walk(variable, "result")
    # new objects that hang on nothing above; outer ones first, for only they know an inner one's place
    inner = {id(part) for variable in changed for _, part in parts(variable)}
    for variable in sorted(changed, key=lambda v: id(v) in inner):
        walk(variable, "new")
    return found


def _key(key: Any) -> Any:
    """A key of a traced dict; one that is not known while tracing stands for itself."""
    variable = getattr(key, "vt", key)
    return variable.as_python_constant() if variable.is_python_constant() else key


def _existing(variable: Any) -> str:
    """The path of an object that was there before the traced code ran, '' for a new one."""
    try:
        return _name(variable.source)
    except (AttributeError, NotImplementedError):
        return ""


def make_module(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module with the parts of `gm` that `graph` names.

    Called from a backend, it is one whose code is written when it is asked for: compilers read the graph.
    """
    from torch.fx._lazy_graph_module import _make_graph_module

    return _make_graph_module(gm, graph)


def forward(gm: fx.GraphModule) -> Callable[..., Any]:
    """The code of a module, written if it has to be."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    _LazyGraphModule.force_recompile(gm)
    return gm.forward  # type: ignore[no-any-return]


def load_inductor() -> None:
    """What compiling with Inductor begins with in a process: imports, and what its cache knows torch by."""
    from torch._inductor import codecache

    codecache.torch_key()
    codecache.CacheBase.get_system()


def copy_module(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy that may be edited. Dynamo reads its own graph again after the backend returns.

    The copy's nodes know their `place`; those of outputs in a backend call only.
    """
    graph = fx.Graph()
    places = _places(gm.graph)
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        twin = graph.node_copy(node, lambda n: mapping[n])
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
        if node.name in places:
            twin.meta[_PLACE] = places[node.name]
        mapping[node] = twin
    copied = make_module(gm, graph)
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    return copied, mapping


def add_buffer_placeholder(graph: fx.Graph, base: fx.Node, attribute: str, value: Any) -> fx.Node:
    """A placeholder for one inner tensor of the packed input `base`, before it, marked static."""
    with graph.inserting_before(base):
        node = graph.placeholder(f"{base.name}_{attribute}")
    node.meta["example_value"] = value
    # the buffers stay where they are from step to step, so CUDA graphs need not copy them
    node.meta["tensor_dict"] = {_STATIC: "unguarded"}
    from torch._dynamo.source import AttrSource

    source = getattr(base, "_dynamo_source", None)
    node._dynamo_source = AttrSource(source, attribute) if source is not None else None  # type: ignore[attr-defined]
    return node


def example_inputs(gm: fx.GraphModule) -> list[Any]:
    """Fake inputs in placeholder order."""
    return [example(node) for node in gm.graph.nodes if node.op == "placeholder"]


def fill_examples(gm: fx.GraphModule, nodes: Iterable[fx.Node] | None = None) -> None:
    """Give nodes that were added to a graph of Dynamo's, or these, an example, as the others have."""
    # not the mode that is current: backends are called under another one
    with _fake_mode(gm) or contextlib.nullcontext():
        for node in gm.graph.nodes if nodes is None else nodes:
            if "example_value" not in node.meta and node.op in ("call_function", "call_method"):
                args, kwargs = fx.map_arg((node.args, node.kwargs), example)
                target: Any = node.target
                if node.op == "call_function":
                    node.meta["example_value"] = target(*args, **kwargs)
                else:
                    node.meta["example_value"] = getattr(args[0], target)(*args[1:], **kwargs)


def in_numbers(values: Any) -> Any:
    """Example values with numbers for symbols: those they were traced with; None if some have none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def number(size: Any) -> int:
        return int(size.node.hint) if isinstance(size, torch.SymInt) else size

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(one, value))
        if not isinstance(value, Tensor):
            return number(value)
        sizes, strides = map(number, value.shape), map(number, value.stride())
        return torch.empty_strided([*sizes], [*strides], dtype=value.dtype, device=value.device)

    try:
        with mode:
            return one(values)
    except TypeError:
        # a number that depends on data
        return None


def learnt(gm: fx.GraphModule) -> tuple[int, ...]:
    """How much is known of the symbols of a graph; other numbers once a compiler made a guard."""
    env = getattr(_fake_mode(gm), "shape_env", None)
    return () if env is None else (len(env.guards), len(env.replacements), len(env.divisible))


def _fake_mode(gm: fx.GraphModule) -> Any:
    # packed inputs are fake by what they hold
    fakes: list[Any] = [x for x in example_inputs(gm) if is_fake(x) and hasattr(x, "fake_mode")]
    return fakes[0].fake_mode if fakes else None


def storage(node: fx.Node) -> int:
    """What two nodes have in common if one is a view of the other, or both are of a third."""
    return int(example(node).untyped_storage()._cdata)


def is_symbolic(value: Any) -> bool:
    """Whether a size is a symbol rather than a number. Guards may have turned a symbol into one."""
    return isinstance(value, torch.SymInt) and not value.node.expr.is_number


def expression(value: Any) -> Any:
    """The sympy expression behind a symbolic size; any other value is returned as it is."""
    return value.node.expr if isinstance(value, torch.SymInt) else value
