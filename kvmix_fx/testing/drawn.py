"""Small decoder models that nobody wrote: every part drawn from the ways in which models are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 32

CHOICES: dict[str, tuple[Any, ...]] = {
    "layers": (1, 2),
    "heads": ((4, 2), (2, 2), (4, 1)),
    "norm": ("none", "layer", "rms", "sandwich"),
    "key_norm": (False, True),
    "rotary": ("none", "half", "interleaved", "partial", "added"),
    "projection": ("fused", "apart", "chunks", "by head"),
    "repeat": ("expand", "unsqueeze", "repeat_interleave", "enable_gqa", "grouped query", "index"),
    "attention": ("sdpa", "sdpa", "matmul", "operators", "einsum"),
    "scale": (None, 0.25),
    "softcap": (0.0, 0.0, 2.0),
    "sink": (False, False, True),
    "mask": ("bool", "additive", "rows", "causal"),
    "cache": ("cat", "cat list", "index_copy_", "setitem", "slice"),
    "view": ("none", "contiguous", "twice transposed", "reshaped", "cast", "scaled"),
    "consumer": (
        "none",
        "none",
        "sum of keys",
        "mean of values",
        "last key",
        "weights",
        "all values",
        "past before",
        "past after",
    ),
}
"""What the fields of a `Spec` can be. Softcap and sink are taken only where scores are written out."""


@dataclass(frozen=True)
class Spec:
    """How a model is written; one of `CHOICES` for each field."""

    layers: int = 1
    heads: tuple[int, int] = (4, 2)
    norm: str = "none"
    key_norm: bool = False
    rotary: str = "none"
    projection: str = "fused"
    repeat: str = "expand"
    attention: str = "sdpa"
    scale: float | None = None
    softcap: float = 0.0
    sink: bool = False
    mask: str = "bool"
    cache: str = "cat"
    view: str = "none"
    consumer: str = "none"

    @property
    def fixed(self) -> bool:
        """Whether its caches have a capacity and are written by position."""
        return self.cache in ("index_copy_", "setitem", "slice")


class DrawnLayer(nn.Module):
    """Attention of one layer, written as a spec says."""

    def __init__(self, spec: Spec) -> None:
        """Random weights, sharp enough that a damaged cache shows."""
        super().__init__()
        self.spec = spec
        query_heads, heads = spec.heads
        self.query_heads, self.kv_heads, self.width = query_heads, heads, query_heads * HEAD_DIM
        sizes = [query_heads * HEAD_DIM, heads * HEAD_DIM, heads * HEAD_DIM]
        self.sizes = sizes
        if spec.projection == "apart":
            self.q, self.k, self.v = (nn.Linear(self.width, size) for size in sizes)
        else:
            self.qkv = nn.Linear(self.width, sum(sizes))
        self.out = nn.Linear(self.width, self.width)
        self.before, self.after = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.sink = nn.Parameter(torch.linspace(-1, 1, query_heads))
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2 and name != "out.weight":
                parameter.data.mul_(3)

    def _project(self, x: Tensor) -> list[Tensor]:
        B, L, _ = x.shape
        match self.spec.projection:
            case "apart":
                parts: Any = (self.q(x), self.k(x), self.v(x))
            case "chunks":
                both = self.qkv(x)
                parts = (both[..., : self.sizes[0]], *both[..., self.sizes[0] :].chunk(2, -1))
            case "by head":
                split = self.qkv(x).view(B, L, -1, HEAD_DIM).permute(0, 2, 1, 3)
                return list(split.split([self.query_heads, self.kv_heads, self.kv_heads], 1))
            case _:
                parts = self.qkv(x).split(self.sizes, -1)
        return [p.reshape(B, L, -1, HEAD_DIM).transpose(1, 2) for p in parts]

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        kind = self.spec.rotary
        if kind in ("none", "added"):
            return x
        n = HEAD_DIM // 2 if kind == "partial" else HEAD_DIM
        angle = positions[:, None].to(x.dtype) * 100.0 ** (-torch.arange(0, n, 2).to(x.dtype) / n)
        if kind == "interleaved":
            even, odd = x[..., 0::2], x[..., 1::2]
            cos, sin = angle.cos(), angle.sin()
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        turned, rest = x[..., :n], x[..., n:]
        first, second = turned.chunk(2, -1)
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        turned = turned * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([turned, rest], -1) if n < HEAD_DIM else turned

    def _view(self, x: Tensor) -> Tensor:
        B, H, L, D = x.shape
        match self.spec.view:
            case "contiguous":
                return x.contiguous()
            case "twice transposed":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            case "reshaped":
                return x.reshape(B * H, L, D).view(B, H, L, D)
            case "cast":
                return x.to(torch.float64).to(x.dtype)
            case "scaled":
                return x * 0.5
            case _:
                return x

    def _store(self, past: Any, new: Tensor, positions: Tensor, start: int) -> Tensor:
        n = new.shape[2]
        match self.spec.cache:
            case "index_copy_":
                past.index_copy_(2, positions, new)
            case "setitem":
                past[:, :, positions] = new
            case "slice":
                past[:, :, start : start + n] = new
            case "cat list":
                return new if past is None else torch.cat([past, new], -2)
            case _:
                return new if past is None else torch.cat((past, new), dim=2)
        return past

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spec, group = self.spec, self.query_heads // self.kv_heads
        B, H, S, D = k.shape
        L = q.shape[2]
        scale = spec.scale if spec.scale is not None else D**-0.5
        options: dict[str, Any] = {} if spec.scale is None else {"scale": spec.scale}
        if spec.repeat == "expand":
            k, v = (t[:, :, None].expand(B, H, group, S, D).reshape(B, H * group, S, D) for t in (k, v))
        elif spec.repeat == "unsqueeze":
            k, v = (t.unsqueeze(2).expand(B, H, group, S, D).flatten(1, 2) for t in (k, v))
        elif spec.repeat == "repeat_interleave":
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        elif spec.repeat == "index":
            heads = torch.arange(H * group) // group
            k, v = (t[:, heads] for t in (k, v))
        elif spec.attention == "sdpa" and spec.repeat == "enable_gqa":
            options["enable_gqa"] = True
        else:
            # the heads of a group as rows of one product
            q = q.reshape(B, H, group * L, D)
            if mask is not None:
                mask = mask.expand(B, 1, L, S).repeat(1, 1, group, 1)
        if spec.attention == "sdpa":
            causal = mask is None and L > 1
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **options)
            return out.reshape(B, self.query_heads, L, D), None
        if spec.attention == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        elif spec.attention == "operators":
            scores = (q * scale) @ k.mT
        else:
            scores = torch.matmul(q, k.transpose(2, 3)) * scale
        if spec.softcap:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else scores + mask
        if spec.sink:
            rows = self.sink.view(self.query_heads, 1).expand(-1, L).reshape(1, scores.shape[1], -1, 1)
            together = torch.cat([scores, rows.expand(B, -1, -1, -1)], -1)
            weights = torch.softmax(together, -1)[..., :-1]
        else:
            weights = torch.softmax(scores, -1)
        out = weights @ v if spec.attention != "einsum" else torch.einsum("bhqk,bhkd->bhqd", weights, v)
        return out.reshape(B, self.query_heads, L, D), weights

    def forward(
        self, x: Tensor, past: Any, positions: Tensor, start: int, mask: Tensor | None
    ) -> tuple[Tensor, Any]:
        """X [B, L, width] at `positions`, of which the first is `start`; the new cache."""
        spec = self.spec
        B, L, _ = x.shape
        match spec.norm:
            case "layer" | "sandwich":
                y = self.before(x)
            case "rms":
                y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.before.weight
            case _:
                y = x
        q, k, v = self._project(y)
        if spec.key_norm:
            q, k = (F.layer_norm(t, (HEAD_DIM,)) * 2 for t in (q, k))
        q, k = self._turn(q, positions), self._turn(k, positions)
        k, v = self._view(k), self._view(v)
        past_k, past_v = past if past is not None else (None, None)
        if spec.consumer == "past before" and past_v is not None:
            y = past_v.mean((1, 2)).sum(-1)[:, None, None] * 0.1
        full_k, full_v = (
            self._store(past_k, k, positions, start),
            self._store(past_v, v, positions, start),
        )
        out, weights = self._attend(q, full_k, full_v, mask)
        out = self.out(out.transpose(1, 2).reshape(B, L, -1))
        match spec.consumer:
            case "sum of keys":
                out = out + k.sum((1, 2)).mean(-1)[:, None, None]
            case "mean of values":
                out = out + v.mean(1).repeat(1, 1, self.query_heads)
            case "last key":
                out = out * torch.sigmoid(k[:, :, -1:].mean((1, 3), keepdim=True)[:, 0])
            case "weights" if weights is not None:
                out = out + weights.amax(-1).mean(1)[:, :L, None]
            case "past before" if past_v is not None:
                out = out + y
            case "past after" if past_v is not None:
                out = out + past_v.mean((1, 2)).sum(-1)[:, None, None] * 0.1
            case "all values":
                out = out + full_v.mean((1, 2)).sum(-1)[:, None, None] * 0.1
        if spec.norm == "sandwich":
            out = self.after(out)
        return x + out, (full_k, full_v)


class DrawnModel(nn.Module):
    """A decoder of `DrawnLayer`: forward(x, past, positions, start, mask) -> (logits, past)."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        """Random weights."""
        super().__init__()
        torch.manual_seed(seed)
        self.spec = spec
        self.layers = nn.ModuleList(DrawnLayer(spec) for _ in range(spec.layers))
        self.places = nn.Embedding(256, spec.heads[0] * HEAD_DIM)
        self.head = nn.Linear(spec.heads[0] * HEAD_DIM, 40)

    def forward(self, x: Tensor, past: Any, positions: Tensor, start: int, mask: Tensor | None) -> Any:
        """X [B, L, width] at `positions`, of which the first is `start`; `past` as returned, or None."""
        if self.spec.rotary == "added":
            x = x + self.places(positions)
        present = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, None if past is None else past[i], positions, start, mask)
            present.append(kv)
        return self.head(x), present
