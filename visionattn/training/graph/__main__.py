"""``python -m visionattn.training.graph --config configs/graph/pattern.yaml [key=value ..] [--max-seconds N]``."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import yaml

from visionattn._files import atomic_write

from ..config import UserError
from .data import SPLITS, load_folder, load_or_generate, statistics
from .engine import GraphTrainer, load_config, save


def main(argv: list[str] | None = None) -> int:
    """Runs, or goes on with, the run of a configuration; 0 where all went well, 2 for an error of the user's."""
    parser = argparse.ArgumentParser(prog="python -m visionattn.training.graph", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, see configs/graph")
    parser.add_argument(
        "--max-seconds", type=float, default=0.0, help="stop (and save) after about this time; 0: never"
    )
    parser.add_argument("--restart", action="store_true", help="do not go on from output/checkpoint.pt")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options that replace the file's")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.status


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    path = Path(args.config)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file.")
    values = yaml.safe_load(path.read_text()) or {}
    for option in args.options:
        key, sep, text = option.partition("=")
        if not sep:
            raise UserError(f"{option!r} is not key=value.")
        values[key] = yaml.safe_load(text)
    if values.get("dataset") == "superpixels":
        from .superpixels import run_superpixels

        return run_superpixels(values, args)
    cfg = load_config(values)
    folder = Path(cfg.output)
    if cfg.data_dir:
        data = load_folder(cfg.dataset, cfg.data_dir, cfg.net.get("pos_enc_dim", 2))
    else:
        data = load_or_generate(cfg.dataset, cfg.data_seed, cfg.cache, cfg.sizes, cfg.net.get("pos_enc_dim"))
    for split in SPLITS:
        print(split, " ".join(f"{k}={v:.1f}" for k, v in statistics(data[split]).items()))
    print(f"data: {time.perf_counter() - begin:.1f} s", flush=True)
    trainer = GraphTrainer(cfg, data)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file() and not args.restart:
        trainer.load(torch.load(checkpoint, map_location=trainer.device, weights_only=True))
        print(f"goes on after epoch {trainer.epoch} of {checkpoint}")
    parameters = sum(p.numel() for p in trainer.net.parameters())
    print(
        f"{parameters:,} parameters on {trainer.device}, capture={trainer.capture}, compile={cfg.compile}", flush=True
    )
    left = max(1.0, args.max_seconds - (time.perf_counter() - begin)) if args.max_seconds else 0.0
    try:
        ended = trainer.fit(left, lambda line: print(line, flush=True))
    finally:
        save(trainer, folder)
    test = trainer.evaluate("test")
    result = {
        "dataset": cfg.dataset, "epochs": trainer.epoch, "ended": ended, "lr": trainer.lr, "seed": cfg.seed,
        "data_seed": cfg.data_seed, "test_accuracy": test["accuracy"], "test_loss": test["loss"],
        "val_accuracy": trainer.history[-1]["val_accuracy"] if trainer.history else None, "parameters": parameters,
        "seconds": round(trainer.seconds, 1), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
    }  # fmt: skip
    atomic_write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
