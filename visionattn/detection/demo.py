"""A detector trained on a small set that is made on the spot: ``python -m visionattn.detection.demo``.

Makes the set (:mod:`visionattn.detection.demo_data`), trains RetinaNet or Mask R-CNN with a small backbone through
mmengine's Runner, evaluates with pycocotools and writes pictures with boxes. ``torchrun`` works too. The configs are
ordinary ones (``configs/detection/demo``), which mmdet's own tools take as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionattn._files import atomic_write

__all__ = ["demo_config", "main", "run_demo"]

CONFIGS = {
    "retinanet": "demo/retinanet_test-mala_fpn_demo.py",
    "mask-rcnn": "demo/mask-rcnn_test-mala_fpn_demo.py",
}
PICTURES = 12  # of the validation set, drawn at the end
ENLARGED = 3  # they are small
TRIAL = (5, 25)  # steps before the clock starts, and when it stops, where the time decides the number of epochs
SLACK = 1.1  # checkpoints and the log take time too
EVALUATION = 25.0  # seconds for two evaluations and the pictures


def configs_folder() -> Path:
    """Where the detection configs are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs" / "detection"
    return installed if installed.is_dir() else package.parent / "configs" / "detection"


def demo_config(
    detector: str,
    model: str,
    data_root: Path,
    work_dir: Path,
    epochs: int | None = None,
    distributed: bool = False,
    lr: float | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    scale: float = 1.0,
) -> Any:
    """The demo's config for a detector and a backbone, an mmengine ``Config``.

    Args:
        detector: ``'retinanet'`` or ``'mask-rcnn'``.
        model: a timm name, of the zoo or timm's own.
        data_root: folder of the set.
        work_dir: where logs and checkpoints go.
        epochs: the config's where None.
        distributed: one process of several.
        lr: AdamW's learning rate; the config's where None.
        batch_size: training pictures a step, of each process; the config's where None.
        workers: processes that read training pictures; the config's where None.
        scale: pictures are enlarged by it, and the anchors.

    Raises:
        ValueError: for an unknown detector or model.
    """
    from mmengine.config import Config

    if detector not in CONFIGS:
        raise ValueError(f"unknown detector {detector!r}: one of {', '.join(CONFIGS)}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs}: give at least one")
    if lr is not None and not 0 < lr < 1:
        raise ValueError(f"lr={lr}: give a learning rate between 0 and 1, such as 5e-4")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least one picture a step")
    cfg = Config.fromfile(configs_folder() / CONFIGS[detector])
    cfg.model.backbone.model = model
    cfg.model.neck.in_channels = _channels(cfg.model.backbone)

    root = str(data_root) + "/"
    cfg.data_root = root
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = root
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = root + "annotations/val.json"
    if epochs is not None:
        _set_epochs(cfg, epochs)
    if lr is not None:
        cfg.optim_wrapper.optimizer.lr = lr
    if batch_size is not None:
        cfg.train_dataloader.batch_size = batch_size
    if workers is not None:
        cfg.train_dataloader.update(num_workers=workers, persistent_workers=workers > 0)
    if scale != 1:
        _enlarge_pictures(cfg, scale)
    cfg.work_dir = str(work_dir)
    if distributed:
        from mmengine.device import get_device

        cfg.launcher = "pytorch"
        if get_device() == "cpu":  # mmengine's default wrapper asks for a GPU's index
            cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    return cfg


def _enlarge_pictures(cfg: Any, scale: float) -> None:
    if not 0.25 <= scale <= 8:
        raise ValueError(f"scale={scale}: give a factor between 0.25 and 8")
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            if step.type == "Resize":
                step.scale_factor = scale
    head = cfg.model.bbox_head if "bbox_head" in cfg.model else cfg.model.rpn_head
    anchors = head.anchor_generator
    if "scales" in anchors:
        anchors.scales = [scale * size for size in anchors.scales]
    else:
        anchors.octave_base_scale = scale * anchors.octave_base_scale


def _set_epochs(cfg: Any, epochs: int) -> None:
    cfg.train_cfg.update(max_epochs=epochs)
    cfg.param_scheduler[1].update(T_max=epochs, end=epochs)


def _fit(cfg: Any, seconds: float) -> None:
    """Sets as many epochs as ``seconds`` are enough for, by the time of twenty steps made here and thrown away."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.device import get_device
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    begun = time.perf_counter()
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model).to(get_device()).train()
    optim = build_optim_wrapper(model, cfg.optim_wrapper)
    for group in optim.param_groups:
        group["lr"] = 0.0
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    steps, marks = len(loader), []
    while len(marks) < TRIAL[1]:
        for data in loader:
            model.train_step(data, optim)  # clipping reads the gradients' norm, so the device has finished
            marks.append(time.perf_counter())
            if len(marks) == TRIAL[1]:
                break
    step = (marks[-1] - marks[TRIAL[0]]) / (TRIAL[1] - 1 - TRIAL[0])
    del model, optim, loader
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    left = seconds - (time.perf_counter() - begun) - EVALUATION
    epochs = max(1, int(left / (SLACK * step * steps)))
    print(f"{step:.3f} s a step, {steps} steps an epoch: {epochs} epochs in {seconds:.0f} s", flush=True)
    _set_epochs(cfg, epochs)
    cfg.train_cfg.val_interval = max(1, (epochs + 1) // 2)
    cfg.param_scheduler[0].end = max(50, epochs * steps // 20)


def _channels(backbone: Any) -> list[int]:
    import torch
    from mmdet.registry import MODELS

    with torch.device("meta"):
        return list(MODELS.build(backbone).out_channels)


def _start(device: str | None) -> bool:
    """Readies the device and, under ``torchrun``, the process group; returns whether there are several processes."""
    import torch

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # mmengine takes a GPU wherever it sees one
    from mmengine.device import get_device

    found = get_device()
    if device is not None and device != found:
        raise ValueError(f"--device {device}: mmengine runs on {found} here; leave the flag out or give that")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    if found == "cpu" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")  # mmengine's own start asks for a GPU
    return True


def run_demo(
    detector: str = "retinanet",
    model: str = "test_mala",
    work_dir: str | os.PathLike = "runs/detection_demo",
    epochs: int | None = None,
    device: str | None = None,
    quick: bool = False,
    resume: bool = False,
    lr: float | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    pictures: int | None = None,
    seconds: float | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Makes the set, trains, evaluates, draws.

    Args:
        detector: ``'retinanet'`` or ``'mask-rcnn'``.
        model: a timm name, of the zoo or timm's own.
        work_dir: gets the set (``data*``), and per detector and model a folder with mmengine's logs and checkpoints,
            ``pictures.png`` and ``result.json``.
        epochs: the config's where None.
        device: ``'cpu'`` or ``'cuda'``; whatever is there where None.
        quick: a few pictures and one epoch: whether it runs, not what it learns.
        resume: goes on with the last checkpoint of an earlier run.
        lr: AdamW's learning rate; the config's, which suits the test models, where None. Large models want less.
        batch_size: training pictures a step, of each process; the config's where None.
        workers: processes that read training pictures, and that draw them; one of each where None.
        pictures: number of training pictures, 1,200 where None.
        seconds: instead of ``epochs``: as many as that time is enough for, evaluation included.
        scale: pictures are enlarged by it. Models that cut an image into patches at once see more of small objects.

    Returns:
        what ``result.json`` holds: box (and mask) AP as fractions, seconds, the setting.

    Raises:
        ValueError: for an unknown detector, model or device, a number out of range; for ``seconds`` beside ``epochs``
            or ``resume``, or in several processes.
        FileExistsError: where an earlier run's checkpoints are and ``resume`` is False.
    """
    _check_numbers(workers=workers, pictures=pictures, seconds=seconds)
    if seconds is not None and (epochs is not None or resume):
        raise ValueError("seconds chooses the number of epochs anew: leave out epochs, and resume with epochs")
    distributed = _start(device)
    if seconds is not None and distributed:
        raise ValueError("seconds is for one process: give epochs to several")
    import visionattn.detection  # noqa: F401  before mmdet

    from .demo_data import make_demo_set

    work_dir = Path(work_dir)
    run_dir = work_dir / f"{detector}_{model.replace('/', '_')}"
    epochs = 1 if quick and epochs is None else epochs
    numbers = dict(train=16, val=4) if quick else dict(train=pictures) if pictures else {}
    data_root = work_dir / ("data_quick" if quick else f"data_{pictures}" if pictures else "data")
    cfg = demo_config(detector, model, data_root, run_dir, epochs, distributed, lr, batch_size, workers, scale)
    if (run_dir / "last_checkpoint").exists() and not resume:
        raise FileExistsError(f"{run_dir} holds a run: --resume goes on with it, another --work-dir starts anew")
    if os.environ.get("RANK", "0") == "0" and not data_root.exists():
        print(f"making the pictures, about half a minute: {data_root}", flush=True)
    make_demo_set(data_root, **numbers, workers=workers or 1)
    if quick:
        _shorten(cfg, batch_size or 4)
    cfg.resume = resume

    from mmengine.runner import Runner

    started = time.time()
    if seconds is not None:
        _fit(cfg, seconds)
    runner = Runner.from_cfg(cfg)
    runner.train()
    metrics = _metrics(runner)
    result = dict(
        detector=detector,
        model=model,
        params=sum(p.numel() for p in _bare(runner.model).parameters()),
        epochs=cfg.train_cfg.max_epochs,
        batch_size=cfg.train_dataloader.batch_size,
        pictures=len(runner.train_dataloader.dataset),
        lr=cfg.optim_wrapper.optimizer.lr,
        scale=scale,
        seconds=round(time.time() - started, 1),
        device=str(next(runner.model.parameters()).device.type),
        **metrics,
    )
    if runner.rank == 0:
        _draw(runner, run_dir / "pictures.png")
        atomic_write(run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _check_numbers(workers: int | None, pictures: int | None, seconds: float | None) -> None:
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers}: give 0 (this process reads the pictures) or more")
    if pictures is not None and pictures < 1:
        raise ValueError(f"pictures={pictures}: give at least one")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds}: give more than 0, such as 400")


def _shorten(cfg: Any, batch_size: int) -> None:
    cfg.train_dataloader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
    cfg.val_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.default_hooks.logger.interval = 1


def _bare(model: Any) -> Any:
    from mmengine.model import is_model_wrapper

    return model.module if is_model_wrapper(model) else model


def _metrics(runner: Any) -> dict[str, float]:
    """Box and mask AP of the validation after the last epoch, or of one made now where that ran earlier."""
    metric = runner.cfg.val_evaluator.metric
    kinds = [metric] if isinstance(metric, str) else metric
    names = [f"coco/{kind}_mAP{at}" for kind in kinds for at in ("", "_50")]
    scalars = runner.message_hub.log_scalars
    if f"val/{names[1]}" in scalars:
        found = {name: scalars[f"val/{name}"].current() for name in names}
    else:
        found = runner.val()
    # without a single detection mmdet gives no numbers
    return {name.removeprefix("coco/"): float(found.get(name, 0.0)) for name in names}


def _draw(runner: Any, path: Path) -> None:
    """A sheet of validation pictures: what is there, and below what was found."""
    import numpy as np
    import torch
    from mmdet.registry import VISUALIZERS
    from mmengine.dataset import pseudo_collate
    from PIL import Image

    dataset, model = runner.val_dataloader.dataset, _bare(runner.model).eval()
    painter = VISUALIZERS.build(dict(type="DetLocalVisualizer", name="visionattn_demo", alpha=0.5))
    painter.dataset_meta = dataset.metainfo
    columns = []
    for i in range(min(PICTURES, len(dataset))):
        item = dataset[i]
        image = np.asarray(Image.open(item["data_samples"].img_path).convert("RGB"))
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([item]))[0].cpu().detach()
        image = np.ascontiguousarray(image.repeat(ENLARGED, 0).repeat(ENLARGED, 1))
        drawn = []
        for instances, key in ((sample.gt_instances, "gt"), (sample.pred_instances, "pred")):
            _enlarge(instances)
            painter.add_datasample(key, image, sample, draw_gt=key == "gt", draw_pred=key == "pred", pred_score_thr=0.4)
            drawn.append(painter.get_image())
        columns.append(np.concatenate(drawn, 0))
    _save_sheet(columns, path)


def _enlarge(instances: Any) -> None:
    boxes = getattr(instances.bboxes, "tensor", instances.bboxes)
    instances.bboxes = boxes * ENLARGED
    if "masks" in instances:
        masks = instances.masks if hasattr(instances.masks, "repeat") else instances.masks.to_tensor(bool, "cpu")
        instances.masks = masks.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)


def _save_sheet(columns: Sequence[Any], path: Path) -> None:
    """Pictures side by side, six a row, into one file."""
    import numpy as np
    from PIL import Image

    height, width = (max(c.shape[axis] for c in columns) + 6 for axis in (0, 1))
    per_row = min(6, len(columns))
    rows = -(-len(columns) // per_row)
    sheet = np.full((rows * height, per_row * width, 3), 255, np.uint8)
    for i, column in enumerate(columns):
        top, left = i // per_row * height, i % per_row * width
        sheet[top : top + column.shape[0], left : left + column.shape[1]] = column
    atomic_write(path, lambda f: Image.fromarray(sheet).save(f, format="PNG"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m visionattn.detection.demo", description=__doc__.partition("\n")[0].partition(":")[0]
    )
    parser.add_argument("--detector", default="retinanet", choices=list(CONFIGS))
    parser.add_argument("--model", default="test_mala", help="a timm name, of the zoo or timm's own (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="whatever is there where not given")
    parser.add_argument("--epochs", type=int, help="the config's where not given")
    parser.add_argument("--lr", type=float, help="AdamW's learning rate, the config's where not given")
    parser.add_argument("--batch-size", type=int, help="training pictures a step, the config's where not given")
    parser.add_argument("--workers", type=int, help="processes that read and draw pictures (1)")
    parser.add_argument("--pictures", type=int, help="training pictures (1200)")
    parser.add_argument("--seconds", type=float, help="instead of --epochs: as many as fit, evaluation included")
    parser.add_argument("--scale", type=float, default=1.0, help="factor that pictures are enlarged by (%(default)s)")
    parser.add_argument("--work-dir", default="runs/detection_demo", help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few pictures, one epoch: whether it runs")
    parser.add_argument("--resume", action="store_true", help="go on with the last checkpoint in the work folder")
    args = parser.parse_args(argv)
    try:
        result = run_demo(**vars(args))
    except (ValueError, FileExistsError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last epoch that was finished", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
