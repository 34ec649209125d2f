"""Several processes: joining them, FSDP2, and one norm over what is sharded and what is not."""

import os
import warnings

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from visionattn._world import World, choose_device, join

from .config import Config, UserError


def start(cfg: Config) -> World:
    """Joins the other processes that torchrun started, if any. Raises UserError."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = choose_device(cfg.device, UserError)
    if cfg.fsdp and "RANK" not in os.environ:
        raise UserError("fsdp=true shards over processes: start with torchrun --nproc-per-node=N -m ...")
    if size > 1 and not cfg.fsdp:
        raise UserError(f"{size} processes were started: several need fsdp=true.")
    if cfg.fsdp:
        return join(device, int(os.environ.get("LOCAL_RANK", 0)), rank, size, cfg.dist_timeout)
    return World(device, rank, size)


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


def clip_grad(groups: list[list[torch.Tensor]], limit: float) -> None:
    """Scales all gradients to a common norm of at most ``limit``. A group is sharded, or it is not."""
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, total)
