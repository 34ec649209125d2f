"""Several processes: joining them, FSDP2, and whole tensors out of shards and back."""

import datetime
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from .config import Config, UserError


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
        """True on every rank if it is on any."""
        if self.size == 1:
            return flag
        t = torch.tensor(int(flag))
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return bool(t)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The ranks' mean, on the CPU in float64."""
        values = values.detach().double().cpu()
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values


def start(cfg: Config) -> World:
    """Joins the other processes that torchrun started, if any. Raises UserError."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    try:
        device = torch.device(kind)
    except RuntimeError:
        raise UserError(f"device={kind!r} is no device of PyTorch: give auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={kind} was asked for, but PyTorch sees no CUDA GPU here: give device=cpu or auto.")
    if cfg.fsdp and "RANK" not in os.environ:
        raise UserError("fsdp=true shards over processes: start with torchrun --nproc-per-node=N -m ...")
    if size > 1 and not cfg.fsdp:
        raise UserError(f"{size} processes were started: several need fsdp=true.")
    if cfg.fsdp:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=cfg.dist_timeout))
    return World(device, rank, size)


def stop() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, trained: list[nn.Module], world: World, dtype: torch.dtype) -> None:
    """FSDP2 in place: each trained projection by itself (kept in float32), then the blocks, then the rest.

    Weights are gathered in ``dtype`` and gradients reduced in float32. Inputs keep their types: rotary tables in 16
    bits would lose the far positions.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FLUX.1's blocks return views, and nothing writes into them, which is what this warns of
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for module in [*trained, *blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


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


def clip_grad(groups: list[list[torch.Tensor]], limit: float) -> None:
    """Scales all gradients to a common norm of at most ``limit``. A group is sharded, or it is not."""
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, total)
