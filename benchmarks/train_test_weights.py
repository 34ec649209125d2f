"""Trains the small models whose weights come along (``test_*.digits``), and writes their files and manifest entries.

    python benchmarks/train_test_weights.py                 # all of them, one after the other; goes on where it stopped
    python benchmarks/train_test_weights.py test_ela test_halo
    python benchmarks/train_test_weights.py --check         # trains nothing: measures the files that lie in weights/
    python benchmarks/train_test_weights.py --document      # trains nothing: the tables of docs/weights.md

Each run is ``train.py``'s, with its recipe for the digits at the size of the model's ``digits`` cfg. The weights are
those of the last epoch: no epoch is chosen by the images that the accuracy is stated on. Ctrl-C saves the run.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import timm
import torch
import yaml
from safetensors.torch import load_file, save

import visionattn  # noqa: F401  registers the models
from visionattn._files import atomic_write
from visionattn.checkpoints import manifest, sha256
from visionattn.cli.weights import as_markdown
from visionattn.training import cli
from visionattn.training.data import Digits

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights"
BEGIN = "# Trained here; benchmarks/train_test_weights.py writes all that follows.\n"
EPOCHS = 20
LONGER = {"test_agent_deit": 60, "test_inline_deit": 60}  # no convolution before their tokens: not done after 20
LIMIT = 2_000_000  # bytes of a file
DOCUMENT = ROOT / "docs" / "weights.md"
MARKS = ("<!-- benchmarks/train_test_weights.py writes from here -->", "<!-- to here -->")


def names() -> list[str]:
    """Registered models with a ``digits`` tag."""
    return [n.removesuffix(".digits") for n in timm.list_pretrained("test_*.digits")]


def arguments(name: str, seed: int) -> list[str]:
    """What train.py is given; it stands on the model's card."""
    size = timm.get_pretrained_cfg(f"{name}.digits").input_size[-1]
    words = ["--config", "digits", "--model", f"{name}.digits", "--img-size", str(size)]
    return [*words, "--epochs", str(LONGER.get(name, EPOCHS)), "--seed", str(seed)]


def train(name: str, runs: Path, seed: int) -> Path:
    """Trains, or goes on; returns the weights of the last epoch."""
    status = cli.main([*arguments(name, seed), "--output", str(runs), "--resume", "auto", "--threads", "1"])
    if status:
        raise SystemExit(f"train_test_weights.py: the run of {name} failed, see above")
    for run in sorted(runs.glob(f"*-{name}.digits"), reverse=True):
        with (run / "summary.csv").open() as file:
            if len(list(csv.DictReader(file))) == LONGER.get(name, EPOCHS):
                return run / "last.safetensors"
    raise SystemExit(f"train_test_weights.py: the run of {name} was stopped; start again to go on from here")


def evaluate(name: str) -> float:
    """Top-1 in percent on the held-out digits, of the model as ``timm.create_model`` gives it."""
    model = timm.create_model(f"{name}.digits", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    held_out = Digits(train=False)
    images = torch.stack([transform(image.convert("RGB")) for image, _ in held_out])
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in images.split(64)])
    return 100 * (found == torch.tensor(held_out.labels)).double().mean().item()


def release(name: str, source: Path) -> None:
    """Copies trained weights into ``weights/``."""
    about = {"model": f"{name}.digits", "dataset": "scikit-learn digits", "num_classes": 10}
    target = WEIGHTS / f"{name}.digits.safetensors"
    blob = save(load_file(source), metadata={"format": "pt", "visionattn": json.dumps(about)})
    if len(blob) > LIMIT:
        raise SystemExit(f"train_test_weights.py: {name} has more than {LIMIT:,} bytes")
    atomic_write(target, blob)


def record(name: str, top1: float, command: list[str]) -> None:
    """Puts the entry of one model into the manifest, in place of an older one."""
    path = WEIGHTS / "manifest.yaml"
    head, _, tail = path.read_text().partition(BEGIN)
    entries = {e["name"]: e for e in yaml.safe_load(tail) or []}
    file = WEIGHTS / f"{name}.digits.safetensors"
    entries[f"{name}.digits"] = {
        "name": f"{name}.digits",
        "system": timm.models.model_entrypoint(name).__module__.rpartition(".")[2],
        "model": name,
        "file": file.name,
        "licence": "Apache-2.0",
        "top1": round(top1, 2),
        "dataset": "digits",
        "img_size": timm.get_pretrained_cfg(f"{name}.digits").input_size[-1],
        "sha256": sha256(file),
        "size": file.stat().st_size,
        "recipe": " ".join(["python train.py", *command]),
    }
    rows = [entries[key] for key in sorted(entries)]
    atomic_write(path, head + BEGIN + yaml.safe_dump(rows, sort_keys=False, width=200))


def write_document() -> None:
    """Puts the manifest's tables between the marks of the document."""
    old = DOCUMENT.read_text()
    text = "\n".join((MARKS[0], "", as_markdown(list(manifest().values())), "", MARKS[1]))
    atomic_write(DOCUMENT, re.sub(f"{MARKS[0]}.*{MARKS[1]}", lambda m: text, old, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names without a tag; all by default")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "test_weights", help="where run folders lie")
    parser.add_argument("--again", action="store_true", help="also models whose file is there")
    parser.add_argument("--check", action="store_true", help="only measure what is there")
    parser.add_argument("--document", action="store_true", help="only write the tables of docs/weights.md")
    args = parser.parse_args()
    if args.document:
        write_document()
        return
    unknown = set(args.models) - set(names())
    if unknown:
        parser.error(f"no digits tag: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    for name in args.models or names():
        known = manifest().get(f"{name}.digits")
        if args.check:
            print(f"{name}.digits: {evaluate(name):.2f} %, the manifest says {known and known.top1}", flush=True)
            continue
        if known and not args.again:
            continue
        release(name, train(name, args.runs, args.seed))
        top1 = evaluate(name)
        record(name, top1, arguments(name, args.seed))
        write_document()
        print(f"train_test_weights.py: {name}.digits {top1:.2f} % of the held-out digits", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
