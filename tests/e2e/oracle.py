"""The simulated cache, taught about padding, crops and reordering."""

from __future__ import annotations

import torch

from kvmix_fx.testing.simulate import SimulatedCache, SimulatedLayer
from kvmix_kernels import layout


class OracleLayer(SimulatedLayer):
    """valid: bool [B, at least the length], padding is False; None for no padding."""

    valid = None

    def _flush(self, head_dim):
        formats = self.layer_plan.formats(head_dim)
        due = formats[0].packed_tiles(self.get_seq_length())
        if due <= self.flushed_tiles:
            return
        fmt = formats[0]
        tokens = slice(fmt.sink + self.flushed_tiles * fmt.tile, fmt.sink + due * fmt.tile)
        for tensor, f in ((self.keys, formats[0]), (self.values, formats[1])):
            tensor[:, :, tokens] = self._round(tensor[:, :, tokens], f, tokens)
        self.flushed_tiles = due

    def _round(self, x, fmt, tokens):
        B, H, L, D = x.shape
        along_tokens = fmt.axis == layout.AXIS_CHANNEL
        shape = (
            (B, H, L // fmt.group_size, fmt.group_size, D) if along_tokens else (B, H, L, -1, fmt.group_size)
        )
        grouped = x.reshape(shape)
        low = high = grouped
        if self.valid is not None and along_tokens:
            hidden = ~self.valid[:, tokens].to(x.device).reshape(B, 1, L // fmt.group_size, fmt.group_size, 1)
            low, high = grouped.masked_fill(hidden, 1e30), grouped.masked_fill(hidden, -1e30)
        dim = 3 if along_tokens else 4
        low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
        empty = low > high
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        step = ((high - low) / (2**fmt.bits - 1)).half().float()
        low = low.half().float()
        codes = ((grouped - low) / step).round().clamp(0, 2**fmt.bits - 1).nan_to_num(0)
        return (codes * step + low).reshape(B, H, L, D)


class OracleCache(SimulatedCache):
    def __init__(self, plan, valid=None):
        super(SimulatedCache, self).__init__(layers=[OracleLayer(layer) for layer in plan.layers])
        for layer in self.layers:
            layer.valid = valid

    def activate_past_recording(self):
        pass


def worst(a, b):
    return max((x.float() - y.float()).abs().max().item() for x, y in zip(a, b, strict=True))


def steps(model, ids, prompt, past=None, mask=None, **kwargs):
    """Teacher-forced: prefill `prompt` tokens, then one by one. Logits per decode step, and the cache."""
    logits = []
    kwargs = dict(kwargs, use_cache=True)
    with torch.no_grad():
        extra = {} if mask is None else {"attention_mask": mask[:, :prompt]}
        out = model(ids[:, :prompt], past_key_values=past, **extra, **kwargs)
        past = out.past_key_values
        for i in range(prompt, ids.shape[1]):
            extra = {} if mask is None else {"attention_mask": mask[:, : i + 1]}
            out = model(ids[:, i : i + 1], past_key_values=past, **extra, **kwargs)
            logits.append(out.logits[:, -1])
    return logits, past
