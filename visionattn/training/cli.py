"""``python train.py`` and ``visionattn-train``: arguments to exit status."""

import datetime
import logging
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

from . import checkpoint, config
from .config import Config, RunError, UserError


def main(argv: list[str] | None = None) -> int:
    """Run train.py. Returns the exit status: 0 done or saved on request, 1 the run failed, 2 bad input."""
    logging.getLogger("timm").setLevel(logging.ERROR)  # what it logs at build time, our errors say in one line
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        print(f"train.py: error: {_message(e)}", file=sys.stderr, flush=True)
        return e.status


def _message(e: UserError) -> str:
    """One line, also of an error that crossed over from a worker process with its traceback as text."""
    line = [line for line in str(e).splitlines() if line.strip()][-1]
    return line.removeprefix("visionattn.training.config.UserError: ")


def _run(argv: list[str]) -> int:
    cfg, explicit = config.parse(argv)
    state_path = checkpoint.find_run(cfg.resume, cfg.output, cfg.model) if cfg.resume else None
    if state_path:
        cfg = _resumed_config(state_path.parent, explicit)
    elif cfg.resume:
        print(f"no run of {cfg.model} in {cfg.output}/ yet: starting one.", flush=True)
    state = checkpoint.read_state(state_path) if state_path else None

    import torch  # the seconds of these imports come after the quick errors

    from visionattn import _world

    from . import distributed, engine

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    world = distributed.start(cfg)
    trainer = None
    try:
        trainer = engine.Trainer(cfg, world)
        if cfg.validate:
            return _validate(trainer)
        return _train(trainer, state, state_path)
    except UserError as e:
        if world.size > 1 and trainer is None and not world.first:
            return e.status  # every rank found the same: the first one says it
        raise
    except RuntimeError as e:
        if world.size > 1 and any(word in str(e) for word in ("gloo", "NCCL", "nccl", "onnection", "imed out")):
            step = getattr(trainer, "step", 0)
            raise RunError(f"rank {world.rank} of {world.size} lost contact with another rank at update {step}: it was "
                           f"killed, or failed, and says so itself. {_how_to_resume(trainer)}") from e  # fmt: skip
        if "in DataLoader worker process" in str(e):
            last = [line for line in str(e).splitlines() if line.strip()][-1]
            raise RunError(f"reading the data failed in a worker process: {last}") from e
        raise
    finally:
        _world.stop()


def _resumed_config(run: Path, explicit: dict[str, Any]) -> Config:
    """The run's own options, under those of this command line."""
    own = config.read_yaml(run / "config.yaml")
    cfg = config.make(own | explicit)
    changed = [k for k in explicit if k not in config.COMMANDS and k in own and getattr(cfg, k) != own[k]]
    if changed:
        print(f"note: resuming with other values than the run's config.yaml: {', '.join(changed)}", flush=True)
    return cfg


def _validate(trainer: Any) -> int:
    cfg = trainer.cfg
    if trainer.val_loader is None:
        raise UserError("validate needs a data set: --data-dir, or --dataset.")
    trainer.model.requires_grad_(False)
    result = trainer.evaluate(trainer.model)
    if trainer.world.first:
        weights = cfg.checkpoint or "published weights"
        data = trainer.data
        count = getattr(trainer.val_loader.dataset, "__len__", lambda: "?")()
        print(f"{cfg.validate} ({weights}): top1 {result['top1']:.3f}  top5 {result['top5']:.3f}  "
              f"loss {result['loss']:.4f}  on {count} images, {data['input_size'][1]}x{data['input_size'][2]} px, "
              f"crop {data['crop_pct']}, {data['interpolation']}", flush=True)  # fmt: skip
    return 0


def _train(trainer: Any, state: dict[str, Any] | None, state_path: Path | None) -> int:
    from .engine import Stopped

    world, cfg = trainer.world, trainer.cfg
    if state:
        trainer.load_state(state)
        if trainer.epoch >= trainer.epochs:
            if world.first:
                print(f"{state_path.parent} is complete ({trainer.epoch} epochs); nothing to do.", flush=True)
            return 0
    run, lock = _open_folder(trainer, state_path) if world.first else (None, None)
    run_name = world.gather(str(run))[0]
    _install_signals(trainer)
    if world.first:
        params = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        print(f"{cfg.model}: {params:.2f} M parameters, input {'x'.join(map(str, trainer.data['input_size']))}, "
              f"{trainer.classes} classes, {len(trainer.loader)} batches of {cfg.batch_size} an epoch on "
              f"{world.size} x {trainer.device.type}; {trainer.epochs} epochs into {run}", flush=True)  # fmt: skip
    try:
        trainer.fit(run)
    except Stopped:
        if world.first:
            print(f"stopped and saved at update {trainer.step} (epoch {trainer.epoch}). Resume with: "
                  f"python train.py --resume {run_name}", flush=True)  # fmt: skip
    else:
        if world.first:
            best = trainer.best
            top1 = f"best top1 {best['top1']:.2f} at epoch {best['epoch']}; " if best["epoch"] >= 0 else ""
            print(f"done: {top1}{run_name}/best.safetensors and summary.csv, curves.png", flush=True)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        if lock:
            lock.close()
    return 0


def _open_folder(trainer: Any, state_path: Path | None) -> tuple[Path, Any]:
    """The run folder, locked; a new one, or the resumed one. Its config.yaml is the run as it now is."""
    cfg = trainer.cfg
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = state_path.parent if state_path else checkpoint.make_run_folder(cfg.output, cfg.model, stamp)
    lock = checkpoint.lock(run)
    config.save(cfg, run / "config.yaml", _environment(trainer))
    return run, lock


def _environment(trainer: Any) -> str:
    import timm
    import torch

    import visionattn

    versions = f"visionattn {visionattn.__version__}, torch {torch.__version__}, timm {timm.__version__}"
    return (f"repeat with: python train.py --config <this file>\n{versions}, Python {platform.python_version()}, "
            f"{trainer.world.size} x {trainer.device.type}, pid {os.getpid()}")  # fmt: skip


def _install_signals(trainer: Any) -> None:
    def handler(number: int, frame: Any) -> None:
        if trainer.stop_requested and number == signal.SIGINT:  # a second Ctrl-C means it
            signal.default_int_handler(number, frame)
        trainer.stop_requested = True

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def _how_to_resume(trainer: Any) -> str:
    if trainer is None or getattr(trainer, "saved_step", None) is None:
        return "No checkpoint had been written yet."
    run = trainer.run or "the run folder"
    return f"Update {trainer.saved_step} is saved; resume with --resume {run}."


if __name__ == "__main__":
    sys.exit(main())
