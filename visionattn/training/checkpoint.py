"""Checkpoints: written so that a kill at any moment leaves a loadable one, read so that a file can't run code.

Two files a tag (``last``, ``best``), each whole in itself:

- ``<tag>.state.pt``: all that a resume needs: weights, EMA, optimizer, scaler, position, random states. It is one file,
  hence one rename: there is no moment in which weights and optimizer belong to different steps.
- ``<tag>.safetensors``: the weights to use (the EMA's where there is one), for everyone else.
"""

import contextlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import safetensors
import safetensors.torch
import torch

from visionattn import _files
from visionattn._files import atomic_write, replacing, sweep

from .config import UserError


def save(run: Path, state: dict[str, Any], weights: dict[str, torch.Tensor], about: dict[str, Any], best: bool) -> None:
    """Write ``last``; where it is the best so far, let ``best`` be the same files (hard links, where they exist)."""
    metadata = {"format": "pt", "visionattn": json.dumps(about)}
    blob = safetensors.torch.save({k: v.contiguous() for k, v in weights.items()}, metadata)
    atomic_write(run / "last.state.pt", lambda f: torch.save(state, f))
    atomic_write(run / "last.safetensors", blob)
    if best:
        for name in ("state.pt", "safetensors"):
            _link(run / f"last.{name}", run / f"best.{name}")


def _link(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)  # a killed process's, of the same number
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)


def read_state(path: Path) -> dict[str, Any]:
    """A ``.state.pt`` file. Raises UserError for one that is missing, cut short, or holds more than data."""
    state = _torch_load(path)
    if not isinstance(state, dict) or "optimizer" not in state:
        raise UserError(f"{path} is no state of a run: give a run folder, or its last.state.pt or best.state.pt.")
    return state


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist.") from None
    except pickle.UnpicklingError as e:
        odd = str(e).split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in str(e) else "other objects"
        raise UserError(
            f"checkpoint {path} is refused: its pickle holds more than tensors ({odd}), "
            "and could run code. If you trust it, save its state_dict as safetensors."
        ) from None
    except Exception as e:  # zip reader, unpickler, OS: all of them say that the file is no whole checkpoint
        raise UserError(f"checkpoint {path} can't be read: it is cut short, or no checkpoint "
                        f"({type(e).__name__}). Take another copy.") from None  # fmt: skip


def check_weights(path: Path) -> dict[str, Any]:
    """See that a weights file is whole and safe; returns what it says about itself ({} if nothing).

    Raises UserError. timm does the loading itself, and the renaming of the authors' names.
    """
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder; name the file, for instance {path / 'best.safetensors'}.")
    if path.suffix != ".safetensors":
        state = _torch_load(path)
        if isinstance(state, dict) and "optimizer" in state and "rng" in state:
            raise UserError(f"checkpoint {path} is a resume state; give the .safetensors beside it.")
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            return json.loads((f.metadata() or {}).get("visionattn", "{}"))
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist.") from None
    except (safetensors.SafetensorError, ValueError, OSError) as e:
        raise UserError(f"checkpoint {path} can't be read: it is cut short, or no safetensors file "
                        f"({' '.join(str(e).split())}). Take another copy.") from None  # fmt: skip


def random_states() -> dict[str, Any]:
    """Python's, numpy's and torch's generators (and this process's GPU), as plain data."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_states(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def make_run_folder(output: str, model: str, stamp: str) -> Path:
    """A fresh ``output/<time>-<model>``; two runs of the same second get different ones. Raises UserError."""
    name = f"{stamp}-{model.replace('/', '_').replace(':', '_')}"
    for i in range(1, 1000):
        path = Path(output) / (name if i == 1 else f"{name}-{i}")
        with contextlib.suppress(FileExistsError):
            try:
                path.mkdir(parents=True)
            except OSError as e:
                if isinstance(e, FileExistsError) and Path(output).is_dir():
                    raise
                raise UserError(f"output={output} can't hold run folders ({e.strerror}); give another.") from None
            return path
    raise UserError(f"output={output} holds 1000 runs of this second already; give another.")


def lock(run: Path) -> TextIO:
    """Holds the folder for this process, and clears what a killed one left half-written. Raises UserError."""
    handle = _files.lock(run, UserError, "start a new run")
    sweep(run, "*")
    return handle


def find_run(resume: str, output: str, model: str) -> Path | None:
    """The ``.state.pt`` that ``--resume`` means; None where ``auto`` finds no run of the model. Raises UserError."""
    if resume == "auto":
        runs = sorted(Path(output).glob("*/last.state.pt"), key=lambda p: p.stat().st_mtime, reverse=True)
        for path in runs:
            config = path.parent / "config.yaml"
            if config.is_file() and f"\nmodel: {model}\n" in config.read_text(encoding="utf-8"):
                return path
        return None
    path = Path(resume)
    if path.is_dir():
        path = path / "last.state.pt"
    if not path.is_file():
        raise UserError(f"resume={resume}: {path} does not exist. Give a run folder that holds last.state.pt, or auto.")
    if not (path.parent / "config.yaml").is_file():
        raise UserError(f"resume={resume}: {path.parent} has no config.yaml, so it is no run folder.")
    return path
