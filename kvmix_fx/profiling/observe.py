"""Run a model with its cached keys and values in reach: seen, differentiated, or exchanged.

The model is traced by Dynamo and its sites are found by the pass itself (`kvmix_fx.passes`), so what can be
packed can be observed, whatever the model's class. Nothing is packed: at every site attention is computed as
*decoding over a packed cache* would, in one forward. Query t attends to the **far** copy of the tokens that
had left the window when it was read, and to the **near** copy of the others. Both copies hold the same
numbers, so the logits are the model's own; an error put into the far copy, or a gradient taken there, is
that of the packed tokens alone.

No parameter takes part in differentiation: the first tensors observed are made leaves, and gradients of
projection weights follow from those of the projections' outputs. So frozen and quantized weights do, and
there is no memory for weight gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from kvmix_fx import dynamo
from kvmix_fx.errors import NoSiteError, ProfileError
from kvmix_fx.parallel import Ranks, local
from kvmix_fx.passes.assign import assign_layers
from kvmix_fx.passes.find.views import heads_root
from kvmix_fx.passes.manager import no_tier
from kvmix_fx.passes.match import match
from kvmix_fx.passes.sites import ADOPT, LEAVE, AttentionCall, Site
from kvmix_fx.plan import ModelGeometry, QuantSpec
from kvmix_fx.plan.schema import raw_window
from kvmix_fx.profiling.projections import Projection, find_projection
from kvmix_fx.profiling.rounding import round_trip
from kvmix_fx.profiling.segments import SegmentedGraph
from kvmix_kernels import layout
from kvmix_kernels.ops import default_scale

ROLES = ("key", "value")

Replacement: TypeAlias = Tensor | Callable[[Tensor], Tensor]


class _Seen(Exception):  # noqa: N818 - no error: it ends a call once the graph is known
    pass


@dataclass(frozen=True)
class ProjectionInfo:
    """The linear layer behind the keys or the values of a layer, as far as signals need it.

    weight: rows or columns that make this tensor, float32 [n, in]. is_affine: whether nothing but an affine
    function (rotary embedding, views) lies between it and the cache.
    """

    weight: Callable[[], Tensor]
    is_affine: bool


class Scoring(NamedTuple):
    """How queries find the keys that they attend to.

    mask: boolean or additive, broadcastable to [B, Hq, L, L]; None is causal. scale: factor of the scores;
    softcap: their bound, 0 for none; sinks: logits of a learned sink, Hq numbers, or None.
    """

    mask: Tensor | None
    scale: float
    softcap: float
    sinks: Tensor | None


@dataclass
class Listeners:
    """What is called while a prompt is read; None where nobody listens.

    cached(layer, role, x): keys or values as cached [B, Hkv, L, D], in the forward.
    gradient(layer, role, x, g): x as above, and the gradient of its far copy, in the backward.
    projected(layer, role, h, g): the projection's input [B, L, in] and the gradient of the outputs that make
    this tensor [B, L, n], in the backward.
    asked(layer, q, k, scoring): queries [B, Hq, L, D], the keys that they are asked of, and how, in the
    forward.
    """

    cached: Callable[[int, str, Tensor], None] | None = None
    gradient: Callable[[int, str, Tensor, Tensor], None] | None = None
    projected: Callable[[int, str, Tensor, Tensor], None] | None = None
    asked: Callable[[int, Tensor, Tensor, Scoring], None] | None = None

    @property
    def differentiate(self) -> bool:
        """Whether a backward follows."""
        return self.gradient is not None or self.projected is not None


@dataclass
class Observer:
    """A model under observation; see the module.

    Attributes:
        model: left as it is but for what `observing` restores.
        window: recent tokens that a query sees exactly, at least; a tile of 32 more wait to be packed.
        sink_length: leading tokens that every query sees exactly.
        checkpointing: keep only what enters a layer for the backward, and compute the rest again.
        listeners: who is told.
        replacements: far copies to use instead, by layer and role, or what makes them from the exact ones.
        readers: which far copy each query reads, by layer, bool [Hkv, L, n * L]; the replacements of the
            layer are then n copies one after the other along the tokens. What a query reads in none of them
            it reads in the near copy. Layers that are not in it have one, of what is packed.
        skipped: layers that the pass would leave at 16 bits, with the reason.
        no_tiers: layers that can be packed and cannot have a tier of tokens, with the reason.
        orders: of the channels of each layer's keys, the most important first, int [Hkv, D] of this rank's
            heads; for formats with tiers, and empty until somebody has measured them.
        geometry: of the observed layers.
        ranks: among which the heads are shared out; each observes its own.
    """

    model: nn.Module
    window: int = 32
    checkpointing: bool = False
    listeners: Listeners = field(default_factory=Listeners)
    replacements: dict[tuple[int, str], Replacement] = field(default_factory=dict)
    readers: dict[int, Tensor] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    no_tiers: dict[int, str] = field(default_factory=dict)
    sink_length: int = 0
    orders: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._forward = torch.compile(
            _plain_forward(self.model), backend=self._backend, fullgraph=True, dynamic=False
        )
        self._program: SegmentedGraph | None = None
        self._taps: dict[tuple[int, str], _ProjectionTap | str] = {}
        self._shapes: dict[int, tuple[int, int]] = {}
        self._segment_of: dict[int, int] = {}
        self._recording = False
        self._only_look = False
        self.ranks = Ranks.of(self.model)
        self._schedule = layout.make_format(
            8, "token", 16, tile=32, sink=self.sink_length, window=self.window
        )

    @property
    def first_packed_query(self) -> int:
        """Position of the first query that finds packed tokens."""
        return self.sink_length + self.window + self._schedule.tile

    def rounded(self, layer: int, x: Tensor, spec: QuantSpec, valid: Tensor | None) -> Tensor:
        """What packing leaves of keys or values of `layer`, as `round_trip` says."""
        return round_trip(x, spec, valid, sink=self.sink_length, order=self.orders.get(layer))

    @property
    def layers(self) -> list[int]:
        """Layers whose cache can be packed."""
        return sorted(self._shapes)

    @property
    def geometry(self) -> ModelGeometry:
        """Sizes of the whole model's cache, from the observed tensors; skipped layers count as layers."""
        shapes = set(self._shapes.values())
        if len(shapes) != 1:
            raise ProfileError(
                f"layers differ in KV heads and head size ({sorted(shapes)}); plans cover one of each"
            )
        ((heads, head_dim),) = shapes
        return ModelGeometry(1 + max((*self._shapes, *self.skipped)), heads * self.ranks.size, head_dim)

    def projection(self, layer: int, role: str) -> ProjectionInfo | str:
        """The linear layer behind a cached tensor, or why it is not known."""
        tap = self._taps.get((layer, role), "the layer is left at 16 bits")
        return tap if isinstance(tap, str) else tap.info(role)

    def look(self, ids: Tensor) -> None:
        """Trace the model on token ids [B, L], the shape that will be read, without reading them.

        Raises:
            NoSiteError: the model has no cache that the pass could pack.
        """
        self._only_look = True
        try:
            self._run(ids)
        except _Seen:
            return
        finally:
            self._only_look = False

    def read(self, ids: Tensor, *, keep: bool = False) -> Tensor:
        """Logits [B, L, vocabulary] of token ids [B, L].

        keep: remember what enters each layer, for `read_from`.

        Raises:
            NoSiteError: the model has no cache that the pass could pack.
        """
        if self._program is not None:
            self._program.keep, self._program.resume_at = keep, None
        logits = self._run(ids)
        assert self._program is not None
        if keep and not self._program.keep:
            # it exists since this call
            self._program.keep = True
            logits = self._run(ids)
        return logits

    def read_from(self, layer: int, ids: Tensor) -> Tensor:
        """As `read`, of the same ids, computing again only what comes after the projections of `layer`."""
        assert self._program is not None
        self._program.keep, self._program.resume_at = False, self._segment_of[layer]
        try:
            return self._run(ids)
        finally:
            self._program.resume_at = None

    def forget(self) -> None:
        """Let go of what `read(keep=True)` remembers."""
        if self._program is not None:
            self._program.forget()

    def _run(self, ids: Tensor) -> Tensor:
        if self._program is not None:
            self._program.checkpointing = self.checkpointing and self.listeners.differentiate
        self._recording = True
        try:
            with torch.enable_grad():
                output = dynamo.unwrapped(self._forward, input_ids=ids, use_cache=True)
        finally:
            self._recording = False
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
        if not isinstance(logits, Tensor):
            raise ProfileError(f"the model answers with {type(output).__name__}, which holds no logits")
        return logits

    def _backend(self, gm: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        copied, _ = dynamo.copy_module(gm)
        matched = match(copied.graph)
        sites = matched.sites
        assign_layers(copied.graph, sites)
        for site in sites:
            kept = 1 - site.tail if isinstance(site.tail, int) and site.tail < 0 else 0
            whole = raw_window(kept, self.window, self._schedule.tile) if kept else ""
            if site.action == ADOPT and whole:
                # as the pass will do under a plan of these windows
                site.action, site.reason = LEAVE, whole
        usable = [s for s in sites if s.action == ADOPT and not s.stored and s.layer is not None]
        self.skipped = {
            site.layer: site.reason for site in sites if site not in usable and site.layer is not None
        }
        reasons_by_layer = {site.layer: no_tier(site) for site in usable if site.layer is not None}
        self.no_tiers = {layer: reason for layer, reason in reasons_by_layer.items() if reason}
        if not usable:
            given = {site.reason for site in sites} | {one.miss.reason for one in matched.missed}
            reasons = "; ".join(sorted(given - {""})) or "no attention was found"
            raise NoSiteError(f"nothing in this model can be packed, so nothing can be profiled: {reasons}")
        for table in (self._taps, self._shapes, self._segment_of):
            table.clear()
        # all walks before any change, for keys and values may share a projection
        projections = {
            (site.layer, role): find_projection(root)
            for site in usable
            for role, root in zip(ROLES, _attended(site), strict=True)
            if root is not None and site.layer is not None
        }
        starts = []
        for number, site in enumerate(usable, 1):
            assert site.layer is not None
            self._segment_of[site.layer] = number
            starts.append(self._tap_attention(copied, site))
        taps: dict[fx.Node, _ProjectionTap] = {}
        for place, found in projections.items():
            self._taps[place] = (
                found if isinstance(found, str) else self._tap_projection(copied, found, taps, place)
            )
        copied.graph.lint()
        copied.recompile()
        program = SegmentedGraph(copied, starts)
        program.checkpointing = self.checkpointing and self.listeners.differentiate
        self._program = program

        def run(*args: Any) -> Any:
            if self._only_look:
                raise _Seen
            # tensors made in inference mode cannot be saved for a backward
            return program(*(a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args))

        return run

    def _tap_attention(self, gm: fx.GraphModule, site: Site) -> fx.Node:
        call, layer = site.call.with_one_mask(), site.layer
        assert layer is not None
        _, heads, _, head_dim = dynamo.example(site.key_root).shape
        self._shapes[layer] = (int(heads), int(head_dim))
        name = f"kvmix_attention_{layer}"
        gm.add_submodule(name, _TappedAttention(self, layer, call))
        with gm.graph.inserting_before(call.node):
            node = gm.graph.call_module(name, (call.query, *_attended(site), call.mask, call.sinks))
        node.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(node)
        for dead in (call.node, *call.inside):
            gm.graph.erase_node(dead)
        return node

    def _tap_projection(
        self,
        gm: fx.GraphModule,
        found: Projection,
        taps: dict[fx.Node, _ProjectionTap],
        place: tuple[int, str],
    ) -> _ProjectionTap:
        """One tap per linear layer."""
        tap = taps.get(found.node)
        if tap is None:
            tap = taps[found.node] = _ProjectionTap(self)
            name = f"kvmix_projection_{found.node.name}"
            gm.add_submodule(name, tap)
            with gm.graph.inserting_after(found.node):
                node = gm.graph.call_module(name, (found.node, found.input, found.weight))
            node.meta = dict(found.node.meta)
            found.node.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        layer, role = place
        tap.owners[role] = (layer, found)
        return tap


def _attended(site: Site) -> tuple[fx.Node, fx.Node]:
    """The keys and values that attention reads: all of them, also where a window keeps the last ones."""
    return heads_root(site.call.key), heads_root(site.call.value)


class _TappedAttention(nn.Module):
    """Attention of one site over far and near copies of its keys and values."""

    def __init__(self, observer: Observer, layer: int, call: AttentionCall) -> None:
        super().__init__()
        self._observer = [observer]  # in a list, so that the model below is no submodule of this one
        self._layer = layer
        self._is_causal = bool(call.is_causal)
        self._scale = call.scale
        self._softcap = call.softcap
        self._dropout_p = call.dropout_p

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Attention output [B, Hq, L, D]."""
        observer = self._observer[0]
        listeners = observer.listeners
        L = q.shape[2]
        if listeners.asked is not None and observer._recording:
            scale = default_scale(q.shape[3]) if self._scale is None else self._scale
            seen = mask if mask is not None or self._is_causal else _everything(q)
            scoring = Scoring(seen, scale, self._softcap or 0.0, sinks)
            listeners.asked(self._layer, q.detach(), k.detach(), scoring)
        k, v = (_leaf(x) if listeners.differentiate else x for x in (k, v))
        far = [self._far(role, x) for role, x in zip(ROLES, (k, v), strict=True)]
        if far[0] is None and far[1] is None:
            return self._attend(q, k, v, mask, self._is_causal, sinks)
        readers = observer.readers.get(self._layer)
        if readers is None:
            packed = near = _packed(L, observer._schedule, q.device)
        else:
            packed = readers.repeat_interleave(q.shape[1] // k.shape[1], 0)
            near = packed.unflatten(-1, (-1, L)).any(-2)
        if mask is None:
            mask = _everything(q).tril() if self._is_causal else _everything(q)
        far_mask = mask.repeat(*[1] * (mask.dim() - 1), packed.shape[-1] // L)
        if mask.dtype == torch.bool:
            both = torch.cat((far_mask & packed, mask & ~near), -1)
        else:
            both = torch.cat(
                (far_mask.masked_fill(~packed, -torch.inf), mask.masked_fill(near, -torch.inf)), -1
            )
        keys, values = (
            torch.cat((x if copy is None else copy, x), 2) for copy, x in zip(far, (k, v), strict=True)
        )
        return self._attend(q, keys, values, both, False, sinks)

    def _far(self, role: str, x: Tensor) -> Tensor | None:
        """The copy that packed tokens are read from; None if it makes no difference."""
        observer, listeners, layer = self._observer[0], self._observer[0].listeners, self._layer
        if listeners.cached is not None and observer._recording:
            listeners.cached(layer, role, x.detach())
        replaced = observer.replacements.get((layer, role))
        if replaced is not None:
            return (replaced if isinstance(replaced, Tensor) else replaced(x)).to(x.dtype)
        if listeners.gradient is None:
            return None
        far = x.view_as(x)
        if observer._recording:  # not when a checkpoint computes this again
            exact = x.detach()

            def hear(gradient: Tensor) -> None:
                if listeners.gradient is not None:
                    listeners.gradient(layer, role, exact, gradient.detach())

            far.register_hook(hear)
        return far

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, sinks: Tensor | None
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if self._softcap or sinks is not None:
            return _written_out(q, k, v, mask, self._scale, self._softcap, sinks)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self._dropout_p, is_causal=is_causal, scale=self._scale
        )


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with capped scores or a learned sink, which SDPA does not know; its mask is explicit."""
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return torch.softmax(scores, -1).to(v.dtype) @ v
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, column], 3), -1)[..., :-1].to(v.dtype) @ v


class _ProjectionTap(nn.Module):
    """Hands a projection's output through, and tells its gradient."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = [observer]
        self.owners: dict[str, tuple[int, Projection]] = {}
        self._weight: list[Tensor] = []

    def forward(self, y: Tensor, source: Tensor, weight: Tensor) -> Tensor:
        """`y` as it is."""
        observer = self._observer[0]
        self._weight = [weight]
        listeners = observer.listeners
        if listeners.projected is None:
            return y
        y = _leaf(y)
        if observer._recording:
            h = local(source.detach())

            def hear(gradient: Tensor) -> None:
                if listeners.projected is None:
                    return
                for role, (layer, projection) in self.owners.items():
                    columns = projection.columns.to(gradient.device)
                    whole = len(columns) == gradient.shape[-1]
                    g = gradient.detach() if whole else gradient.detach()[..., columns]
                    listeners.projected(layer, role, h, g)

            y.register_hook(hear)
        return y.view_as(y)

    def info(self, role: str) -> ProjectionInfo:
        """What signals may know of it."""
        _, projection = self.owners[role]

        def weight() -> Tensor:
            (stored,) = self._weight
            plain: Any = local(stored.detach())
            if hasattr(plain, "dequantize") and type(plain) not in (Tensor, nn.Parameter):
                plain = plain.dequantize()
            rows: Tensor = plain.float() if projection.out_first else plain.float().t()
            return rows[projection.columns.to(rows.device)]

        return ProjectionInfo(weight, projection.is_affine)


def _leaf(x: Tensor) -> Tensor:
    """`x`, or a copy that starts differentiation where nothing before it does."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _everything(q: Tensor) -> Tensor:
    """A mask that hides nothing, bool [L, L]."""
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)


def _packed(length: int, schedule: layout.TensorFormat, device: torch.device) -> Tensor:
    """Whether query t finds token j packed, bool [L, L]: the cache as it stood before t was read."""
    ends = torch.tensor([schedule.packed_end(t) for t in range(length)], device=device)
    tokens = torch.arange(length, device=device)
    return (tokens >= schedule.sink) & (tokens < ends[:, None])


def _plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's own forward, also if it has been compiled with `kvmix_fx.compile`."""
    state = vars(model).get("_kvmix")
    if state is None:
        return model.forward
    replaced = state.replaced.get("forward")
    forward: Callable[..., Any] = replaced if callable(replaced) else type(model).forward.__get__(model)
    return forward


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters and gradients on while the block runs; restored also on errors."""
    training = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in frozen:
            parameter.requires_grad_(True)


__all__ = ["ROLES", "Listeners", "Observer", "ProjectionInfo", "Scoring", "observing"]
