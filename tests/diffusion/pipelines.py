"""Tiny pipelines with every component present and random weights, built in place."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiTPipeline, FluxPipeline
from diffusers.schedulers import DDIMScheduler
from transformers import CLIPTokenizer

from visionattn.diffusion.tiny import tiny_clip_tokenizer, tiny_flux

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


def _t5() -> dict:
    """T5's encoder and a tokenizer of letters, as FLUX's tiny pipeline has them."""
    pipe = tiny_flux()
    return {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}


def _clip(projection: bool = False) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=80,
        max_position_embeddings=77, projection_dim=4, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def sd3() -> diffusers.StableDiffusion3Pipeline:
    t5 = _t5()
    clips = {name: _clip(projection=True) for name in ("text_encoder", "text_encoder_2")}
    return _quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=tiny.randomise(tiny._sd3()), scheduler=_flow(), vae=_vae(4), **clips,
            tokenizer=tiny_clip_tokenizer(), tokenizer_2=tiny_clip_tokenizer(), text_encoder_3=t5["text_encoder"],
            tokenizer_3=t5["tokenizer"],
        )
    )  # fmt: skip


def pixart() -> diffusers.PixArtSigmaPipeline:
    return _quiet(
        diffusers.PixArtSigmaPipeline(
            **_t5(), vae=_vae(4), transformer=tiny.randomise(tiny._pixart()), scheduler=DDIMScheduler()
        )
    )


def _video_vae(kind: type) -> torch.nn.Module:
    """Wan's and Qwen-Image's: 8 x 8 pixels and, but for the first, 4 frames a latent."""
    torch.manual_seed(0)
    return kind(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def _umt5() -> dict:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    return {"text_encoder": UMT5EncoderModel(config).eval(), "tokenizer": _t5()["tokenizer"]}


def wan(two: bool = False) -> diffusers.WanPipeline:
    """Wan 2.1, or 2.2 with its two networks for high and low noise."""
    more = {"transformer_2": tiny.randomise(tiny._wan()), "boundary_ratio": 0.9} if two else {}
    return _quiet(
        diffusers.WanPipeline(
            **_umt5(), vae=_video_vae(diffusers.AutoencoderKLWan), scheduler=_flow(),
            transformer=tiny.randomise(tiny._wan()), **more,
        )
    )  # fmt: skip


def ltx(conditions: bool = False) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    kind = diffusers.LTXConditionPipeline if conditions else diffusers.LTXPipeline
    return _quiet(kind(**_t5(), vae=vae.eval(), scheduler=_flow(), transformer=tiny.randomise(tiny._ltx())))


def cogvideox() -> diffusers.CogVideoXPipeline:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return _quiet(
        diffusers.CogVideoXPipeline(
            **_t5(), vae=vae.eval(), transformer=tiny.randomise(tiny._cogvideox()),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        )
    )  # fmt: skip


def hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=32, hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return _quiet(
        diffusers.HunyuanVideoPipeline(
            text_encoder=LlamaModel(llama).eval(), tokenizer=_t5()["tokenizer"], vae=vae.eval(), scheduler=_flow(),
            transformer=tiny.randomise(tiny._hunyuan(patch_size=2)), text_encoder_2=_clip(),
            tokenizer_2=tiny_clip_tokenizer(),
        )
    )  # fmt: skip


def qwen() -> diffusers.QwenImagePipeline:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=32, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, rope_parameters=dict(type="default", mrope_section=[1, 1, 1], rope_theta=1e4),
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=12),
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer=_t5()["tokenizer"],
        vae=_video_vae(diffusers.AutoencoderKLQwenImage), scheduler=_flow(),
        transformer=tiny.randomise(
            diffusers.QwenImageTransformer2DModel(
                patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
            )
        ),
    )  # fmt: skip
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return _quiet(pipe)


def flux2() -> diffusers.Flux2KleinPipeline:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=4, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    tokenizer = _t5()["tokenizer"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=1, norm_num_groups=2,
    )  # fmt: skip
    return _quiet(
        diffusers.Flux2KleinPipeline(
            text_encoder=Qwen3ForCausalLM(config).eval(), tokenizer=tokenizer, vae=vae.eval(), scheduler=_flow(),
            transformer=tiny.randomise(tiny._flux2()),
        )
    )  # fmt: skip


def flux_kontext() -> diffusers.FluxKontextPipeline:
    return _quiet(diffusers.FluxKontextPipeline(**tiny_flux().components))


def flux_fill() -> diffusers.FluxFillPipeline:
    """Its transformer is given the picture's latents and an 8 x 8 mask for each of the 2 x 2 latents besides."""
    parts = tiny_flux().components
    model = diffusers.FluxTransformer2DModel.from_config({**parts["transformer"].config, "in_channels": 264})
    model.proj_out = torch.nn.Linear(32, 4)
    parts = {k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
    return _quiet(diffusers.FluxFillPipeline(**{**parts, "transformer": tiny.randomise(model)}))
