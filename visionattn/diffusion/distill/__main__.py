"""``python -m visionattn.diffusion.distill --config clear_flux [--build-cache] [--restart] [key=value ..]``."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from visionattn import _files

from . import config
from .config import Config, RunError, UserError


def main(argv: list[str] | None = None) -> int:
    """Fills the cache, or runs (goes on with) a distillation. Returns the exit status: 0, 1 failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m visionattn.diffusion.distill", description="Distil FLUX.1 into CLEAR's local attention."
    )
    parser.add_argument("--config", required=True, help="YAML file, or the name of a recipe that ships (clear_flux)")
    parser.add_argument("--build-cache", action="store_true", help="encode images= into cache=, and train nothing")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of going on with output='s run")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options that replace the file's")
    args = parser.parse_intermixed_args(argv)
    try:
        cfg = config.make(config.read_yaml(args.config) | config.pairs(args.options))
        if args.build_cache:
            return _build_cache(cfg)
        return _distil(cfg, args.restart)
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0 or isinstance(e, RunError):
            print(f"error: {e}", file=sys.stderr, flush=True)
        return e.status
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first update
        print("interrupted", file=sys.stderr, flush=True)
        return 130


def _build_cache(cfg: Config) -> int:
    from . import cache

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        written = cache.build(cfg, rank, size)
    except KeyboardInterrupt:
        print("stopped; --build-cache again goes on with what is lacking.", flush=True)
        return 130
    print(f"{cfg.cache}: {written} samples written by process {rank + 1} of {size}", flush=True)
    return 0


def _distil(cfg: Config, restart: bool) -> int:
    import torch

    from visionattn import _world

    from . import parallel
    from .engine import Distiller
    from .sampling import Sampler

    if not cfg.output:
        raise UserError("output= is not given: the run folder.")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run = config.make_folder(cfg.output, "output")
    first = int(os.environ.get("RANK", 0)) == 0
    handle = _files.lock(run, UserError, "give another output=") if first else None
    if first:
        _files.sweep(run, "*")
    world = parallel.start(cfg)
    distiller, before = None, {}
    try:
        distiller = Distiller(cfg, world)
        state = run / "state.pt"
        if state.is_file() and not restart:
            distiller.load(state)
        if first:
            _introduce(cfg, distiller, run)
        before = _install_signals(distiller)
        sampler = Sampler(cfg, distiller.cache, world.device, run if first else None) if cfg.sample_interval else None
        ended = distiller.fit(run, lambda line: print(line, flush=True), sampler)
        if first:
            tail = "python -m visionattn.diffusion.distill with the same options goes on" if ended == "stopped" else \
                f"load it with visionattn.diffusion.load_clear(pipe, {_result(cfg, run)!r})"  # fmt: skip
            print(f"{ended} at update {distiller.step} of {cfg.steps}: {tail}", flush=True)
    except RuntimeError as e:
        if world.size > 1 and any(word in str(e) for word in ("gloo", "NCCL", "onnection", "imed out")):
            saved = getattr(distiller, "saved_step", None)
            kept = "nothing had been saved yet" if saved is None else f"update {saved} is saved, start again to go on"
            raise RunError(f"rank {world.rank} of {world.size} lost contact with another rank: {kept}.") from e
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _world.stop()
        if handle:
            handle.close()
    return 0


def _result(cfg: Config, run: Path) -> str:
    from .pair import file_name

    return str(run / file_name(cfg))


def _introduce(cfg: Config, distiller: Any, run: Path) -> None:
    """config.yaml, and a line of what is trained."""
    text = yaml.safe_dump(dict(vars(cfg)), sort_keys=False, allow_unicode=True)
    text = f"# repeat with: python -m visionattn.diffusion.distill --config <this file>\n{text}"
    _files.atomic_write(run / "config.yaml", text)
    trained = sum(p.numel() for p in distiller.pair.trained().values())
    total = sum(p.numel() for p in distiller.pair.teacher.parameters())
    world, position = distiller.world, f", going on after update {distiller.step}" if distiller.step else ""
    print(f"{trained / 1e6:.1f} of {total / 1e6:.1f} M parameters are trained, {len(distiller.cache)} samples, "
          f"{len(distiller.pair.captures[0].names)} attentions compared, {world.size} x {world.device.type}{position}",
          flush=True)  # fmt: skip


def _install_signals(distiller: Any) -> dict[int, Any]:
    """Ctrl-C and SIGTERM ask for a save at the next update. Returns the handlers that were there."""

    def handler(number: int, frame: Any) -> None:
        if distiller.stop_requested and number == signal.SIGINT:  # a second Ctrl-C means it
            signal.default_int_handler(number, frame)
        distiller.stop_requested = True

    return {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}


if __name__ == "__main__":
    sys.exit(main())
