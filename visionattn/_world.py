"""Several processes: joining them, agreement between them, and whole tensors out of shards and back. For every room."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


@dataclass
class World:
    """Who this process is among ``size``; ``device`` is what it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def agree(self, flag: bool) -> bool:
        """True on every rank if it is on any. Goes through the CPU: no GPU queue waits for it."""
        if self.size == 1:
            return flag
        t = torch.tensor(int(flag))
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return bool(t)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The ranks' mean, on the CPU in float64."""
        values = values.detach().double().cpu()
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values


def choose_device(kind: str, error: type[Exception]) -> torch.device:
    """The device that an option ``device`` names; ``auto`` is a CUDA GPU where there is one.

    Raises:
        error: for a name that PyTorch does not know, or a GPU that is not there.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind
    try:
        device = torch.device(kind)
    except RuntimeError:
        raise error(f"device={kind!r} is no device of PyTorch: give auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise error(f"device={kind} was asked for, but PyTorch sees no CUDA GPU here: give auto or cpu.")
    return device


def join(device: torch.device, local_rank: int, rank: int, size: int, timeout: int) -> World:
    """Joins the other processes, which a launcher started; each takes its own GPU. ``timeout`` is in seconds."""
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # both kinds of tensors are exchanged: flags and objects never wait for a GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Slurm names them otherwise
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(size))
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return World(device, rank, size)


def stop() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def whole(tree: Any, keep: bool = True) -> Any:
    """The tree with sharded tensors made whole (a collective: every rank calls it), copied to the CPU.

    With ``keep=False`` the rank takes part and keeps None of each tensor: host memory holds one copy, not one a rank.
    """

    def gather(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        x = x.full_tensor() if isinstance(x, DTensor) else x
        return x.detach().to("cpu", copy=True) if keep else None

    return tree_map(gather, tree)


def like(value: Any, reference: torch.Tensor) -> Any:
    """A whole tensor sharded as the reference is, if that is sharded and of the same shape."""
    if isinstance(reference, DTensor) and isinstance(value, torch.Tensor) and value.shape == reference.shape:
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value
