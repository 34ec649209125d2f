"""A tiny FLUX.1 pipeline with random weights and all its parts: for tests, examples and trying a command on a CPU.

Its pictures mean nothing. What it shares with the real one is the code that runs: diffusers' own pipeline, transformer,
text encoders, autoencoder and scheduler.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_flux(seed: int = 0) -> Any:
    """A ``diffusers.FluxPipeline`` of about 100,000 parameters, float32, on the CPU.

    Prompts are read letter by letter; pictures have sides of any multiple of 16 px, a token covering 16 x 16 of them.

    Args:
        seed: of the weights; the global generator of random numbers is left as it was.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=80,
        max_position_embeddings=77, projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=32, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = dict(text_encoder=CLIPTextModel(clip).eval(), text_encoder_2=T5EncoderModel(t5).eval())
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=tiny_vae(1, seed),
        tokenizer=tiny_clip_tokenizer(), tokenizer_2=tiny_t5_tokenizer(), transformer=tiny_flux_transformer(seed),
        **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux_transformer(seed: int = 0) -> nn.Module:
    """One double and two single blocks of two heads, random weights also where diffusers begins with zeros."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    return randomise(model, seed)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: some transformers begin with zeros, under which any attention is as good."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.1))
    return model.eval()


def tiny_vae(latent_channels: int, seed: int = 0) -> nn.Module:
    """An autoencoder that halves three times, as FLUX's."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=latent_channels, sample_size=64,
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.5,
        ).eval()  # fmt: skip


def tiny_clip_tokenizer(length: int = 77) -> Any:
    """Byte pairs without a merge: letters. At most ``length`` tokens, the real one's 77."""
    from transformers import CLIPTokenizer

    names = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(names)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def tiny_t5_tokenizer() -> Any:
    """Letters, and one token for whatever else is no space."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", *_LETTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(names)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
