"""``python -m visionattn.training.graph --config configs/graph/pattern.yaml [key=value ..] [--max-seconds N]``.

``--run "key=value .."``, given several times, trains several runs at once, on one GPU in hardly more time than one.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch
import yaml

from visionattn._files import atomic_write

from ..config import UserError
from .data import SPLITS, load_folder, load_or_generate, statistics
from .engine import GraphTrainer, TrainConfig, load_config, save
from .together import train_together

ENOUGH_FOR_PROCESSES = 2000  # graphs; for fewer, starting processes takes longer than the work
SECONDS_BETWEEN_SAVES = 60.0


def main(argv: list[str] | None = None) -> int:
    """Runs, or goes on with, the run of a configuration; 0 where all went well, 2 for an error of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m visionattn.training.graph", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file, see configs/graph")
    parser.add_argument(
        "--max-seconds", type=float, default=0.0, help="stop (and save) after about this time; 0: never"
    )
    parser.add_argument("--restart", action="store_true", help="do not go on from output/checkpoint.pt")
    parser.add_argument(
        "--run", action="append", metavar="'key=value ..'",
        help="a run with these options more; several of them train at once, each into its own folder beside output",
    )  # fmt: skip
    parser.add_argument("options", nargs="*", metavar="key=value", help="options that replace the file's")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last save", file=sys.stderr)
        return 130


def _replaced(values: dict, options: list[str]) -> dict:
    values = dict(values)
    for option in options:
        key, sep, text = option.partition("=")
        if not sep:
            raise UserError(f"{option!r} is not key=value.")
        part, dot, name = key.partition(".")
        if dot and isinstance(values.get(part, {}), dict):  # net.lap_pos_enc=false
            values[part] = {**values.get(part, {}), name: yaml.safe_load(text)}
        else:
            values[key] = yaml.safe_load(text)
    return values


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    path = Path(args.config)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file.")
    values = _replaced(yaml.safe_load(path.read_text()) or {}, args.options)
    if values.get("dataset") == "superpixels":
        from .superpixels import run_superpixels

        if args.run:
            raise UserError("--run is for pattern and cluster, not for superpixels.")
        return run_superpixels(values, args)
    configs = [load_config(values)]
    if args.run:
        runs = [shlex.split(text) for text in args.run]
        configs = [load_config(_replaced(values, options)) for options in runs]
        for cfg, options in zip(configs, runs, strict=True):
            if options and not any(option.startswith("output=") for option in options):
                cfg.output += "-" + "-".join(options).replace("/", "_").replace(" ", "")
    if len({Path(cfg.output).resolve() for cfg in configs}) < len(configs):
        raise UserError("two runs have the same output: give each --run options of its own.")
    loaded: dict[tuple, dict] = {}
    for cfg in configs:  # all of them before the first net: they are drawn in forked processes
        _load(cfg, loaded)
    trainers = [_trainer(cfg, loaded[_graphs_of(cfg)], args.restart) for cfg in configs]
    print(f"data and nets: {time.perf_counter() - begin:.1f} s", flush=True)
    left = max(1.0, args.max_seconds - (time.perf_counter() - begin)) if args.max_seconds else 0.0
    names = [f"{Path(cfg.output).name}: " if args.run else "" for cfg in configs]
    saved = [time.perf_counter()] * len(trainers)

    def after_epoch(i: int, line: str) -> None:
        print(names[i] + line, flush=True)
        if time.perf_counter() - saved[i] > SECONDS_BETWEEN_SAVES:
            save(trainers[i], Path(configs[i].output))
            saved[i] = time.perf_counter()

    try:
        ended = train_together(trainers, left, after_epoch)
    finally:
        for trainer in trainers:
            if not trainer.mid_epoch:
                save(trainer, Path(trainer.cfg.output))
    for trainer, done in zip(trainers, ended, strict=True):
        result = summary(trainer, done)
        atomic_write(Path(trainer.cfg.output) / "result.json", json.dumps(result, indent=2) + "\n")
        print(json.dumps(result), flush=True)
    return 0


def _graphs_of(cfg: TrainConfig) -> tuple:
    """What tells two sets of graphs apart."""
    return cfg.dataset, cfg.data_dir, cfg.data_seed, str(cfg.sizes), cfg.net.get("pos_enc_dim"), cfg.eigenvectors


def _load(cfg: TrainConfig, loaded: dict[tuple, dict]) -> None:
    """Puts a run's graphs into ``loaded``, where they serve the other runs as well."""
    if _graphs_of(cfg) in loaded:
        return
    start, k = time.perf_counter(), cfg.net.get("pos_enc_dim")
    if cfg.eigenvectors == "arpack" and importlib.util.find_spec("scipy") is None:
        raise UserError("eigenvectors=arpack needs SciPy: pip install -e '.[graph]'.")
    if cfg.data_dir:
        data = load_folder(cfg.dataset, cfg.data_dir, k or 2, cfg.eigenvectors)
    else:
        large = cfg.sizes is None or sum(cfg.sizes) >= ENOUGH_FOR_PROCESSES
        processes = min(len(os.sched_getaffinity(0)), 16) if large and sys.platform == "linux" else 0
        data = load_or_generate(cfg.dataset, cfg.data_seed, cfg.cache, cfg.sizes, k, cfg.eigenvectors, processes)
    for split in SPLITS:
        print(split, " ".join(f"{name}={v:.1f}" for name, v in statistics(data[split]).items()))
    print(f"graphs: {time.perf_counter() - start:.1f} s", flush=True)
    loaded[_graphs_of(cfg)] = data


def _trainer(cfg: TrainConfig, data: dict, restart: bool) -> GraphTrainer:
    """A trainer, where its checkpoint is."""
    trainer = GraphTrainer(cfg, data)
    checkpoint = Path(cfg.output) / "checkpoint.pt"
    if checkpoint.is_file() and not restart:
        trainer.load(torch.load(checkpoint, map_location=trainer.device, weights_only=True))
        print(f"goes on after epoch {trainer.epoch} of {checkpoint}")
    parameters = sum(p.numel() for p in trainer.net.parameters())
    print(
        f"{parameters:,} parameters on {trainer.device}, capture={trainer.capture}, compile={cfg.compile}", flush=True
    )
    return trainer


def summary(trainer: GraphTrainer, ended: bool) -> dict:
    """What ``result.json`` holds: the last epoch's model, which the recipe reports, and the best one's on val."""
    cfg, test = trainer.cfg, trainer.evaluate("test")
    result = {
        "dataset": cfg.dataset, "epochs": trainer.epoch, "ended": ended, "lr": trainer.lr, "seed": cfg.seed,
        "data_seed": cfg.data_seed, "eigenvectors": cfg.eigenvectors, "lap_pos_enc": trainer.net.lap_pos_enc,
        "test_accuracy": test["accuracy"], "test_loss": test["loss"],
        "train_accuracy": trainer.evaluate("train")["accuracy"],
        "val_accuracy": trainer.history[-1]["val_accuracy"] if trainer.history else None,
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "seconds": round(trainer.seconds, 1), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
    }  # fmt: skip
    if trainer.best:
        result["best_epoch"], result["best_val_accuracy"] = trainer.best["epoch"], trainer.best["val_accuracy"]
        result["best_test_accuracy"] = trainer.evaluate_best("test")["accuracy"]
    return result


if __name__ == "__main__":
    sys.exit(main())
