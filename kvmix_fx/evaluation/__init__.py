"""Evaluation: how far a packed cache moves a model's predictions, and what is found again in it."""

from kvmix_fx.evaluation.figures import Evaluation, Figure
from kvmix_fx.evaluation.likelihood import Continuation, Likelihood, log_likelihoods
from kvmix_fx.evaluation.retrieval import Retrieval, Score, plot_retrieval, retrieve
from kvmix_fx.evaluation.run import evaluate
from kvmix_fx.evaluation.tasks import TASKS, Sample, make_sample

__all__ = [
    "TASKS",
    "Continuation",
    "Evaluation",
    "Figure",
    "Likelihood",
    "Retrieval",
    "Sample",
    "Score",
    "evaluate",
    "log_likelihoods",
    "make_sample",
    "plot_retrieval",
    "retrieve",
]
