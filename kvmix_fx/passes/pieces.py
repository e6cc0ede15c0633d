"""Cut the graph of a step before each attention, so that what repeats is compiled once.

Layers of a model differ in their weights and caches, which are inputs, and in nothing else. From one
attention to the next, their steps are one piece of code. A compiler neither fuses with nor looks into
attention over a packed cache, so that nothing is lost by a cut there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kvmix_fx.dynamo import example, fill_examples, learnt, make_module, storage
from kvmix_fx.runtime.pieces import Piece, Pieces
from kvmix_kernels import ops
from kvmix_kernels.tokens.ops import attend_tiers

_ATTENTION = (ops.attend, ops.attend_lse, attend_tiers)
_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
_NAMES = "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift concat"
_IN_PLACE = {*(f"i{name}" for name in _NAMES.split()), "setitem", "delitem"}
"""Functions of `operator` that write to their first argument, such as iadd."""

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def compile_pieces(gm: fx.GraphModule, compile_one: Compile) -> Pieces | None:
    """Compile what `gm` consists of, each form once.

    Returns:
        What is called like the compiled `gm`. None if there is nothing to gain or no safe cut: fewer than
        three attentions, autocast across one, or a tensor that one piece writes and another has.
    """
    body = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    starts = [i for i, node in enumerate(body) if node.target in _ATTENTION]
    if len(starts) < 3:
        return None
    fill_examples(gm)
    cuts = zip([0, *starts], [*starts, len(body)], strict=True)
    parts = [body[begin:end] for begin, end in cuts if begin < end]
    if not all(_closed(part) and _writes_its_own(part) for part in parts):
        return None
    output = next(node for node in gm.graph.nodes if node.op == "output")
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    slots = {node: i for i, node in enumerate(inputs)}
    last: dict[fx.Node, fx.Node] = {}
    for user in gm.graph.nodes:
        last.update(dict.fromkeys(user.all_input_nodes, user))
    compiled: dict[Any, Callable[..., Any]] = {}
    pieces = []
    for part in parts:
        inside = set(part)
        outputs = [node for node in part if any(user not in inside for user in node.users)]
        module, taken = _module(gm, part, outputs)
        exact = _form(module, taken)
        alike = _symbols_by_place(exact)
        function = compiled.get(exact, compiled.get(alike))
        if function is None:
            before = learnt(gm)
            function = compile_one(module, [example(node) for node in taken])
            # a guard holds for the symbols that it was made for
            compiled[alike if learnt(gm) == before else exact] = function
        for node in outputs:
            slots[node] = len(slots)
        # the inputs are the caller's
        done = [slots[node] for node in taken if node.op != "placeholder" and last[node] in inside]
        pieces.append(
            Piece(
                function,
                tuple(slots[node] for node in taken),
                tuple(slots[node] for node in outputs),
                tuple(done),
            )
        )
    results = tuple((slots[x], None) if isinstance(x, fx.Node) else (None, x) for x in output.args[0])
    return Pieces(pieces, len(slots), results, len(compiled))


def _closed(part: list[fx.Node]) -> bool:
    """Whether a part leaves the modes that code runs in as they were."""
    entered = [node for node in part if node.target is _ENTER]
    left = [node.args[0] for node in part if node.target is _EXIT]
    grad = any(node.target is torch._C._set_grad_enabled and node.args[0] for node in part)
    return not grad and sorted(map(str, entered)) == sorted(map(str, left))


def _writes_its_own(part: list[fx.Node]) -> bool:
    """Whether a part writes to nothing that it was given.

    Inductor may return what it was given in place of a sum with zero, which a write then changes.
    """
    inside = set(part)
    given = {x for node in part for x in node.all_input_nodes if x not in inside}
    theirs = {storage(x) for x in given if isinstance(example(x), torch.Tensor)}
    return not any(storage(x) in theirs for node in part for x in written(node))


def written(node: fx.Node) -> list[fx.Node]:
    """The tensors that a step writes to in place."""
    target, first = node.target, node.args[:1]
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema.arguments
        given = [*zip(schema, node.args, strict=False), *((a, node.kwargs.get(a.name)) for a in schema)]
        found = [x for a, x in given if a.alias_info is not None and a.alias_info.is_write]
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        own = name.endswith("_") and not name.endswith("__")
        inplace = name in _IN_PLACE or node.kwargs.get("inplace") is True
        found = [*(first if own or inplace else ()), node.kwargs.get("out")]
    nodes: list[fx.Node] = []
    fx.map_arg(found, nodes.append)
    return [x for x in nodes if isinstance(example(x), torch.Tensor)]


def _module(
    gm: fx.GraphModule, part: list[fx.Node], outputs: list[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A part as a module of its own, and the nodes that it takes: equal parts become equal but for them."""
    inside = set(part)
    taken = list(dict.fromkeys(x for node in part for x in node.all_input_nodes if x not in inside))
    graph = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(taken):
        own[node] = graph.placeholder(f"input_{i}")
        own[node].meta["example_value"] = example(node)
    for i, node in enumerate(part):
        own[node] = graph.node_copy(node, own.__getitem__)
        own[node].name = f"step_{i}"
    graph.output(tuple(own[node] for node in outputs))
    return make_module(gm, graph), taken


def _form(module: fx.GraphModule, taken: list[fx.Node]) -> tuple[Any, ...]:
    """What two parts have in common if one compiled function serves both."""
    steps = []
    for node in module.graph.nodes:
        constant = None
        if node.op in ("get_attr", "call_module"):
            constant = id(_attribute(module, node.target))
        name = None if node.op == "placeholder" else node.target
        steps.append((node.op, name, constant, repr(node.args), repr(node.kwargs)))
    return (*steps, *(_described(example(node)) for node in taken))


def _symbols_by_place(form: tuple[Any, ...]) -> tuple[Any, ...]:
    """A form in which symbols are told apart, but are no particular ones."""
    names: dict[str, str] = {}

    def renamed(found: re.Match[str]) -> str:
        return names.setdefault(found[0], f"size{len(names)}")

    def replaced(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(replaced(x) for x in part)
        return re.sub(r"\b[su]\d+\b", renamed, part) if isinstance(part, str) else part

    return tuple(replaced(part) for part in form)


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = (str(tuple(value.shape)), str(value.stride()), str(value.storage_offset()))
        return (type(value), *sizes, value.dtype, value.device, value.requires_grad)
    return repr(value)
