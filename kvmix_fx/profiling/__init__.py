"""Profiling: how much each layer's keys and values suffer from quantization, measured on the model."""

from kvmix_fx.profiling.orders import channel_orders
from kvmix_fx.profiling.report import Profile
from kvmix_fx.profiling.run import DEFAULT_SIGNALS, profile
from kvmix_fx.profiling.shares import choose_shares

__all__ = ["DEFAULT_SIGNALS", "Profile", "channel_orders", "choose_shares", "profile"]
