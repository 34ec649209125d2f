"""An authors' checkpoint as safetensors with timm's metadata, by the rules that ``pretrained=True`` uses."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from visionattn.models._checkpoint import unwrap_state_dict

from .machine import CheckpointError
from .reader import Inert, Limits, read_checkpoint


@dataclass(frozen=True)
class Conversion:
    """What became of a file's tensors; every one of them is in exactly one of the lists.

    Args:
        kept: names that stayed.
        renamed: (name in the file, name in the model) of tensors with the same numbers.
        dropped: tensors of the file that the model holds nowhere (buffers that are computed, another training state).
        computed: the model's tensors that are in the file in no form (resized tables, its own buffers).
    """

    model: str
    file: str
    kept: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    computed: tuple[str, ...]
    beside: tuple[str, ...] = ()
    out: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.file} as {self.model}: {len(self.kept)} names kept, {len(self.renamed)} renamed, "
            f"{len(self.dropped)} dropped, {len(self.computed)} computed"
        ]
        lines += [f"  renamed   {a} -> {b}" for a, b in self.renamed[:20]]
        if len(self.renamed) > 20:
            lines.append(f"  ... and {len(self.renamed) - 20} more")
        lines += [f"  dropped   {name}" for name in self.dropped]
        lines += [f"  computed  {name}" for name in self.computed]
        if self.beside:
            lines.append(f"  beside the weights, not kept: {', '.join(self.beside)}")
        if self.out:
            lines.append(f"written to {self.out}")
        return "\n".join(lines)


def convert(
    file: str | os.PathLike, name: str, out: str | os.PathLike | None = None, strict: bool = True, **model_args: Any
) -> Conversion:
    """Loads ``file`` into the model called ``name`` and writes it as safetensors.

    Args:
        file: an untrusted checkpoint; see :func:`read_checkpoint`.
        out: a folder (it gets ``model.safetensors`` and ``config.json``), or the path of a ``.safetensors`` file, whose
            ``config.json`` is written beside it; ``timm.create_model('local-dir:FOLDER')`` reads both. None: no file.
        strict: whether names that are missing or left over are an error.
        model_args: for ``timm.create_model``, ``num_classes`` for instance.

    Raises:
        CheckpointError: for a file that is not read or does not fit, or a ``config.json`` of another model at ``out``.
    """
    content = read_checkpoint(file, Limits())
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state dict")
    source = unwrap_state_dict(content)
    source = {k: v for k, v in source.items() if isinstance(v, torch.Tensor)}
    if not source:
        raise CheckpointError(f"{file} holds no tensors under {', '.join(map(str, list(content)[:5]))}")
    overlay: dict[str, Any] = {"state_dict": dict(source)}
    if "num_classes" in model_args:
        overlay["num_classes"] = model_args["num_classes"]
    if not strict:
        model_args["pretrained_strict"] = False
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
    beside = tuple(
        k for k, v in content.items() if isinstance(k, str) and not isinstance(v, torch.Tensor) and v is not source
    )
    report = _compare(source, model, str(file), name, tuple(k for k in beside if not _holds(content[k], source)))
    if out is None:
        return report
    written = _write(model, Path(out), _reused(model_args))
    return Conversion(**{**asdict(report), "out": str(written)})


def _holds(value: Any, source: dict[str, torch.Tensor]) -> bool:
    return (
        isinstance(value, dict)
        and not isinstance(value, Inert)
        and any(v is w for v, w in zip(value.values(), source.values(), strict=False))
    )


def _reused(model_args: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in model_args.items() if k not in ("num_classes", "pretrained_strict", "features_only")}


def _print_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{tensor.numel()}".encode())  # a (C, 1, 1) parameter may be (C,) elsewhere
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.digest()


def _compare(
    source: dict[str, torch.Tensor], model: nn.Module, file: str, name: str, beside: tuple[str, ...]
) -> Conversion:
    own = model.state_dict()
    kept = [k for k, v in source.items() if k in own and _print_of(own[k].to(v.dtype)) == _print_of(v)]
    rest = {k: v for k, v in source.items() if k not in set(kept)}
    by_print: dict[bytes, list[str]] = {}
    for k, v in own.items():
        if k not in set(kept):
            by_print.setdefault(_print_of(v), []).append(k)
    renamed, dropped = [], []
    for k, v in rest.items():
        matches = by_print.get(_print_of(v.float() if v.is_floating_point() else v), [])
        if matches:
            renamed.append((k, matches.pop(0)))
        else:
            dropped.append(k)
    found = {*kept, *(b for _, b in renamed)}
    computed = [k for k in own if k not in found]
    return Conversion(name, file, tuple(kept), tuple(renamed), tuple(dropped), tuple(computed), beside)


def _write(model: nn.Module, out: Path, model_args: dict[str, Any]) -> Path:
    single = out.suffix == ".safetensors"
    folder = out.parent if single else out
    target = out if single else out / "model.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".convert-") as temporary:
        save_for_hf(model, temporary, model_args=model_args or None, safe_serialization=True)
        config = (Path(temporary) / "config.json").read_text()
        present = folder / "config.json"
        if present.exists() and json.loads(present.read_text()) != json.loads(config):
            raise CheckpointError(f"{present} belongs to another model: choose a folder of its own for {out.name}")
        state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
        new = Path(temporary) / "new.safetensors"
        save_file(state, new, metadata={"format": "pt", "timm_config": json.dumps(json.loads(config))})
        os.replace(new, target)
        os.replace(Path(temporary) / "config.json", present)
    return target
