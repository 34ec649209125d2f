"""Parameters and multiply-adds of a detector at an image size, from its config alone: no weights, no data, no memory.

``python -m visionattn.detection.complexity configs/detection/agent_swin/*.py`` prints a row per config.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Complexity", "detector_complexity"]

PROPOSALS = 1000  # regions that a two-stage detector's box head is counted with, as mmdet 2.x did
MASKS = 100  # and its mask head


@dataclass(frozen=True)
class Complexity:
    """Counts of a detector.

    Attributes:
        params: number of parameters.
        macs: multiply-adds for one image: convolutions and matrix products, those of attention included. This is what
            papers print as FLOPs.
    """

    params: int
    macs: int


def detector_complexity(config: Any, size: tuple[int, int] = (1280, 800)) -> Complexity:
    """Counts a detector as the papers do: at 1280 x 800, box heads with 1000 regions, mask heads with 100.

    Args:
        config: an mmengine ``Config``, or the path of one.
        size: width and height of the image, pixels.

    Raises:
        ImportError: without mmdet (extra ``detection``).
        ValueError: for a detector that has neither a ``bbox_head`` nor a ``roi_head``.
    """
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from torch.utils.flop_counter import FlopCounterMode

    import visionattn.detection  # noqa: F401  registers the backbone; supplies mmcv's operators where they are missing

    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    with torch.device("meta"):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    model = model.to("meta")
    if not (hasattr(model, "bbox_head") or hasattr(model, "roi_head")):
        raise ValueError(f"{type(model).__name__} has neither bbox_head nor roi_head: it cannot be counted")
    params = sum(p.numel() for p in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _forward(model, torch.empty(1, 3, size[1], size[0], device="meta"))
    return Complexity(params, counter.get_total_flops() // 2)


def _forward(model: nn.Module, image: torch.Tensor) -> None:
    maps = model.extract_feat(image)
    if hasattr(model, "bbox_head"):
        model.bbox_head(maps)
        return
    if hasattr(model, "rpn_head"):
        model.rpn_head(maps)
    head = model.roi_head
    for box_head in _list(head.bbox_head):
        side = box_head.roi_feat_size
        box_head(maps[0].new_empty(PROPOSALS, maps[0].shape[1], *side))
    if head.with_mask:
        extractors = head.mask_roi_extractor
        for mask_head, extractor in zip(_list(head.mask_head), _list(extractors), strict=False):
            side = extractor.roi_layers[0].output_size
            mask_head(maps[0].new_empty(MASKS, maps[0].shape[1], *side))


def _list(module: nn.Module) -> Sequence[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="+", help="detection configs")
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 800), metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args(argv)
    print(f"{'params M':>9} {'GMACs':>8}  config")
    for path in args.configs:
        found = detector_complexity(path, tuple(args.size))
        print(f"{found.params / 1e6:9.2f} {found.macs / 1e9:8.1f}  {path}", flush=True)


if __name__ == "__main__":
    main()
