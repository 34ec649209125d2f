"""Tiny pipelines with every component present and random weights, built in place."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, FluxPipeline
from diffusers.schedulers import DDIMScheduler
from transformers import CLIPTokenizer

from visionattn.diffusion.tiny import tiny_flux

from . import tiny

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "in", "the", "snow", "cat"]


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for word in WORDS:
        vocab[f"{word}</w>"] = len(vocab)
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter] = len(vocab)
        vocab[f"{letter}</w>"] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def _vae(latents: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=latents, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.5,
    ).eval()  # fmt: skip


def flux(folder: Path) -> FluxPipeline:
    return tiny_flux()


def dit() -> DiTPipeline:
    pipe = DiTPipeline(transformer=tiny.randomise(tiny._dit()), vae=_vae(4), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
