"""Weights for a backbone: the authors' classification files, ours, a tag of the zoo, a detector's file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from visionattn.models._checkpoint import CheckpointError, read_state_dict, unwrap_state_dict

from .traits import classifier_on_meta, drop_tail, is_ours

__all__ = ["CheckpointError", "load_donor", "read"]


def read(checkpoint: str | os.PathLike, prefix: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a local file, with PyTorch's safe reader; those under ``prefix`` (removed), where it is given.

    A detector's file with our backbone in it needs no prefix.

    Raises:
        FileNotFoundError, CheckpointError: one line each.
    """
    state = {name: value for name, value in read_state_dict(checkpoint).items() if isinstance(value, torch.Tensor)}
    if not prefix and any(name.startswith("backbone.net.") for name in state):
        prefix = "backbone."
    if not prefix:
        return state
    prefix = prefix.rstrip(".") + "."
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not chosen:
        tops = sorted({name.partition(".")[0] for name in state})
        raise CheckpointError(
            f"checkpoint {checkpoint} has nothing under prefix={prefix!r}: its names begin with {', '.join(tops[:5])}"
        )
    return chosen


def source_of(arch: str, checkpoint: str | os.PathLike | bool) -> tuple[str, dict[str, Any]]:
    """What ``checkpoint`` stands for: (name for timm.create_model, pretrained_cfg_overlay).

    Raises:
        FileNotFoundError: for something that looks like a file and is none.
        ValueError: for a tag that the model does not have.
    """
    if checkpoint is True:
        return arch, {}
    text = os.fspath(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else ""
    if text.startswith(("http://", "https://")):
        return arch, dict(url=text, file="", hf_hub_id="", source="url")
    for scheme in ("hf-hub:", "hf_hub:"):
        if text.startswith(scheme):
            return arch, dict(hf_hub_id=text.removeprefix(scheme), file="", source="hf-hub")
    if Path(text).is_file():
        return arch, dict(file=text)
    tags = list(get_arch_pretrained_cfgs(arch))  # agent_swin_tiny.in1k ...
    for full in (text, f"{arch}.{text}"):
        if full in tags:
            return full, {}
    if text.endswith((".pth", ".pt", ".bin", ".safetensors", ".ckpt")) or os.sep in text:
        raise FileNotFoundError(f"checkpoint {text} does not exist: give the path of a .pth or .safetensors file")
    raise ValueError(
        f"checkpoint={checkpoint!r} is no file, no address, and no tag of {arch}, which has {', '.join(tags) or 'none'}"
    )


def load_donor(name: str, build: Mapping[str, Any], overlay: Mapping[str, Any]) -> nn.Module:
    """``timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **build)``, checked.

    timm does not compare names once it has left a classifier out, so this does.

    Raises:
        CheckpointError: for weights that are not the model's, in one line.
    """
    overlay = dict(overlay)
    label = str(overlay.get("file") or overlay.get("url") or overlay.get("hf_hub_id") or name)
    arch = name.partition(".")[0]
    build = dict(build, pretrained=True, pretrained_cfg_overlay=overlay)
    if is_ours(arch):
        try:
            return timm.create_model(name, **build)
        except CheckpointError:
            raise
        except RuntimeError as error:
            raise CheckpointError(f"{name}: {_first_line(error)}") from error
    if file := overlay.pop("file", None):
        overlay["state_dict"] = read_state_dict(file)
    if "state_dict" in overlay:
        overlay["state_dict"] = unwrap_state_dict(overlay["state_dict"])
    full = classifier_on_meta(arch, build)
    loads: list[Any] = []
    plain = type(full).load_state_dict

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loads.append((plain(self, *args, **kwargs), len(self.state_dict())))
        return loads[-1][0]

    try:
        with mock.patch.object(type(full), "load_state_dict", recorded):
            donor = timm.create_model(name, **build)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {label} does not fit {arch} ({_first_line(error)}): choose the model that it was made for"
        ) from error
    _check(loads, full.pretrained_cfg, arch, label)
    return drop_tail(donor)


def _check(loads: list[Any], cfg: Mapping[str, Any], arch: str, label: str) -> None:
    classifiers = cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = tuple(f"{name}." for name in classifiers)
    for result, count in loads:
        missing = [n for n in result.missing_keys if not n.startswith(heads) and not n.endswith("num_batches_tracked")]
        strange = [n for n in result.unexpected_keys if not n.startswith(heads)]
        if missing or len(strange) > count // 10:
            wrong = f"lacks {len(missing)} of {count} names ({', '.join(missing[:3])})" if missing else ""
            more = f"has {len(strange)} that are not the model's ({', '.join(strange[:3])})" if strange else ""
            raise CheckpointError(
                f"checkpoint {label} does not fit {arch}: it {' and '.join(filter(None, (wrong, more)))}; "
                "choose the model that it was made for"
            )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] if lines else type(error).__name__
