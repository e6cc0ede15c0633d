"""Every error of the project, one class per mistake; each message says what to do next.

All derive from `KVMixError` and from the builtin a caller would expect. Errors about packed storage
are defined beside it, in `kvmix_kernels.errors`, and offered here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmix_kernels.errors import (
    CacheShapeError,
    CapacityError,
    FormatError,
    HeadSizeError,
    KernelMemoryError,
    KVMixError,
    TuningFileError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AllocatorError",
    "BackendOptionError",
    "BudgetError",
    "CacheMutationError",
    "CacheShapeError",
    "CacheSharedError",
    "CacheStateError",
    "CacheVersionError",
    "CalibrationError",
    "CapacityError",
    "CommandError",
    "DequantizeWarning",
    "EvaluationError",
    "FormatError",
    "GraphBreakWarning",
    "HeadSizeError",
    "HeadSplitError",
    "KVMixError",
    "KernelMemoryError",
    "MissingPackageError",
    "ModelInputError",
    "NarrowScalesError",
    "NarrowScalesWarning",
    "NoSiteError",
    "PlacementError",
    "PlainCacheWarning",
    "PlanError",
    "PlanFieldError",
    "PlanFileError",
    "PlanGeometryError",
    "PlanLayerError",
    "PlanMismatchError",
    "PlanVersionError",
    "PoolError",
    "PresetError",
    "ProfileError",
    "ProfileFileError",
    "ProfileMismatchError",
    "RangeWarning",
    "RequestLengthError",
    "RewriteInvariantError",
    "ServingError",
    "SignalError",
    "SignalUnavailable",
    "TokenTierError",
    "TrainingError",
    "TuningFileError",
]


class PlanError(KVMixError, ValueError):
    """Base of the mistakes that concern a plan."""


class PlanFieldError(PlanError):
    """One field of a plan has a wrong type or a value outside its choices.

    Attributes:
        field: name of that field, as in the constructor it was given to.
    """

    def __init__(self, message: str, field: str = "") -> None:
        """Keep the field beside the message."""
        super().__init__(message)
        self.field = field


class PlanLayerError(PlanError):
    """A layer that the plan or the model does not have, or two layer counts that differ."""


class PlanFileError(PlanError):
    """A plan file that cannot be read: missing, damaged, or with an entry that means nothing here."""


class PlanVersionError(PlanFileError):
    """A plan file in a newer format than this version of the package reads."""


class PlanGeometryError(PlanError):
    """The head count or head size is needed and unknown, or cannot be taken from the model."""


class PlanMismatchError(PlanError):
    """A cache made under one plan was handed to a model compiled with another."""


class BudgetError(PlanError):
    """A budget that means nothing, that no plan of the menu meets, or that an unquantized cache meets."""


class AllocatorError(PlanError):
    """An allocator that does not exist, or options it does not take."""


class PresetError(PlanError):
    """A preset that does not exist, or arguments it does not take."""


class CalibrationError(KVMixError, ValueError):
    """Calibration text that cannot be read, is too short, or on which the model's loss is not finite."""


class EvaluationError(KVMixError, ValueError):
    """Nothing to evaluate on, or to compare with: a text too short, sizes or tasks that make no sense."""


class SignalError(KVMixError, ValueError):
    """A profiling signal that does not exist, or that a profile does not hold."""


class SignalUnavailable(SignalError):  # noqa: N818 - says what it is, like StopIteration
    """This model does not tell what the signal needs; the others still work."""


class ProfileError(KVMixError, RuntimeError):
    """A model whose cache can be packed but not profiled: its outputs or layers have no known form."""


class ProfileFileError(KVMixError, ValueError):
    """A profile file that cannot be read: missing, damaged, or of a newer version."""


class ProfileMismatchError(KVMixError, ValueError):
    """A profile of one model is used with another."""


class NoSiteError(KVMixError, RuntimeError):
    """Nothing in the model was rewritten, so its cache would stay at 16 bits."""


class RewriteInvariantError(KVMixError, AssertionError):
    """The rewrite produced a graph that cannot be right: a defect of this project, so please report it."""


class HeadSplitError(KVMixError, ValueError):
    """Key/value heads that tensor parallelism cannot share out evenly among its ranks."""


class PlacementError(KVMixError, ValueError):
    """A model spread over devices in a way that one compiled step cannot follow."""


class TrainingError(KVMixError, RuntimeError):
    """Gradients, training mode or attention dropout where only inference is supported."""


class BackendOptionError(KVMixError, ValueError):
    """An option of `compile` or of its backend that is unknown, missing or of a wrong type."""


class CacheMutationError(KVMixError, TypeError):
    """An in-place operation that a packed cache does not support."""


class TokenTierError(KVMixError, TypeError):
    """Tokens would enter a cache with a high tier in a way that does not tell which of them matter."""


class CacheSharedError(KVMixError, RuntimeError):
    """Two threads use one cache at the same time."""


class CacheStateError(KVMixError, ValueError):
    """What was saved as a packed tensor is none: something is missing, or does not fit the rest."""


class CacheVersionError(KVMixError, ValueError):
    """A saved cache whose packed layout is not the one that this version of the package reads."""


class ModelInputError(KVMixError, ValueError):
    """Inputs that hold no tokens: an empty batch or a prompt of length zero."""


class CommandError(KVMixError, ValueError):
    """Something named on the command line that cannot be used: a model, a device, a place to write to."""


class ServingError(KVMixError, ValueError):
    """Something of a model, a plan or an option does not go with continuous batching over packed pages."""


class PoolError(KVMixError, MemoryError):
    """A pool of pages is too small for any request, or there is no memory for one."""


class RequestLengthError(KVMixError, ValueError):
    """A request that its pool of pages could never hold."""


class MissingPackageError(KVMixError, ImportError):
    """An optional package is needed here and is not installed."""

    @classmethod
    def for_extra(cls, package: str, extra: str, purpose: str) -> MissingPackageError:
        """Name the package, what it is needed for, and the extra that installs it."""
        return cls(f'{purpose} needs {package}, which is not installed: pip install "kvmix-fx[{extra}]"')


class DequantizeWarning(UserWarning):
    """An operation unpacked a whole packed cache because it is not defined on packed data."""


class GraphBreakWarning(UserWarning):
    """A model that cannot be traced as one graph is compiled in pieces, which makes its steps slower."""


class NarrowScalesError(KVMixError, ValueError):
    """Keys or values are outside the range of the scales planned for them.

    found: layer, 0 for keys and 1 for values, and the largest element, of each such tensor. A compiled model
    that raises it is traced anew with wider scales.
    """

    def __init__(self, message: str, found: Sequence[tuple[int | None, int, float]] = ()) -> None:
        """Keep the tensors beside the message."""
        super().__init__(message)
        self.found = list(found)

    @classmethod
    def of(cls, found: Sequence[tuple[int | None, int, float]]) -> NarrowScalesError:
        """Name the tensors."""
        names = ", ".join(
            f"{('keys', 'values')[role]} of layer {layer} (up to {peak:.3g})" for layer, role, peak in found
        )
        return cls(
            f"scales of half precision do not have the range of {names}: give these tensors "
            'scale_dtype="float32" in the plan',
            found,
        )


class NarrowScalesWarning(UserWarning):
    """Scales got another dtype than planned, or should have."""


class PlainCacheWarning(UserWarning):
    """A call of a compiled model returned a plain cache, for gradients were on."""


class RangeWarning(UserWarning):
    """A plan cuts off part of the range of values that are not rotated, which loses more than it saves."""
