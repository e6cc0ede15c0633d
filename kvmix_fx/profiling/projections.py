"""Walk back from cached keys or values to the linear layer that made them.

Between the two may lie biases, views, splits of a fused projection, norms and the rotary embedding. Which of
the layer's output columns belong to the keys is found by differentiating that stretch of the graph, so
every way of splitting is covered.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from kvmix_fx.dynamo import example
from kvmix_fx.parallel import is_distributed

_MATMULS: set[Any] = {torch.matmul, torch.mm, operator.matmul}
_WEIGHT_VIEWS = {"t", "transpose", "permute", "to", "getattr", "contiguous", "T", "float", "detach"}


@dataclass(frozen=True)
class Projection:
    """The linear layer behind one cached tensor.

    node: its output [..., out], under tensor parallelism this rank's part of it. input: what it is applied
    to [..., in]. weight: the parameter. out_first: whether the weight is [out, in], rather than [in, out].
    columns: which outputs become the cached tensor, int64 [n]. is_affine: whether what follows it is
    affine; a norm is not.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    out_first: bool
    columns: Tensor
    is_affine: bool


def find_projection(root: fx.Node) -> Projection | str:
    """The projection behind the cached tensor `root`, or why there is none to be found."""
    found: dict[fx.Node, tuple[fx.Node, fx.Node, bool]] = {}
    pending, seen = [root], {root}
    while pending:
        node = pending.pop()
        operands = _operands(node)
        if operands is not None:
            found[node] = operands
            continue
        for above in node.all_input_nodes:
            if above not in seen:
                seen.add(above)
                pending.append(above)
    if len(found) != 1:
        how = "no linear layer leads" if not found else f"{len(found)} linear layers lead"
        return f"{how} to {root.name}"
    ((node, (source, weight, out_first)),) = found.items()
    while is_distributed(example(node)) and len(node.users) == 1:
        # under tensor parallelism: from here on, the outputs that make this rank's heads
        (node,) = node.users
    try:
        columns, is_affine = _trace_columns(node, root)
    except Exception as error:  # this runs whatever a model does after its projection, on made-up numbers
        return f"what follows the projection {node.name} cannot be differentiated: {error}"
    return Projection(node, source, weight, out_first, columns, is_affine)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(input, weight, whether the weight is [out, in]) of a linear layer with a weight of its own."""
    if node.op != "call_function":
        return None
    arguments: Any = None
    out_first = False
    if node.target is linear or node.target is torch.ops.aten.linear.default:
        names = ("input", "weight")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        arguments, out_first = (given["input"], given["weight"]), True
    elif node.target is torch.addmm:
        arguments = node.args[1:3]
    elif node.target in _MATMULS:
        arguments = node.args[:2]
    if arguments is None or len(arguments) != 2 or not all(isinstance(a, fx.Node) for a in arguments):
        return None
    source, weight = arguments
    parameter, turned = _parameter(weight)
    return None if parameter is None else (source, parameter, out_first != turned)


def _parameter(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The 2-D input of the graph behind a weight, and whether it was transposed on the way."""
    turned = False
    while node.op not in ("placeholder", "get_attr"):
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name not in _WEIGHT_VIEWS or not node.all_input_nodes:
            return None, False
        turned ^= name in ("t", "transpose", "permute", "T") or "T" in node.args[1:]
        node = node.all_input_nodes[0]
    value = example(node)
    return (node, turned) if isinstance(value, Tensor) and value.dim() == 2 else (None, False)


def _trace_columns(node: fx.Node, root: fx.Node) -> tuple[Tensor, bool]:
    """Columns of `node` that reach `root`, and whether they do so by an affine function."""
    function, others = _stretch(node, root)
    generator = torch.Generator().manual_seed(0)

    def made_up(fake: Any) -> Any:
        if not isinstance(fake, Tensor):
            return fake
        if not fake.is_floating_point():
            return torch.zeros(tuple(fake.shape), dtype=fake.dtype, device=fake.device)
        return torch.randn(tuple(fake.shape), generator=generator).to(fake.device)

    with torch.enable_grad():
        rest = [made_up(example(other)) for other in others]
        y = made_up(example(node)).requires_grad_()
        result = function(y, *rest)
        weights = torch.randn(result.shape, generator=generator).to(result)
        (gradient,) = torch.autograd.grad((result * weights).sum(), y)
    with torch.no_grad():
        zero = function(torch.zeros_like(y), *rest)
        straight, doubled = result - zero, function(2 * y, *rest) - zero
        is_affine = bool((doubled - 2 * straight).norm() <= 0.1 * doubled.norm())
    reached = gradient.reshape(-1, gradient.shape[-1]).ne(0).any(0)
    return reached.nonzero()[:, 0], is_affine


def _stretch(node: fx.Node, root: fx.Node) -> tuple[Callable[..., Tensor], list[fx.Node]]:
    """What the graph does between two nodes, as a function of the first and of the other nodes listed."""
    below = {node}
    for later in node.graph.nodes:
        if any(above in below for above in later.all_input_nodes):
            below.add(later)
    between = {root}
    pending = [root]
    while pending:
        for above in pending.pop().all_input_nodes:
            if above in below and above is not node and above not in between:
                between.add(above)
                pending.append(above)
    ordered = [n for n in node.graph.nodes if n in between and n is not node]
    others = list(
        dict.fromkeys(a for n in ordered for a in n.all_input_nodes if a not in between and a is not node)
    )
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in (node, *others)}
    for n in ordered:
        copies[n] = graph.node_copy(n, lambda a: copies[a])
    graph.output(copies[root])
    owner: Any = node.graph.owning_module
    return fx.GraphModule(owner if owner is not None else {}, graph), others
