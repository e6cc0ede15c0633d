"""Replace matched sites by ops on the plain buffers.

before   k = cat(cache_k, new_k); v = cat(cache_v, new_v); o = sdpa(q, heads(k), heads(v)); return k, v, o
after    o = kvmix.attend(q, new_k, new_v, ks, vs); kvmix.append_(ks, vs, new_k, new_v); return o

Packed inputs become their buffers; packed outputs disappear and are put together again outside
the graph (`runtime/boundary.py`). Nodes are erased only if the rewrite orphaned them: Dynamo's graph is not
functional, so a general dead-code elimination would delete live in-place operations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvmix_fx import dynamo
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.tensor import ranges_wider
from kvmix_fx.dynamo import example
from kvmix_fx.errors import RewriteInvariantError
from kvmix_fx.passes.find.attention import TARGETS
from kvmix_fx.passes.find.updates import packed_inputs
from kvmix_fx.passes.sites import (
    ADOPT,
    APPEND,
    ATTEND,
    STORAGE,
    AttentionCall,
    PlainBuffers,
    Site,
    Update,
)
from kvmix_fx.passes.sizes import size_evaluator
from kvmix_fx.runtime.boundary import Adopted, Counted, Grown, Plain, PlainCache, Recipe
from kvmix_kernels import layout, ops
from kvmix_kernels.importance import policy_of
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.tokens import ops as token_ops
from kvmix_kernels.tokens import prompt


@dataclass
class Rewritten:
    """The rewritten module and how to get from the original signature to its own.

    values: example values of the original inputs.
    """

    module: fx.GraphModule
    recipe: Recipe
    values: list[Any]


@dataclass(frozen=True)
class Written:
    """A cache that a graph writes. anchor: place in the graph of what its append stands behind."""

    update: Update
    append: fx.Node
    anchor: int


FormatOf = Callable[[Site], tuple[TensorFormat, TensorFormat]]
OrderOf = Callable[[Site], Tensor | None]


def rewrite(
    gm: fx.GraphModule,
    sites: Iterable[Site],
    leftover: list[tuple[Update, Update]],
    formats: FormatOf,
    orders: OrderOf,
) -> Rewritten:
    """Apply every site's action to `gm`, which is edited.

    Args:
        gm: a copy of Dynamo's module.
        sites: matched on `gm`'s own nodes.
        leftover: updates that belong to no attention call, two by two, which share an append.
        formats: key and value format for adopted sites.
        orders: the plan's order of channels of their keys, int32 [Hkv, D], where it has one.
    """
    return _Rewriter(gm, list(sites), leftover, formats, orders).run()


class _Rewriter:
    def __init__(
        self,
        gm: fx.GraphModule,
        sites: list[Site],
        leftover: list[tuple[Update, Update]],
        formats: FormatOf,
        orders: OrderOf,
    ) -> None:
        self.gm, self.graph = gm, gm.graph
        self.sites, self.leftover, self.formats, self.orders = sites, leftover, formats, orders
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.values = [example(n) for n in self.inputs]
        self.output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        self.packed = packed_inputs(self.graph)
        self.symbols = {
            str(dynamo.expression(value)): node
            for node, value in zip(self.inputs, self.values, strict=True)
            if dynamo.is_symbolic(value)
        }
        self.buffers: dict[fx.Node, list[fx.Node]] = {}
        self.counters: dict[fx.Node, fx.Node] = {}
        self.extra: dict[fx.Node, Any] = {}
        self.grown: dict[fx.Node, fx.Node] = {}
        self.mass: dict[fx.Node, fx.Node] = {}
        self.adopted: dict[fx.Node, tuple[list[fx.Node], TensorFormat]] = {}
        self.starts: dict[Hashable, fx.Node] = {}
        self.end: fx.Node | None = None
        self.dead: list[fx.Node] = []
        self.written: dict[fx.Node, Written] = {}
        self.peaks: list[tuple[fx.Node, tuple[int | None, int, TensorFormat]]] = []

    def run(self) -> Rewritten:
        for base, tensor in self.packed.items():
            self.buffers[base] = [
                dynamo.add_buffer_placeholder(self.graph, base, name, getattr(tensor, name))
                for name in tensor.format.buffer_names
            ]
        for site in self.sites:
            if site.action in (ATTEND, ADOPT, APPEND):
                site.call = site.call.with_one_mask()
        for sites in self._by_cache():
            k, v = sites[0].key_update, sites[0].value_update
            assert k is not None
            assert v is not None
            for site in sites:
                if site.action == ATTEND:
                    self._attend(site, k, v)
            if any(site.action == STORAGE for site in sites):
                self._materialize(k)
                self._materialize(v)
            self._append(k, v, sites[0].call, [site.call.node for site in sites])
        # updates without a known attention call still store their tokens
        for first, second in self.leftover:
            self._materialize(first)
            self._materialize(second)
            self._append(first, second, None, [])
        for site in self.sites:
            if site.action == ADOPT:
                self._adopt(site)
            elif site.action == APPEND:
                updates = (site.key_update, site.value_update)
                for role, update in enumerate(updates):
                    assert update is not None
                    self._look_at(site, role, update.new, update.tensor.format)
        plain = [self._count_plain(site.buffers, site) for site in self.sites if site.buffers is not None]
        outputs, live_output = self._outputs()
        peaks = self._peak_output()
        for base in self.packed:
            self._answer_sizes(base)
        self._sweep([*self.dead, *(user for base in self.packed for user in base.users)])
        for base in self.packed:
            if base.users:
                self._unpack_for_readers(base)
            self.graph.erase_node(base)
        self._sweep(self.starts.values())
        self.graph.lint()
        self.gm.recompile()
        index = {node: i for i, node in enumerate(self.inputs)}
        recipe = Recipe(
            len(self.values),
            {index[base]: size_evaluator(self.extra.get(base, 0), self.values) for base in self.packed},
            {index[base]: len(b) + (base in self.counters) for base, b in self.buffers.items()},
            {index[base] for base in self.counters},
            frozenset(
                i
                for i, node in enumerate(n for n in self.graph.nodes if n.op == "placeholder")
                if not node.users and dynamo.is_symbolic(example(node))
            ),
            outputs,
            [index[base] for base in self.extra if self.packed[base].is_fixed],
            live_output,
            plain,
            peaks,
            tuple(about for _, about in self.peaks),
        )
        return Rewritten(self.gm, recipe, self.values)

    def _by_cache(self) -> list[list[Site]]:
        """Sites grouped by the keys and values they read: one append serves all of a group."""
        groups: dict[tuple[fx.Node, fx.Node], list[Site]] = {}
        for site in self.sites:
            if site.key_update is not None and site.value_update is not None:
                groups.setdefault((site.key_update.past, site.value_update.past), []).append(site)
        return list(groups.values())

    def _length(self, tensor: QuantizedKVTensor) -> Any:
        """The token count of a growing tensor, or the capacity of a fixed one."""
        return self._size(tensor.shape[2])

    def _count_plain(self, buffers: PlainBuffers, site: Site) -> PlainCache:
        """Have the graph tell how many tokens the buffers hold."""
        self._start(buffers.write)
        index = {node: i for i, node in enumerate(self.inputs)}
        return PlainCache(index[buffers.key], index[buffers.value], self.formats(site), self.orders(site))

    def _counter(self, base: fx.Node) -> fx.Node:
        """What a fixed cache itself says of how many tokens it holds, as it comes in."""
        if base not in self.counters:
            live = self.packed[base].live
            self.counters[base] = dynamo.add_buffer_placeholder(self.graph, base, "live", live)
        return self.counters[base]

    def _start(self, update: Update) -> fx.Node | None:
        """Device-side token count before this step, for fixed caches: the first position written."""
        if update.new is None and update.tensor.is_fixed:
            return self._counter(update.past)
        if update.positions not in self.starts:
            found = update.idiom.first_and_last(self.graph, update)
            if found is None:
                return None
            self.starts[update.positions], last = found
            if self.end is None:
                with self.graph.inserting_after(last):
                    self.end = self.graph.call_function(operator.add, (last, 1))
            else:
                self.dead.append(last)
        return self.starts[update.positions]

    def _attend(self, site: Site, k: Update, v: Update) -> None:
        call = site.call
        start = self._start(k)
        tiered = k.tensor.format.high is not None
        with self.graph.inserting_before(call.node):
            node = self.graph.call_function(
                token_ops.attend_tiers if tiered else ops.attend,
                (
                    *(call.query, k.new, v.new, self.buffers[k.past], self.buffers[v.past]),
                    *(call.mask, start, self._length(k.tensor), _scale(call)),
                    *(k.tensor.format.encode(), v.tensor.format.encode(), call.softcap, call.sinks),
                ),
            )
            if tiered:
                both = node
                node = self.graph.call_function(operator.getitem, (both, 0))
                # several sites may read one cache: the attention of the last one counts
                self.mass[k.past] = self.graph.call_function(operator.getitem, (both, 1))
        node.meta = dict(call.node.meta)
        dtype = example(call.node).dtype
        if dtype != example(call.query).dtype:
            with self.graph.inserting_before(call.node):
                node = self.graph.call_method("to", (node, dtype))
        call.node.replace_all_uses_with(node)
        # what is written in place in there has no effect elsewhere
        self.dead += [call.node, *call.inside]

    def _append(self, k: Update, v: Update, call: AttentionCall | None, readers: list[fx.Node]) -> None:
        """Store the new tokens after everything that reads the cache as it was before the step.

        `call`: of the step, by whose queries an order of channels or the tokens of a high tier may be chosen.
        """
        if k.new is None or v.new is None:
            return
        start, length = self._start(k), self._length(k.tensor)
        self._start(v)
        if k.from_zero and v.from_zero:
            start, length = None, 0
        anchor = max((*readers, k.node, v.node, k.new, v.new), key=lambda n: self.order[n])
        mask, query = (None, None) if call is None else (call.mask, call.query)
        fmt = k.tensor.format
        more: tuple[Any, ...] = (query,) if fmt.asks_queries else ()
        if fmt.high is not None:
            scale, softcap = (1.0, 0.0) if call is None else (_scale(call), call.softcap)
            sinks = None if call is None else call.sinks
            lse = self._log_sums(call, fmt) if k.from_zero and v.from_zero else None
            more = (query, self.mass.get(k.past), scale, softcap, sinks, lse)
        with self.graph.inserting_after(anchor):
            append = self.graph.call_function(
                ops.append_ if fmt.high is None else token_ops.append_tiers_,
                (
                    *(self.buffers[k.past], self.buffers[v.past], k.new, v.new, mask, start),
                    *(length, fmt.encode(), v.tensor.format.encode(), *more),
                ),
            )
        for update in (k, v):
            assert update.new is not None
            self.written[update.past] = Written(update, append, self.order[anchor])
            self.extra[update.past] = example(update.new).shape[2]
            self.grown[update.node] = update.past
            self.dead.append(update.node)

    def _log_sums(self, call: AttentionCall | None, fmt: TensorFormat) -> fx.Node | None:
        """Have a prompt's attention tell what its weights sum up to, if the high tier counts attention.

        None where it is not torch's own attention or not plainly causal.
        """
        if call is None or call.node in self.dead or call.node.target not in TARGETS:
            return None
        if call.is_masked or call.is_causal is not True or call.dropout_p:
            return None
        lengths = [example(x).shape[2] for x in (call.query, call.key)]
        alike = {dynamo.expression(n) if dynamo.is_symbolic(n) else n for n in lengths}
        # autocast, which knows torch's own attention, would not cast for an op of ours
        dtypes = {example(x).dtype for x in (call.query, call.key, call.value, call.node)}
        if policy_of(fmt).queries == 0 or len(alike) > 1 or len(dtypes) > 1:
            return None
        grouped = bool(call.node.kwargs.get("enable_gqa", False))
        if not prompt.worth_asking(example(call.query), grouped):
            return None
        with self.graph.inserting_before(call.node):
            both = self.graph.call_function(
                token_ops.attend_prompt, (call.query, call.key, call.value, _scale(call), grouped)
            )
            out, lse = (self.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
        out.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(out)
        self.dead.append(call.node)
        return lse

    def _materialize(self, update: Update) -> None:
        """Give readers that need plain numbers the unpacked history with the new tokens exact."""
        base, node = update.past, update.node
        if update.new is None:
            return  # readers of the placeholder are served at the end
        start = self._start(update)
        with self.graph.inserting_before(node):
            history = self._plain_tokens(base, start, update.tensor)
            full = update.idiom.plain(self.graph, update, history)
        node.replace_all_uses_with(full, delete_user_cb=lambda user: user is not self.output)
        if update.idiom.written_in_place:
            later = self.order[node]
            base.replace_all_uses_with(full, delete_user_cb=lambda user: self.order.get(user, -1) > later)

    def _plain_tokens(self, base: fx.Node, start: fx.Node | None, tensor: QuantizedKVTensor) -> fx.Node:
        fmt = tensor.format
        return self.graph.call_function(
            ops.dequantize if fmt.high is None else token_ops.dequantize_tiers,
            (self.buffers[base], start, self._length(tensor), fmt.encode()),
        )

    def _adopt_tiers(self, site: Site) -> None:
        """Pack both at once: the tokens of their high tier are the same."""
        roots = site.key_root, site.value_root
        key_format, value_format = self.formats(site)
        hint = self._hint(site, key_format) if key_format.order == layout.ORDER_PLAN else ()
        order = hint[0] if hint else None
        for role, (root, fmt) in enumerate(zip(roots, (key_format, value_format), strict=True)):
            self._look_at(site, role, root, fmt)
        call = site.call
        lse = self._log_sums(call, key_format)
        with self.graph.inserting_after(call.node):
            packed = self.graph.call_function(
                token_ops.pack_tiers,
                (
                    *(*roots, call.query, call.mask, _scale(call), call.softcap),
                    *(key_format.encode(), value_format.encode(), order, None, call.sinks, lse),
                ),
            )
        after, first = packed, 0
        for root, fmt in zip(roots, (key_format, value_format), strict=True):
            assert root is not None
            items = []
            for i in range(first, first + len(fmt.buffer_names)):
                with self.graph.inserting_after(after):
                    after = self.graph.call_function(operator.getitem, (packed, i))
                items.append(after)
            first += len(items)
            self.adopted[root] = (items, fmt)

    def _adopt(self, site: Site) -> None:
        """Pack the plain keys and values right after their exact attention."""
        if self.formats(site)[0].high is not None:
            if site.key_root not in self.adopted:
                self._adopt_tiers(site)
            return
        both = zip((site.key_root, site.value_root), self.formats(site), strict=True)
        for role, (root, fmt) in enumerate(both):
            assert root is not None
            if root in self.adopted:
                continue
            self._look_at(site, role, root, fmt)
            hint = self._hint(site, fmt)
            anchor, mask = site.call.node, site.call.mask
            if mask is not None and site.tail is not None:
                index: Any = (Ellipsis, slice(site.tail, None))
                with self.graph.inserting_after(anchor):
                    anchor = mask = self.graph.call_function(operator.getitem, (mask, index))
            with self.graph.inserting_after(anchor):
                packed = self.graph.call_function(ops.quantize_pack, (root, mask, fmt.encode(), *hint))
            items = []
            after = packed
            for i in range(len(fmt.buffer_names)):
                with self.graph.inserting_after(after):
                    after = self.graph.call_function(operator.getitem, (packed, i))
                items.append(after)
            self.adopted[root] = (items, fmt)

    def _look_at(self, site: Site, role: int, tokens: fx.Node | None, fmt: TensorFormat) -> None:
        """Have the graph tell how large what is packed for the first time is, if that may matter."""
        if tokens is None or not ranges_wider(example(tokens).dtype, fmt):
            return
        with self.graph.inserting_after(max(tokens, site.call.node)):
            node = self.graph.call_function(ops.peak, (tokens,))
        self.peaks.append((node, (site.layer, role, fmt)))

    def _peak_output(self) -> int | None:
        """Its place among the flat outputs."""
        if not self.peaks:
            return None
        with self.graph.inserting_before(self.output):
            stacked = self.graph.call_function(torch.stack, ([node for node, _ in self.peaks],))
        flat: Any = self.output.args[0]
        self.output.args = ((*flat, stacked),)
        return len(flat)

    def _hint(self, site: Site, fmt: TensorFormat) -> tuple[fx.Node, ...]:
        """What the order of channels of a tensor in this format comes from; nothing where it has none."""
        if fmt.asks_queries:
            query = site.call.query
            if site.tail is None or site.stored:
                return (query,)
            # of the tokens that a window keeps
            with self.graph.inserting_before(site.call.node):
                index = (slice(None), slice(None), slice(site.tail, None))
                return (self.graph.call_function(operator.getitem, (query, index)),)
        order = self.orders(site) if fmt.order == layout.ORDER_PLAN else None
        if order is None:
            return ()
        name = f"kvmix_order_{len(self.adopted)}"
        self.gm.register_buffer(name, order, persistent=False)
        with self.graph.inserting_before(site.call.node):
            return (self.graph.get_attr(name),)

    def _outputs(self) -> tuple[list[Grown | Adopted | Plain | Counted], int | None]:
        flat: list[Any] = []
        recipes: list[Grown | Adopted | Plain | Counted] = []
        index = {node: i for i, node in enumerate(self.inputs)}
        for value in self.output.args[0]:  # type: ignore[union-attr]
            if value in self.grown:
                base = self.grown[value]
                recipes.append(Grown(index[base]))
            elif value in self.adopted:
                items, fmt = self.adopted[value]
                length = size_evaluator(example(value).shape[2], self.values)
                recipes.append(Adopted(len(flat), length, fmt))
                flat.extend(items)
            elif isinstance(value, fx.Node) and dynamo.is_symbolic(example(value)):
                # a recording would give back the number it was made with
                recipes.append(Counted(size_evaluator(example(value), self.values)))
                self.dead.append(value)
            else:
                recipes.append(Plain(len(flat)))
                flat.append(value)
        live_output = None
        if self.end is not None:
            live_output = len(flat)
            flat.append(self.end)
        self.output.args = (tuple(flat),)
        return recipes, live_output

    def _sweep(self, orphans: Iterable[fx.Node]) -> None:
        """Erase those of `orphans` that nothing reads, and what nothing reads then."""
        pending = list(orphans)
        ours = set(self.dead)
        while pending:
            node = pending.pop()
            if (
                node.graph is not self.graph
                or node.users
                or node._erased
                or node.op in ("placeholder", "output")
            ):
                continue
            if node not in ours and _has_effect(node):
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            pending.extend(inputs)

    def _answer_sizes(self, base: fx.Node) -> None:
        """Who asks how large a packed input is, and no more (masks do), gets numbers, not unpacked tokens."""
        shape = self.packed[base].shape
        for asked in [n for n in base.users if _asks_shape(n)]:
            for node in (asked, *asked.users):
                dim = _asked_dim(node, asked)
                if dim is not None:
                    _replace_uses(node, self._size(shape[dim]))
                    self.dead.append(node)
        for asked in [n for n in base.users if _asks_count(n)]:
            sizes = [self._size(size) for size in shape]
            count: Any = math.prod(size for size in sizes if isinstance(size, int))
            for size in (size for size in sizes if isinstance(size, fx.Node)):
                with self.graph.inserting_before(asked):
                    count = self.graph.call_function(operator.mul, (count, size))
            _replace_uses(asked, count)
            self.dead.append(asked)

    def _size(self, size: Any) -> Any:
        """A size as a number, or as a node: the input that holds it, or what is computed from such."""
        return self._computed(dynamo.expression(size)) if dynamo.is_symbolic(size) else int(size)

    def _computed(self, expression: Any) -> Any:
        """Guards may have told a size to be the sum of others."""
        if expression.is_Integer:
            return int(expression)
        found = self.symbols.get(str(expression))
        if found is None:
            if not (expression.is_Add or expression.is_Mul):
                raise RewriteInvariantError(f"no input tells the size {expression}")
            function = operator.add if expression.is_Add else operator.mul
            found, *others = (self._computed(part) for part in expression.args)
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            for other in others:
                anchor = max(n for n in (last, found, other) if isinstance(n, fx.Node))
                with self.graph.inserting_after(anchor):
                    found = self.graph.call_function(function, (found, other))
            self.symbols[str(expression)] = found
        return found

    def _unpack_for_readers(self, base: fx.Node) -> None:
        """Give who reads a cache beside attention its tokens, and after a write in place the new ones too."""
        tensor, written = self.packed[base], self.written.get(base)
        readers = set(base.users)
        first = self._ahead(readers, written)
        start = None if written is None else self._start(written.update)
        if tensor.is_fixed and (start is None or not start < first):
            start = self._counter(base)
        with self.graph.inserting_before(first):
            history = self._plain_tokens(base, start, tensor)
        if written is not None and written.update.idiom.written_in_place and written.update.node._erased:
            update = written.update
            later = {user for user in readers if self.order.get(user, -1) > self.order[update.node]}
            if later:
                with self.graph.inserting_before(self._ahead(later, written)):
                    full = update.idiom.plain(self.graph, update, history)
                base.replace_all_uses_with(full, delete_user_cb=lambda user: user in later)
        base.replace_all_uses_with(history)

    def _ahead(self, readers: set[fx.Node], written: Written | None) -> fx.Node:
        """The first of these, or the append, behind which buffers no longer hold the tokens of before."""
        first = min(readers, key=lambda n: self.order.get(n, -1))
        if written is None or self.order.get(first, -1) <= written.anchor:
            return first
        return written.append


def _scale(call: AttentionCall) -> float:
    """The factor of an attention's scores."""
    return call.scale if call.scale is not None else ops.default_scale(int(example(call.query).shape[3]))


def _asks_shape(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def _asks_count(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("numel", "nelement")


def _asked_dim(node: fx.Node, asked: fx.Node) -> int | None:
    """The one dimension that `node` reads: as `x.size(dim)`, or from all sizes, which are `asked`."""
    if node is asked:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    else:
        dim = node.args[1] if node.target is operator.getitem else None
    return dim if isinstance(dim, int) else None


def _replace_uses(node: fx.Node, value: Any) -> None:
    """Like `Node.replace_all_uses_with`, for any value."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


def _has_effect(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    name = str(name).split(".")[0]
    return node.op == "call_module" or name == "setitem" or (name.endswith("_") and not name.endswith("__"))
