"""Models on several devices: what tensor parallelism leaves to a rank, and what cannot be compiled.

Under tensor parallelism every rank holds whole heads of every layer, keeps the cache of its own and
communicates nothing of it; plans are per layer and so the same on every rank. Only what is counted or
measured over all heads needs the other ranks: `Ranks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvmix_fx.errors import PlacementError, PlanGeometryError
from kvmix_fx.plan import ModelGeometry

_Head = TypeVar("_Head")

_TENSOR_PARALLEL = (
    "use tensor parallelism instead, where every device holds a share of every layer: start N processes "
    "with `torchrun --nproc-per-node N` and load the model with "
    "from_pretrained(..., distributed_config=DistributedConfig(tp_size=N))"
)


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model's heads, and this one's place among them.

    Attributes:
        size: how many; 1 for a model that is whole.
        rank: which of them this is.
        group: their process group; None for a model that is whole.
    """

    size: int = 1
    rank: int = 0
    group: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those among which the heads of `model` are shared out."""
        parameters: dict[str, Any] = dict(model.named_parameters())
        for name, sharded in parameters.items():
            if is_distributed(sharded) and "att" in name.lower():
                mesh = sharded.device_mesh
                for dim, placement in enumerate(sharded.placements):
                    if placement.is_shard():
                        return cls(mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim))
        return cls()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, on every rank."""
        if self.size == 1:
            return x
        x = x.clone()
        torch.distributed.all_reduce(x, group=self.group)
        return x

    def cat(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's `x`, all of one shape, one after another along `dim`."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def first(self, x: Tensor) -> Tensor:
        """The first rank's `x`, on every rank."""
        if self.size > 1:
            torch.distributed.broadcast(x, group=self.group, group_src=0)
        return x


def is_distributed(x: object) -> bool:
    """Whether `x` is a DTensor, of which this process may hold a part."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    part: Any = x
    return part.to_local() if is_distributed(x) else x  # type: ignore[no-any-return]


def kv_heads_here(model: nn.Module, heads: int) -> int:
    """KV heads that this rank keeps of a layer which has so many.

    Raises:
        HeadSplitError: they cannot be shared out evenly.
    """
    return ModelGeometry.shared_out(heads, Ranks.of(model).size)


def own_heads(heads: Sequence[_Head], count: int) -> Sequence[_Head]:
    """Of what a plan has for every KV head of a model, that of the `count` heads which this process holds.

    Ranks of tensor parallelism hold heads one after another, and lie side by side in the process group.
    """
    ranks, rest = divmod(len(heads), count)
    if rest or not 1 < ranks <= process_group_size():
        return heads
    first = torch.distributed.get_rank() % ranks * count
    return heads[first : first + count]


def process_group_size() -> int:
    """Processes in the default process group; 1 without one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def tells_of_end() -> bool:
    """Whether this torch says before it destroys the default process group."""
    world: Any = getattr(torch.distributed.distributed_c10d, "_world", None)
    return isinstance(getattr(world, "comms", None), list)


def before_groups_end(callback: Callable[[], None]) -> None:
    """Have `callback` called, once, before the default process group is destroyed; see `tells_of_end`."""
    if tells_of_end():
        comms: list[Any] = torch.distributed.distributed_c10d._world.comms
        if not any(isinstance(comm, _Ending) and comm.finalize is callback for comm in comms):
            comms.append(_Ending(callback))


@dataclass(frozen=True)
class _Ending:
    """Stands among the communicators that torch finalizes first."""

    finalize: Callable[[], None]


def check_placement(model: nn.Module) -> None:
    """Refuse a model that lies on devices in a way that compiled steps cannot follow.

    Raises:
        HeadSplitError: tensor parallelism over a number of ranks that the KV heads do not divide by; the
            model's own forward would fail too.
        PlacementError: layers on several devices, offloaded weights, hooks that move tensors between
            devices, or another kind of parallelism than over heads.
    """
    _check_device_map(model)
    _check_parallelism(model)
    try:
        geometry = ModelGeometry.of(model)
    except PlanGeometryError:
        return  # head counts that differ or are not known are checked by those who need them
    for heads in {geometry.layer(index).num_kv_heads for index in range(geometry.num_layers)}:
        kv_heads_here(model, heads)


def _check_device_map(model: nn.Module) -> None:
    places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(places) > 1:
        offloaded = [place for place in places if place in ("cpu", "disk")]
        where = " and ".join(places)
        if offloaded:
            raise PlacementError(
                f"device_map put this model on {where}: weights that are offloaded to {offloaded[0]} are "
                "fetched in every step by hooks, which cannot be compiled. Load it on one device "
                f"(device_map=0), in fewer bits if it does not fit, or {_TENSOR_PARALLEL}"
            )
        raise PlacementError(
            f"device_map put the layers of this model on {where}, one after another, with hooks between "
            f"them that cannot be compiled: {_TENSOR_PARALLEL}"
        )
    hooks = list(_accelerate_hooks(model))
    if any(getattr(hook, "offload", False) for hook in hooks):
        raise PlacementError(
            "weights of this model are offloaded and fetched in every step by hooks of accelerate, which "
            "cannot be compiled: load it on one device (device_map=0), in fewer bits if it does not fit, "
            f"or {_TENSOR_PARALLEL}"
        )
    if hooks:
        raise PlacementError(
            "hooks of accelerate move this model's inputs between devices, which cannot be compiled: "
            "remove them with accelerate.hooks.remove_hook_from_submodules(model) if the whole model is "
            f"on one device, or {_TENSOR_PARALLEL}"
        )


def _accelerate_hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            yield from getattr(hook, "hooks", (hook,))


def _check_parallelism(model: nn.Module) -> None:
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    for name, size in (("FSDP", "fsdp_size"), ("pipeline parallelism", "pp_size")):
        if (getattr(config, size, None) or 1) > 1:
            raise PlacementError(
                f"this model is distributed by {name} ({size}={getattr(config, size)}), which compiled steps "
                f"cannot follow: {_TENSOR_PARALLEL}"
            )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()):
        raise PlacementError(
            f"this model is sharded by FSDP, which gathers weights in hooks around every layer: "
            f"{_TENSOR_PARALLEL}"
        )
