"""Plans: how every layer's keys and values are kept. Imports neither torch nor a model library."""

from kvmix_fx.plan.geometry import LayerGeometry, ModelGeometry
from kvmix_fx.plan.presets import PRESETS, default_plan, preset
from kvmix_fx.plan.provenance import Provenance
from kvmix_fx.plan.schema import KVPlan, LayerPlan, QuantSpec, WindowRule
from kvmix_fx.plan.selection import LayerSelection, join_layers, select_layers
from kvmix_fx.plan.shipped import shipped_plans
from kvmix_fx.plan.token_tier import TokenTier

__all__ = [
    "PRESETS",
    "KVPlan",
    "LayerGeometry",
    "LayerPlan",
    "LayerSelection",
    "ModelGeometry",
    "Provenance",
    "QuantSpec",
    "TokenTier",
    "WindowRule",
    "default_plan",
    "join_layers",
    "preset",
    "select_layers",
    "shipped_plans",
]
