"""CLEAR (Liu, Tan, Wang; arXiv 2412.16112): its published projections on FLUX.1, and its high-resolution recipe.

The files hold the distilled q, k, v and output projections under diffusers' names; the pooled ones add one weighting of
f x f positions a layer. The weights derive from FLUX.1-dev, whose licence is non-commercial.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionattn.ops.local.patterns import Disk

from .patch import Handle, sparsify

_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?")


def load_clear(
    pipe: Any,
    file: str | os.PathLike,
    radius: int | None = None,
    downsample: int | None = None,
    **options: Any,
) -> Handle:
    """Patches CLEAR's disk and puts its distilled projections in the place of the transformer's own.

    Args:
        pipe: a FLUX.1 pipeline or its transformer.
        file: ``clear_local_{8,16,32}.safetensors`` or ``clear_local_{8,16}_down_4.safetensors``, or one's own
            distillation in that layout.
        radius, downsample: of the disk, read from the file's name by default.
        options: for :func:`sparsify` (``proportional=True`` for resolutions above the training's).

    Returns:
        The handle; its ``remove()`` restores the transformer's own weights too, from a copy on the CPU.

    Raises:
        FileNotFoundError: for a path that is none.
        ValueError: for a file whose names or shapes are not the transformer's, or a name that tells no radius.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file: give the path of a CLEAR checkpoint (clear_local_16.safetensors)"
        )
    match = _NAME.search(path.name)
    if radius is None:
        if match is None:
            raise ValueError(f"{path.name} tells no radius: pass radius=")
        radius, downsample = int(match[1]), downsample or (int(match[2]) if match[2] else None)
    from safetensors.torch import load_file

    state = load_file(path)
    transformer = pipe if isinstance(pipe, nn.Module) else pipe.transformer
    transformer = getattr(transformer, "_orig_mod", transformer)
    handle = sparsify(pipe, Disk(radius, downsample), **options)
    try:
        layers = handle.sessions[0].layers
        weights, pooling = _sort(state, transformer, layers, path.name, downsample)
        own = _exchange(transformer, weights)
    except Exception:
        handle.remove()
        raise
    for name, weight in pooling.items():
        layers[name].pool_weight = weight
    handle.on_remove.append(lambda: _exchange(transformer, own))
    return handle


def _sort(state: dict, transformer: nn.Module, layers: dict, file: str, downsample: int | None) -> tuple[dict, dict]:
    """The file's projections by parameter name, and its pooling weights (f, f) by layer."""
    own = dict(transformer.named_parameters())
    weights, pooling = {}, {}
    for name, value in state.items():
        if name.endswith("spatial_weight"):
            layer = next((n for n in layers if name.startswith(n + ".")), None)
            if layer is None:
                raise ValueError(f"{file}: {name} belongs to no attention of this transformer")
            pooling[layer] = value.reshape(value.shape[3], value.shape[5])
        elif name not in own or own[name].shape != value.shape:
            here = f"it is {tuple(own[name].shape)} here" if name in own else "this transformer has no such parameter"
            raise ValueError(f"{file} is not for this transformer: {name} {tuple(value.shape)}, {here}")
        else:
            weights[name] = value
    lacking = [n for n in layers if f"{n}.to_q.weight" not in weights]
    if lacking:
        raise ValueError(f"{file} has no projections for {len(lacking)} of {len(layers)} layers ({lacking[0]} ...)")
    if pooling and downsample is None:
        raise ValueError(f"{file} has pooling weights: pass downsample={next(iter(pooling.values())).shape[0]}")
    if pooling and (set(pooling) != set(layers) or any(w.shape != (downsample,) * 2 for w in pooling.values())):
        raise ValueError(f"{file}: its pooling weights are not {downsample} x {downsample}, one for each layer")
    return weights, pooling


@torch.no_grad()
def _exchange(transformer: nn.Module, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies ``new`` into the parameters of these names, in place; returns what was there, on the CPU."""
    own = dict(transformer.named_parameters())
    old = {name: own[name].detach().to("cpu", copy=True) for name in new}
    for name, value in new.items():
        own[name].copy_(value)
    return old


@contextlib.contextmanager
def rope_factor(transformer: nn.Module, factor: float) -> Iterator[None]:
    """FLUX's rotary base times ``factor`` (NTK scaling), inside of the block.

    Raises:
        ValueError: for a transformer without a rotary base.
    """
    module = getattr(transformer, "_orig_mod", transformer)
    embed = getattr(module, "pos_embed", None)
    if not hasattr(embed, "theta"):
        raise ValueError(f"{type(module).__name__} has no rotary base to scale")
    theta = embed.theta
    embed.theta = theta * factor
    try:
        yield
    finally:
        embed.theta = theta


def upscale_generate(
    pipe: Any,
    prompt: Any = None,
    height: int = 4096,
    width: int = 4096,
    base_height: int = 1024,
    base_width: int = 1024,
    strength: float = 0.7,
    guidance_scale: float = 7.5,
    base_guidance_scale: float = 3.5,
    num_inference_steps: int = 20,
    ntk_factor: float = 10.0,
    shift: float = 10.0,
    generator: torch.Generator | None = None,
    **arguments: Any,
) -> Any:
    """CLEAR's high-resolution recipe (section 4.3): a low-resolution pass, upscaling, image to image at the full size.

    The second pass has the rotary base scaled and a fixed time shift, and decodes in tiles. The pipeline's scheduler,
    rotary base and tiling are what they were afterwards, also after an error. Patch the pipeline before
    (:func:`load_clear` or :func:`sparsify`, with ``proportional=True``); unpatched it runs dense.

    Args:
        pipe: a FLUX.1 text-to-image pipeline.
        height, width: pixels of the result; base_height, base_width those of the first pass.
        strength: share of the steps that the second pass repeats.
        arguments: for both passes, ``prompt_embeds`` for instance.

    Returns:
        What the image-to-image pipeline returns (``.images``).

    Raises:
        ValueError: for sizes that are not multiples of 16, or a pipeline that is not FLUX.1's.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline

    if any(n % 16 for n in (height, width, base_height, base_width)):
        raise ValueError(f"{height} x {width} from {base_height} x {base_width}: give multiples of 16 pixels")
    if not type(pipe).__name__.startswith("Flux"):
        raise ValueError(f"{type(pipe).__name__} is no FLUX.1 pipeline: the recipe is for that")
    common = {"prompt": prompt, "generator": generator, "num_inference_steps": num_inference_steps, **arguments}
    low = pipe(height=base_height, width=base_width, guidance_scale=base_guidance_scale, **common).images
    second = FluxImg2ImgPipeline(**{k: v for k, v in pipe.components.items() if k in _parts(FluxImg2ImgPipeline)})
    second.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, use_dynamic_shifting=False, shift=shift
    )
    second.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    tiled = pipe.vae.use_tiling if hasattr(pipe.vae, "use_tiling") else False
    pipe.vae.enable_tiling()
    try:
        with rope_factor(pipe.transformer, ntk_factor):
            images = [image.resize((width, height), 3) for image in low]  # 3: bicubic
            return second(
                image=images, height=height, width=width, strength=strength, guidance_scale=guidance_scale, **common
            )
    finally:
        if not tiled:
            pipe.vae.disable_tiling()


def _parts(cls: type) -> set[str]:
    import inspect

    return set(inspect.signature(cls.__init__).parameters) - {"self"}
