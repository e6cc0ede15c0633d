"""Evaluation: how far a packed cache moves a model's predictions."""

from kvmix_fx.evaluation.figures import Evaluation, Figure
from kvmix_fx.evaluation.run import evaluate

__all__ = ["Evaluation", "Figure", "evaluate"]
