"""Parameters and multiply-adds of a detector or segmentor, from its config alone: no weights, no data, no memory.

``python -m visionattn.detection.complexity configs/detection/agent_swin/*.py`` prints a row per config.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionattn._meta import NoInit, NoResize

__all__ = ["Complexity", "detector_complexity"]

DETECTION, SEGMENTATION = (1280, 800), (2048, 512)  # images that papers count with: width, height
PROPOSALS = 1000  # regions that a two-stage detector's box head is counted with, as mmdet 2.x did
MASKS = 100  # and its mask head


@dataclass(frozen=True)
class Complexity:
    """Counts of a detector or segmentor.

    Attributes:
        params: number of parameters.
        macs: multiply-adds for one image: convolutions and matrix products, those of attention included as the
            implementation on a CPU does them. Papers print such numbers as FLOPs.
        weight_macs: those of convolutions and linear layers alone, which is what mmdet 2.x's counter saw of a backbone
            whose attention is an operator of its own.
    """

    params: int
    macs: int
    weight_macs: int

    def __add__(self, other: Complexity) -> Complexity:
        return Complexity(self.params + other.params, self.macs + other.macs, self.weight_macs + other.weight_macs)


class _NoBackbone(nn.Module):
    """Takes a backbone's place in a detector whose backbone is counted apart."""


def detector_complexity(config: Any, size: tuple[int, int] | None = None) -> Complexity:
    """Counts a detector as the papers do: at 1280 x 800, box heads with 1000 regions, mask heads with 100.

    mmsegmentation's segmentors are counted at 2048 x 512, as papers count them for ADE20K: without the auxiliary head,
    whose parameters are counted. A backbone that several configs share is counted once in a process.

    Args:
        config: an mmengine ``Config``, or the path of one.
        size: width and height of the image, pixels; the papers' where None.

    Raises:
        ImportError: without mmdet (extra ``detection``), or mmsegmentation for its configs.
        ValueError: for a model that has none of ``bbox_head``, ``roi_head`` and ``decode_head``.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    cfg = config if isinstance(config, Config) else Config.fromfile(config)
    scope = cfg.get("default_scope", "mmdet")
    init_default_scope(scope)
    parts = copy.deepcopy(cfg.model)
    backbone = parts.backbone.to_dict()
    backbone.pop("init_cfg", None)
    if str(backbone["type"]).startswith("visionattn."):
        backbone["drop_path_rate"] = 0.0  # changes no count
    if size is None:
        size = SEGMENTATION if "decode_head" in parts else DETECTION
    counted, shapes = _backbone(json.dumps(backbone, sort_keys=True), scope, size)

    parts.backbone = dict(type=_NoBackbone)
    model = _build(parts, scope)
    if not any(hasattr(model, head) for head in ("bbox_head", "roi_head", "decode_head")):
        raise ValueError(
            f"{type(model).__name__} has neither bbox_head nor roi_head nor decode_head: it cannot be counted"
        )
    maps = tuple(torch.empty(shape, device="meta") for shape in shapes)
    return counted + _count(model, lambda: _forward(model, maps))


@functools.lru_cache(maxsize=64)
def _backbone(text: str, scope: str, size: tuple[int, int]) -> tuple[Complexity, tuple[torch.Size, ...]]:
    """Counts of the backbone with the config ``text`` (JSON), and the shapes of its maps."""
    net = _build(json.loads(text), scope)
    image = torch.empty(1, 3, size[1], size[0], device="meta")
    shapes: list[torch.Size] = []
    counted = _count(net, lambda: shapes.extend(y.shape for y in net(image)))
    return counted, tuple(shapes)


def _build(cfg: Any, scope: str) -> nn.Module:
    from mmengine.model import revert_sync_batchnorm

    registry = importlib.import_module(f"{scope}.registry").MODELS
    with torch.device("meta"), NoInit():
        model = revert_sync_batchnorm(registry.build(cfg)).to("meta")
    model.eval()  # which returns nothing for some of mmdet's
    return model


def _count(model: nn.Module, forward: Any) -> Complexity:
    with torch.no_grad(), NoResize(), FlopCounterMode(display=False) as counter:
        forward()
    aten = torch.ops.aten
    by_kind = counter.get_flop_counts()["Global"]
    weights = sum(by_kind.get(kind, 0) for kind in (aten.convolution, aten.mm, aten.addmm))
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, weights // 2)


def _forward(model: nn.Module, maps: tuple[torch.Tensor, ...]) -> None:
    if getattr(model, "neck", None) is not None:
        maps = model.neck(maps)
    if hasattr(model, "decode_head"):
        model.decode_head(maps)
        return
    if hasattr(model, "bbox_head"):
        model.bbox_head(maps)
        return
    if hasattr(model, "rpn_head"):
        model.rpn_head(maps)
    head = model.roi_head
    channels = maps[0].shape[1]
    for box_head in _list(head.bbox_head):
        box_head(maps[0].new_empty(PROPOSALS, channels, *box_head.roi_feat_size))
    if head.with_mask:
        for mask_head, extractor in zip(_list(head.mask_head), _list(head.mask_roi_extractor), strict=True):
            mask_head(maps[0].new_empty(MASKS, channels, *extractor.roi_layers[0].output_size))


def _list(module: nn.Module) -> Sequence[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="+", help="configs of detectors or segmentors")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="of the image, the papers' if not given"
    )
    args = parser.parse_args(argv)
    print(f"{'params M':>9} {'GMACs':>8} {'of weights':>11}  config")
    for path in args.configs:
        found = detector_complexity(path, args.size and tuple(args.size))
        row = f"{found.params / 1e6:9.2f} {found.macs / 1e9:8.1f} {found.weight_macs / 1e9:11.1f}  {path}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
