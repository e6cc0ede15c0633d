"""Have the kernels of a step compiled while Inductor compiles the rest of it."""

from __future__ import annotations

from torch import Tensor, fx

from kvmix_fx.dynamo import example, expression, fill_examples, in_numbers
from kvmix_kernels import ops

_OPS = (ops.attend, ops.attend_lse, ops.append_)


def compile_ahead(gm: fx.GraphModule) -> None:
    """Begin to compile what a rewritten module launches on a GPU, each form of a call once."""
    fill_examples(gm)
    seen: set[object] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in _OPS:
            continue
        args = fx.map_arg(node.args, example)
        if not _is_new((node.target, _described(args)), seen):
            continue
        # layers may have symbols of their own for the same numbers
        args = in_numbers(args)
        if args is not None and _is_new((node.target, _described(args)), seen):
            ops.compile_ahead(node.target, args)


def _is_new(form: object, seen: set[object]) -> bool:
    new = form not in seen
    seen.add(form)
    return new


def _described(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, Tensor):
        sizes = map(expression, (*value.shape, *value.stride()))
        return *sizes, value.dtype, value.device
    return expression(value)
