"""From a Config to the parts of a run: model, task (model + loss, or distillation), optimizer, schedule.

Everything a user can get wrong about them is found here, before anything is written.
"""

import contextlib
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.optim
import timm.scheduler
import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

import visionattn

from .checkpoint import check_weights
from .config import Config, UserError, nearest


def one_line(e: BaseException, length: int = 300) -> str:
    """An exception's message without line breaks, cut where it gets long."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= length else text[:length] + " .."


@contextlib.contextmanager
def refused(what: str):
    """Whatever is raised inside becomes a UserError that starts with ``what``."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what}: {type(e).__name__}: {one_line(e)}") from e


def check_model_name(name: str, option: str = "model") -> None:
    """Raises UserError with the nearest name for one that timm does not know."""
    if ":" not in name and not timm.is_model(name):
        known = timm.list_models() + timm.list_pretrained()
        raise UserError(f"{option}={name!r} is unknown.{nearest(name, known)} timm.list_models() lists them all.")
    base, _, tag = name.partition(".")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*")]
    if ":" not in name and tag and tag not in tags:
        raise UserError(f"{option}={name!r}: {base} has no tag {tag!r}. It has {', '.join(tags) or 'none'}.")


def default_chans(name: str) -> int:
    """Image channels that the model has by default."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
    return cfg.input_size[0] if cfg is not None else 3


def build_model(cfg: Config, name: str, classes: int | None, about: dict[str, Any]) -> nn.Module:
    """``timm.create_model`` with the options of a run, on the CPU. Raises UserError."""
    check_model_name(name)
    pretrained_cfg = timm.get_pretrained_cfg(name) if ":" not in name else None
    own = about if cfg.validate else {}  # a checkpoint that is evaluated knows how its model was built
    kwargs = own.get("model_kwargs", {}) | cfg.model_kwargs
    options = {
        "num_classes": classes,
        "in_chans": cfg.in_chans or own.get("in_chans"),
        "drop_rate": cfg.drop,
        "drop_path_rate": cfg.drop_path,
    }
    # only models of one fixed size take an img_size; the others meet theirs in check_forward
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options["img_size"] = cfg.img_size
    kwargs |= {k: v for k, v in options.items() if v is not None}
    if cfg.checkpoint:
        # the number of classes in the file: timm drops a classifier of another size, and keeps one of the same
        in_file = about.get("num_classes", (classes if cfg.validate else None) or pretrained_cfg.num_classes)
        kwargs["pretrained_cfg_overlay"] = {"file": cfg.checkpoint, "num_classes": in_file}
        if cfg.validate and classes and in_file != classes:
            raise UserError(f"checkpoint {cfg.checkpoint} has {in_file} classes, the data set {classes}.")
    source = f" from checkpoint {cfg.checkpoint}" if cfg.checkpoint else ""
    pretrained = bool(cfg.pretrained or cfg.checkpoint or cfg.validate)
    if pretrained and not cfg.checkpoint and pretrained_cfg is not None and not pretrained_cfg.has_weights:
        tagged = [n for n in timm.list_pretrained(name.split(".")[0] + ".*") if timm.get_pretrained_cfg(n).has_weights]
        others = f" With weights: {', '.join(tagged[:5])}." if tagged else ""
        raise UserError(f"model={name!r} has no published weights to load; give a file with --checkpoint.{others}")
    with refused(f"model={name!r}{source} with {kwargs} can't be built"):
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    if active := cfg.moh_active or own.get("moh_active"):
        with refused(f"model={name!r} with moh_active={active} is not possible"):
            visionattn.to_moh(model, active)
    return model


def data_config(cfg: Config, model: nn.Module, about: dict[str, Any], validate: bool) -> dict[str, Any]:
    """Input size (C, H, W), normalisation, crop and resize filter: options, else the checkpoint's, else the model's."""
    chans = cfg.in_chans or about.get("in_chans") or getattr(model, "in_chans", 3)
    args: dict[str, Any] = dict(about.get("data", {}))
    options = {"mean": cfg.mean, "std": cfg.std, "interpolation": cfg.interpolation, "crop_pct": cfg.crop_pct}
    args |= {k: v for k, v in options.items() if v}
    if cfg.img_size:
        args["input_size"] = (chans, cfg.img_size, cfg.img_size)
    for key in ("mean", "std"):
        if len(args.get(key, ())) not in (0, 1, chans):
            raise UserError(f"{key}={args[key]} has {len(args[key])} values for {chans} image channels.")
    data = timm.data.resolve_data_config(args, model=model, use_test_size=validate)
    data["input_size"] = (chans, *data["input_size"][1:])
    for key in ("mean", "std"):
        if len(data[key]) != chans:  # colour statistics for a grey model: their average
            data[key] = (sum(data[key]) / len(data[key]),) * chans
    return data


def check_forward(name: str, model: nn.Module, data: dict[str, Any], classes: int | None) -> None:
    """Two empty images through the model: it must take the size and answer with (2, classes). Raises UserError."""
    size = data["input_size"]
    device = next(model.parameters()).device
    model.eval()
    with refused(f"{name} refuses images of {size[1]} x {size[2]} px with {size[0]} channel(s); change --img-size"):
        with torch.no_grad():
            out = model(torch.zeros(2, *size, device=device))
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or (classes and out.shape[1] != classes):
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise UserError(f"the model answers with {shape}, not with one score for each of {classes} classes.")


def build_task(cfg: Config, model: nn.Module, device: torch.device) -> TrainingTask:
    """timm's task: the model with its criterion, or with its teacher. Raises UserError."""
    criterion = {"loss_type": cfg.loss, "smoothing": cfg.smoothing, "soft_targets": bool(cfg.mixup or cfg.cutmix)}
    if cfg.bce_target_thresh is not None:
        criterion["bce_target_thresh"] = cfg.bce_target_thresh
    with refused(f"loss={cfg.loss} with smoothing={cfg.smoothing}, bce_target_thresh={cfg.bce_target_thresh}"):
        if not cfg.teacher:
            return ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
    check_model_name(cfg.teacher, "teacher")
    kwargs: dict[str, Any] = {
        "student_model": model, "teacher_model": cfg.teacher, "criterion_kwargs": criterion, "device": device,
        "distill_loss_weight": cfg.distill_weight, "task_loss_weight": cfg.task_weight, "verbose": False,
    }  # fmt: skip
    if cfg.teacher_checkpoint:
        about = check_weights(Path(cfg.teacher_checkpoint))
        kwargs["teacher_pretrained_path"] = cfg.teacher_checkpoint
        if about.get("num_classes", model.num_classes) != model.num_classes:
            raise UserError(f"teacher_checkpoint={cfg.teacher_checkpoint} has {about['num_classes']} classes, the "
                            f"student {model.num_classes}.")  # fmt: skip
    if cfg.distill != "feature":
        kwargs["temperature"] = cfg.temperature
    kinds = {"logit": LogitDistillationTask, "feature": FeatureDistillationTask, "token": TokenDistillationTask}
    with refused(f"{cfg.distill} distillation from teacher={cfg.teacher!r} is not possible"):
        return kinds[cfg.distill](**kwargs)


def auxiliary_modules(model: nn.Module) -> list[Any]:
    """The one place for losses that a model has of its own (the load balance of a mixture of heads, say).

    A module offers one as a method ``pop_aux_loss() -> scalar tensor or None`` about its last training forward, with
    its published weight in it; the loop adds all of them, times ``aux_weight``.
    """
    return [m for m in model.modules() if hasattr(m, "pop_aux_loss")]


def build_optimizer(cfg: Config, module: nn.Module) -> torch.optim.Optimizer:
    """Any of timm's optimizers over the groups that weight decay and layer decay make. Raises UserError."""
    known = timm.optim.list_optimizers()
    if cfg.opt.lower().removeprefix("lookahead_") not in known:
        raise UserError(f"opt={cfg.opt!r} is unknown.{nearest(cfg.opt, known)} timm.optim.list_optimizers() lists all.")
    with refused(f"opt={cfg.opt!r} with opt_kwargs={cfg.opt_kwargs} is not possible"):
        return timm.optim.create_optimizer_v2(
            module, cfg.opt, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum,
            filter_bias_and_bn=not cfg.decay_all, layer_decay=cfg.layer_decay, **cfg.opt_kwargs,
        )  # fmt: skip


def build_schedule(cfg: Config, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> tuple[Any, int]:
    """(schedule stepped at each update, epochs with its cool-down and cycles). Raises UserError."""
    with refused(f"sched={cfg.sched} with sched_kwargs={cfg.sched_kwargs} is not possible"):
        return timm.scheduler.create_scheduler_v2(
            optimizer, cfg.sched, num_epochs=cfg.epochs, warmup_epochs=cfg.warmup_epochs, warmup_lr=cfg.warmup_lr,
            min_lr=cfg.min_lr, step_on_epochs=False, updates_per_epoch=updates_per_epoch, **cfg.sched_kwargs,
        )  # fmt: skip
