"""Several processes: start, wrap (DDP or FSDP2), load whole tensors into what is sharded.

A checkpoint holds whole tensors, whatever wrote it; so one written by FSDP loads anywhere.
"""

import os
import warnings
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from timm.utils import distribute_bn, unwrap_model, world_info_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from visionattn._world import World, choose_device, join, like

from .config import Config, UserError

SHARD_MIN = 100_000  # parameters; smaller blocks are sharded with what contains them


def start(cfg: Config) -> World:
    """Join the other processes that torchrun (or Slurm) started, if any. Raises UserError."""
    local_rank, rank, size = world_info_from_env()
    device = choose_device(cfg.device, UserError)
    if cfg.fsdp and "RANK" not in os.environ:
        raise UserError("fsdp shards over processes: start with torchrun --nproc-per-node=N train.py --fsdp ...")
    world = World(device, rank, size)
    if size > 1 or cfg.fsdp:
        world = join(device, local_rank, rank, size, cfg.dist_timeout)
    if cfg.sync_bn and (device.type != "cuda" or size == 1):
        raise UserError("sync_bn needs several ranks on CUDA GPUs (PyTorch's SyncBatchNorm has no CPU kernel).")
    return world


def sync_batchnorm(model: nn.Module, cfg: Config) -> nn.Module:
    return convert_sync_batchnorm(model) if cfg.sync_bn else model


def shard(module: nn.Module, world: World) -> None:
    """FSDP2 in place: blocks inside lists and sequences first, what is left at the root."""
    from torch.distributed.fsdp import fully_shard

    # Weights are gathered in float32 and autocast does the rest: the same numbers as DDP, for more traffic.
    mesh = init_device_mesh(world.device.type, (world.size,))
    done: set[int] = set()
    for parent in reversed(list(module.modules())):
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for child in parent:
                if isinstance(child, nn.ModuleList):  # has no forward for FSDP to hook
                    continue
                own = [p for p in child.parameters() if id(p) not in done]
                if sum(p.numel() for p in own) >= SHARD_MIN:
                    fully_shard(child, mesh=mesh)
                    done.update(id(p) for p in child.parameters())
    fully_shard(module, mesh=mesh)


def wrap_ddp(task: TrainingTask, cfg: Config, world: World) -> None:
    """DDP around the trained part. BatchNorm buffers follow rank 0 at each step, unless dist_bn says otherwise."""
    ids = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():  # newer releases rename the argument; the oldest one supported has this name only
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        task.prepare_distributed(device_ids=ids, broadcast_buffers=cfg.dist_bn == "broadcast")


def share_batchnorm(modules: list[nn.Module], cfg: Config, world: World) -> None:
    """One set of BatchNorm statistics for all ranks, before they are evaluated or saved."""
    if world.size > 1 and cfg.dist_bn != "none":
        for module in modules:
            distribute_bn(module, world.size, reduce=cfg.dist_bn == "reduce")


def load_module(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """``load_state_dict`` of whole tensors into a module that may be wrapped or sharded."""
    module = unwrap_model(module)
    own = module.state_dict()
    module.load_state_dict({k: like(v, own[k]) if k in own else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``load_state_dict`` of whole tensors into an optimizer whose parameters may be sharded."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {i: {k: like(v, params[i]) for k, v in s.items()} for i, s in state["state"].items()}
    optimizer.load_state_dict({**state, "state": sharded})
