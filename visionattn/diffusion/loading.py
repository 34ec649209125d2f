"""A pipeline by name, on its device: what the commands start from."""

import sys
from typing import Any

import diffusers
import torch

from .tiny import tiny_flux


def load_pipeline(
    name: str | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    offload: str = "none",
    vae_tiling: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The pipeline that diffusers' ``from_pretrained`` makes of ``name``, and in words what it is and where it runs.

    Args:
        name: a repository or a folder; None means :func:`tiny_flux`.
        dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``; by default bfloat16, float32 on a CPU.
        device: by default a CUDA device if there is one (the tiny pipeline: the CPU).
        offload: of the weights to the CPU's memory: ``'none'``, ``'model'`` or ``'sequential'``.
        vae_tiling: decode in tiles.

    Raises:
        ValueError: for what can't be loaded, a device that is not there, or an offload without an accelerator.
    """
    device = device or ("cuda" if name is not None and torch.cuda.is_available() else "cpu")
    on_cpu = device.startswith("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = (str(e).splitlines() or ["unknown"])[0]
        raise ValueError(f"--device {device} can't be used: {reason}") from None
    if offload != "none" and on_cpu:
        raise ValueError(f"--offload {offload} needs an accelerator: leave it out on a CPU")
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    pipe = _tiny(dtype) if name is None else _pretrained(name, dtype)
    if vae_tiling:
        if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
            raise ValueError(f"--vae-tiling: {type(pipe).__name__} has no autoencoder that decodes in tiles")
        pipe.vae.enable_tiling()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe, {
        "pipeline": name or "a tiny FLUX.1 with random weights", "class": type(pipe).__name__, "dtype": dtype,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "offload": offload, "vae_tiling": vae_tiling,
        "torch": torch.__version__, "diffusers": diffusers.__version__,
    }  # fmt: skip


def _tiny(dtype: str) -> Any:
    pipe = tiny_flux()
    if dtype != "float32":
        pipe.to(dtype=getattr(torch, dtype))
    return pipe


def _pretrained(name: str, dtype: str) -> Any:
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"--pipeline {name} can't be loaded as a diffusers pipeline: {reason}") from None
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe
