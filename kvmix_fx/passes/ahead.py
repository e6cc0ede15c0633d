"""Have the kernels of a step compiled while Inductor compiles the rest of it."""

from __future__ import annotations

from torch import Tensor, fx

from kvmix_fx.dynamo import example, fill_examples, in_numbers
from kvmix_kernels import ops

_OPS = (ops.attend, ops.attend_lse, ops.append_)


def compile_ahead(gm: fx.GraphModule) -> None:
    """Begin to compile what a rewritten module launches on a GPU, each form of a call once."""
    fill_examples(gm)
    seen = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in _OPS:
            continue
        args = in_numbers(fx.map_arg(node.args, example))
        form = (node.target, _described(args))
        if args is not None and form not in seen:
            seen.add(form)
            ops.compile_ahead(node.target, args)


def _described(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return value
