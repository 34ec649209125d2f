"""Tiny pipelines with every component present and random weights, built in place."""

from pathlib import Path

from diffusers import AutoencoderKL, DiTPipeline, FluxPipeline
from diffusers.schedulers import DDIMScheduler
from transformers import CLIPTokenizer

from visionattn.diffusion.tiny import tiny_clip_tokenizer, tiny_flux, tiny_vae

from . import tiny


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    return tiny_clip_tokenizer(16)


def _vae(latents: int) -> AutoencoderKL:
    return tiny_vae(latents)


def flux(folder: Path) -> FluxPipeline:
    return tiny_flux()


def dit() -> DiTPipeline:
    pipe = DiTPipeline(transformer=tiny.randomise(tiny._dit()), vae=_vae(4), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
