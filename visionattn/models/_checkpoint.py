"""Files of weights: reading the authors' safely, and fitting them to a model of the zoo.

Every family builds its models through :func:`build_model_with_cfg` of this module, not timm's, and begins its
``checkpoint_filter_fn`` with :func:`unwrap_state_dict`. Then ``timm.create_model(name, pretrained=True,
pretrained_cfg_overlay=dict(file=...))`` reads files that carry a yacs or argparse configuration beside the weights, and
says in one line what is wrong with a file that it can't use.
"""

import argparse
import collections
import hashlib
import http.client
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import resolve_pretrained_cfg
from torch import nn

from visionattn import _timm

from ._shipped import resolve

__all__ = ["CheckpointError", "build_model_with_cfg", "read_state_dict", "unwrap_state_dict"]

# an EMA wins where a file holds both: timm's trainer and the authors' report the averaged weights
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module")
# what wrapping a network in DDP or torch.compile puts before every name
PREFIXES = ("module.", "_orig_mod.")

BACKBONE = "backbone."  # what stands before a backbone's names in a detector's or segmentor's file

# Configurations that lie beside the weights of published files. A yacs one is read as an OrderedDict, the only class of
# dictionaries that PyTorch's safe reader fills, so yacs need not be there.
INERT_GLOBALS = [
    (collections.OrderedDict, "yacs.config.CfgNode"),
    (argparse.Namespace, "argparse.Namespace"),
]

SAFE_DIRECTORY_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm's save_for_hf writes


class CheckpointError(RuntimeError):
    """A file of weights can't be read or does not fit the model. One line: the file, what is wrong, what to do."""


def unwrap_state_dict(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint: wrappers opened, the prefixes of DDP and torch.compile removed."""
    state_dict = checkpoint
    opened = True
    while opened:
        opened = False
        for key in WRAPPERS:
            if isinstance(state_dict.get(key), dict) and state_dict[key]:
                state_dict, opened = state_dict[key], True
                break
    for prefix in PREFIXES * 2:  # either may be the outer one
        if state_dict and all(isinstance(name, str) and name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict


def _backbone_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The backbone's part of a detector's or segmentor's checkpoint; any other's whole state dict."""
    state_dict = unwrap_state_dict(checkpoint)
    names = [name for name in state_dict if isinstance(name, str) and name.startswith(BACKBONE)]
    return {name.removeprefix(BACKBONE): state_dict[name] for name in names} or state_dict


def read_state_dict(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads the weights in a PyTorch or safetensors file, with PyTorch's safe reader, onto the CPU.

    Raises:
        FileNotFoundError: where there is no such file.
        CheckpointError: for a file that is damaged, holds more than tensors and inert configurations, or no weights.
    """
    path = Path(file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"checkpoint {path} {what}: give the path of a .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            checkpoint = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals(INERT_GLOBALS):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise half a dozen types, with advice for programmers in several lines
        raise CheckpointError(_why_unreadable(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(checkpoint).__name__}, not a state dict: save model.state_dict() instead"
        )
    state_dict = unwrap_state_dict(checkpoint)
    if not any(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError(
            f"checkpoint {path} holds no weights under {_some(state_dict)}: "
            f"give a state dict, or one under any of {', '.join(WRAPPERS)}"
        )
    return state_dict


def _why_unreadable(path: Path, error: Exception) -> str:
    try:
        with torch.serialization.safe_globals(INERT_GLOBALS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not a file of torch.save, or a damaged one
        names = []
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)  # after PyTorch's advice on its own reader
    if names or (isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL|function|class", text)):
        names.sort(key=lambda name: (name.startswith(("torch.", "collections.")), name))  # the telling ones first
        return (
            f"checkpoint {path} is refused, because its pickle holds more than tensors"
            f"{f' ({_some(names)})' if names else ''} and could run code: "
            "ask for a file of tensors only, or save the state dict anew on a machine where you trust it"
        )
    if not path.stat().st_size:
        return f"checkpoint {path} is empty: fetch it again"
    first = " ".join(text.strip().split("\n", 1)[0].split())[:160]
    return (
        f"checkpoint {path} ({path.stat().st_size:,} bytes) can't be read, it is truncated or no PyTorch or "
        f"safetensors file ({type(error).__name__}: {first}): fetch it again and compare the size"
    )


def build_model_with_cfg(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_filter_fn: Callable[[dict, nn.Module], dict] = lambda state_dict, model: state_dict,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_strict: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """timm's function of this name, whose arguments these are, with our way of loading files.

    A local file (``file`` of the pretrained cfg, or a ``local-dir:`` folder), or the one behind ``url``, is read by
    :func:`read_state_dict` before the model is built. Whatever the source, ``pretrained_filter_fn`` gets what is under
    ``backbone.`` where anything is (a detector's or segmentor's file), and the names and shapes that it returns are
    compared with the model's before anything is copied; integer buffers (index tables, counters) may be absent from a
    file.

    Heads: a head whose number of classes is the model's is loaded; it is left out, and the model's own stays as
    initialised, where the cfg's ``num_classes`` says that the file has another number (timm's rule).

    Raises:
        FileNotFoundError, CheckpointError: see :func:`read_state_dict`; also for a file that does not fit the model.
        ValueError: for ``out_indices`` that the model does not have.
    """
    build = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, **kwargs)
    build["pretrained_strict"] = pretrained_strict
    if not pretrained:
        return _build(model_cls, variant, False, pretrained_filter_fn=pretrained_filter_fn, **build)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    hub = cfg.source == "hf-hub" or (cfg.source != "local-dir" and not cfg.file and cfg.hf_hub_id)
    local = cfg.file if cfg.source == "local-dir" or (not hub and not cfg.state_dict) else None
    weights = None
    if not local and cfg.url and not (hub or cfg.state_dict or cfg.custom_load):
        local = _download(cfg.url, cfg, kwargs.get("cache_dir"))
    if local and not cfg.custom_load:
        file = _file_in(Path(local)) if cfg.source == "local-dir" else local
        weights = read_state_dict(resolve(file))
        # timm takes a state dict before any other source; it gets a stand-in, which the filter below exchanges, because
        # it copies what stands in a cfg
        build["pretrained_cfg_overlay"] = {**(pretrained_cfg_overlay or {}), "state_dict": {"": ""}, "source": ""}
    label = str(file) if weights is not None else str(cfg.hf_hub_id or cfg.url or "given as a state dict")

    def filter_fn(state_dict: dict, model: nn.Module) -> dict:
        if weights is not None:
            state_dict = weights
            model.pretrained_cfg.pop("state_dict")
            model.pretrained_cfg.pop("source")
            if cfg.source is not None:
                model.pretrained_cfg["source"] = cfg.source
        try:
            state_dict = dict(pretrained_filter_fn(_backbone_of(state_dict), model))
        except CheckpointError as error:  # a filter function leaves the file's name to us
            raise CheckpointError(f"checkpoint {label} {error}") from error
        except Exception as error:
            detail = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            raise CheckpointError(
                f"checkpoint {label} is not one of {variant}, its names can't be translated ({detail}): "
                f"choose the model that it belongs to"
            ) from error
        _fit(state_dict, model, variant, label, kwargs, pretrained_strict)
        return state_dict

    return _build(model_cls, variant, True, pretrained_filter_fn=filter_fn, **build)


def _build(model_cls: type[nn.Module], variant: str, pretrained: bool, **build: Any) -> nn.Module:
    """timm's function, with a word on feature maps that a model does not have."""
    asked = build.get("out_indices", (build.get("feature_cfg") or {}).get("out_indices"))
    try:
        return _timm.build_model_with_cfg(model_cls, variant, pretrained, **build)
    except IndexError as error:
        if not build.get("features_only"):
            raise
        raise ValueError(
            f"{variant}: out_indices={asked} names feature maps that the model does not have: "
            "use indices into its feature_info"
        ) from error


def _download(url: str, cfg: Any, cache_dir: str | os.PathLike | None) -> str:
    """The file behind an address, fetched once into timm's cache.

    It is named after the model and tag: some of the authors' addresses end without a name.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    address = hashlib.sha256(url.encode()).hexdigest()[:8]  # another address of the same tag is another file
    path = folder / f"{cfg.architecture}.{cfg.tag or 'untagged'}-{address}.pth"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())  # renames when it is whole
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise CheckpointError(
                f"{url} can't be fetched ({error}): fetch it by hand, and pass pretrained_cfg_overlay=dict(file=...)"
            ) from error
    return str(path)


def _file_in(folder: Path) -> Path:
    """The file of weights in a ``local-dir:`` folder, by timm's rule: the names it saves under first, else by type."""
    for name in SAFE_DIRECTORY_FILES:
        if (folder / name).exists():
            return folder / name
    for suffix in (".safetensors", ".pth", ".pt", ".bin"):
        if found := sorted(folder.glob(f"*{suffix}")):
            return found[0]
    raise FileNotFoundError(f"folder {folder} has no file of weights: it should hold {SAFE_DIRECTORY_FILES[0]}")


def _fit(state_dict: dict, model: nn.Module, variant: str, label: str, kwargs: dict[str, Any], strict: bool) -> None:
    """Compares the names and shapes of a translated state dict with the model's, but for what timm adapts afterwards.

    Adds the model's own integer buffers where the file lacks them.
    """
    cfg = model.pretrained_cfg
    own = model.state_dict()
    for name, value in own.items():
        if name not in state_dict and not value.is_floating_point() and not value.is_complex():
            state_dict[name] = value

    heads = {f"{name}.{part}" for name in _tuple(cfg.get("classifier")) for part in ("weight", "bias")}
    num_classes = 0 if kwargs.get("features_only") else getattr(model, "num_classes", cfg["num_classes"])
    fits = any(name in state_dict for name in heads) and all(
        name in state_dict and name in own and state_dict[name].shape == own[name].shape
        for name in heads
        if name in own or name in state_dict
    )
    if fits and num_classes:
        cfg["num_classes"] = num_classes  # of the file; timm leaves the head out where it differs from the model's
    ignored = set(heads) if num_classes != cfg["num_classes"] else set()
    if kwargs.get("in_chans", 3) != (cfg.get("input_size") or (3,))[0]:
        ignored |= {f"{name}.weight" for name in _tuple(cfg.get("first_conv"))}

    missing = [name for name in own if name not in state_dict and name not in ignored]
    left_over = [name for name in state_dict if name not in own and name not in ignored]
    shapes = {
        name: f"{name} is {tuple(state_dict[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state_dict and name not in ignored and state_dict[name].shape != own[name].shape
    }
    if not strict and len(missing) < len(own):
        missing = left_over = []
    if not (missing or left_over or shapes):
        return
    wrong = []
    if missing:
        wrong.append(f"it lacks {len(missing)} of {len(own)} names ({_some(missing)})")
    if left_over:
        wrong.append(f"{len(left_over)} of its names are not the model's ({_some(left_over)})")
    if shapes:
        wrong.append(f"{len(shapes)} shapes differ ({_some(shapes.values(), 2)})")
    advice = "choose the model, and the arguments, that it was made for"
    if {*missing, *left_over, *shapes} <= heads:
        classes = [len(state_dict[name]) for name in heads if name in shapes]
        if classes:
            advice = f"say so with num_classes={classes[0]} in pretrained_cfg_overlay, beside file"
        elif missing:
            advice = "it has no classifier, so build the model with num_classes=0 or features_only=True"
    raise CheckpointError(f"checkpoint {label} does not fit {variant}: {'; '.join(wrong)}; {advice}")


def _tuple(names: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return () if not names else (names,) if isinstance(names, str) else tuple(names)


def _some(names, limit: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "") or "nothing"
