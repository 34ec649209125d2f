"""Position tables for another resolution, and the authors' files of another resolution under our models."""

import logging

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, to_2tuple
from torch import nn

from visionattn.layers.agent import LINE_AXIS, resize_lines
from visionattn.layers.window import resize_relative_table

from ._checkpoint import unwrap_state_dict

_logger = logging.getLogger(__name__)
_BUFFERS = ("attn_mask", "relative_position_index")


def checked_size(img_size: int | tuple[int, int], smallest: int = 1) -> tuple[int, int]:
    """An input size (height, width) that ``set_input_size`` can take.

    Raises:
        ValueError: for a side below ``smallest``; nothing of the model is changed then.
    """
    size = to_2tuple(img_size)
    if len(size) != 2 or min(size) < smallest:
        raise ValueError(f"img_size={img_size}: give a height and a width of at least {smallest} px")
    return size


@register_notrace_function
def resize_positions(
    table: torch.Tensor, old: tuple[int, int], height: int, width: int, num_prefix_tokens: int, mode: str
) -> torch.Tensor:
    """A table of positions (1, P + H * W, C) for another map; prefix tokens are kept.

    ``mode`` is ``'bicubic'`` as the authors load, ``'bilinear'`` as PVT does in passing.
    """
    if old[0] == height and old[1] == width:
        return table
    prefix, grid = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    C = table.shape[2]
    grid = grid.float().reshape(1, old[0], old[1], C).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=[height, width], mode=mode, align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([prefix, grid], dim=1) if num_prefix_tokens > 0 else grid


def _square(count: int) -> tuple[int, int]:
    side = int(count**0.5)
    if side * side != count:
        raise ValueError(f"a table of {count} positions is not a square one")
    return side, side


def _fit(name: str, value: torch.Tensor, target: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """``value`` in the shape of ``target``, as the authors' loader would make it; unchanged where it has no rule."""
    leaf = name.rpartition(".")[2]
    if leaf in LINE_AXIS and value.ndim == target.ndim:
        return resize_lines(leaf, value, target.shape[LINE_AXIS[leaf]])
    if leaf == "relative_position_bias_table":
        window = model.get_submodule(name.rpartition(".")[0]).window_size
        side = (int(value.shape[0] ** 0.5) + 1) // 2
        return resize_relative_table(value, (side, side), window)
    if leaf.startswith("pos_embed") and value.ndim == 3 and value.shape[2] == target.shape[2]:
        prefix = getattr(model, "num_prefix_tokens", 0)
        height, width = model.position_grid(leaf)
        return resize_positions(value, _square(value.shape[1] - prefix), height, width, prefix, "bicubic")
    if value.ndim == 4 and value.shape[:2] == target.shape[:2] and name.startswith("patch_embed"):
        return F.interpolate(value.float(), size=target.shape[2:], mode="bicubic", align_corners=False)
    if value.numel() == target.numel():
        return value.reshape(target.shape)  # 1 x 1 convolutions kept as linear layers, and the other way round
    return value


def _regroup_branches(state_dict: dict[str, torch.Tensor], targets: dict) -> dict[str, torch.Tensor]:
    """CSWin's stripes that cover the whole map: two branches of half the channels are one of all, and the other way."""
    state_dict = dict(state_dict)
    for name in [n for n in state_dict if ".attns.0.get_v." in n]:
        second = name.replace(".attns.0.", ".attns.1.")
        if name not in targets or (second in state_dict) == (second in targets):
            continue
        if second in state_dict:
            state_dict[name] = torch.cat([state_dict[name], state_dict.pop(second)])
        else:
            state_dict[name], state_dict[second] = state_dict[name].chunk(2)
    return state_dict


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' files under a host's names, which are theirs: wrappers opened, the buffers that are computed
    removed, tables of another resolution resized as their loader does."""
    state_dict = unwrap_state_dict(state_dict)
    targets = dict(model.named_parameters())
    state_dict = _regroup_branches(state_dict, targets)
    fitted = {}
    for name, value in state_dict.items():
        if name.rpartition(".")[2] in _BUFFERS:
            continue
        target = targets.get(name)
        if target is not None and value.shape != target.shape and not name.startswith("head."):
            value = _fit(name, value, target, model)
            if value.shape != target.shape and name.endswith("_bias") and "attn" in name:
                _logger.warning(
                    f"{name}: {tuple(value.shape)} in the file, {tuple(target.shape)} here (another agent_num "
                    "or number of heads): the model keeps its own"
                )
                value = target.detach().clone()
        fitted[name] = value
    # a classifier's file has no norm per output (dense prediction), and a detector's has no final norm
    dense = "head.weight" not in fitted
    for stage in ("0", "1", "2", "3", ""):
        for leaf in ("weight", "bias"):
            name = f"norm{stage}.{leaf}"
            if name in targets and name not in fitted and (dense or stage):
                fitted[name] = targets[name].detach().clone()
            elif name in fitted and name not in targets and stage:
                del fitted[name]
    return fitted
