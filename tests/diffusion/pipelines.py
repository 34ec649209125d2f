"""Tiny pipelines with every component present and random weights, built in place."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.schedulers import DDIMScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

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


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def _vae(latents: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=latents, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.5,
    ).eval()  # fmt: skip


def flux(folder: Path) -> FluxPipeline:
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=80,
        max_position_embeddings=16, projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=16, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = tiny.randomise(tiny._flux())
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=_vae(1),
        text_encoder=CLIPTextModel(clip).eval(), tokenizer=_clip_tokenizer(folder / "clip"),
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=_t5_tokenizer(), transformer=model,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> DiTPipeline:
    pipe = DiTPipeline(transformer=tiny.randomise(tiny._dit()), vae=_vae(4), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
