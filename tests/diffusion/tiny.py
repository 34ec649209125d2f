"""Tiny transformers of diffusers with random weights, and a call of each: everything of the real ones, but small."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

HEIGHT, WIDTH = 6, 5
FRAMES = 3


@dataclass
class Case:
    """A model, its inputs for a grid, and where grid and text lie."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[..., dict[str, Any]]
    ndim: int = 2
    text: int | None = 4  # None: as many as a frame has
    text_first: bool = True


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: some of these models begin with zeros, under which any attention is as good."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.1))
    return model.eval()


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_ids(height: int, width: int, time: int = 0, columns: int = 3) -> torch.Tensor:
    ids = torch.zeros(height, width, columns)
    ids[..., 0] = time
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(-1, columns)


def _flux() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def _flux_inputs(grid=(HEIGHT, WIDTH), batch=1, references=0, text=4) -> dict[str, Any]:
    ids = image_ids(*grid)
    if references:
        ids = torch.cat([ids, image_ids(references, grid[1], time=1)])
    return dict(
        hidden_states=noise(batch, len(ids), 4), encoder_hidden_states=noise(batch, text, 12, seed=2),
        pooled_projections=noise(batch, 8, seed=3), timestep=torch.full((batch,), 0.5), img_ids=ids,
        txt_ids=torch.zeros(text, 3), guidance=torch.ones(batch),
    )  # fmt: skip


def _chroma() -> torch.nn.Module:
    return diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip


def _chroma_inputs(grid=(HEIGHT, WIDTH), batch=1, text=4, lengths=None) -> dict[str, Any]:
    inputs = _flux_inputs(grid, batch, text=text)
    del inputs["pooled_projections"], inputs["guidance"]
    if lengths is not None:
        valid = torch.arange(text)[None, :] < torch.tensor(lengths)[:, None]
        inputs["attention_mask"] = torch.cat([valid, valid.new_ones(batch, grid[0] * grid[1])], dim=1)
    return inputs


def _flux2() -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16,
    )  # fmt: skip


def _flux2_inputs(grid=(HEIGHT, WIDTH), batch=1, references=0, text=4) -> dict[str, Any]:
    ids = image_ids(*grid, columns=4)
    if references:
        ids = torch.cat([ids, image_ids(references, grid[1], time=10, columns=4)])
    return dict(
        hidden_states=noise(batch, len(ids), 4), encoder_hidden_states=noise(batch, text, 12, seed=2),
        timestep=torch.full((batch,), 0.5), img_ids=ids, txt_ids=torch.zeros(text, 4), guidance=torch.ones(batch),
    )  # fmt: skip


def _flux3() -> torch.nn.Module:
    return diffusers.Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def _flux3_inputs(grid=(HEIGHT, WIDTH), batch=1, references=0, text=4) -> dict[str, Any]:
    more = {}
    if references:
        ids = image_ids(references, grid[1], time=1, columns=4)
        more = dict(image_cond_hidden_states=noise(batch, len(ids), 4, seed=5), image_cond_ids=ids)
    ids = image_ids(*grid, columns=4)
    return dict(
        hidden_states=noise(batch, len(ids), 4), encoder_hidden_states=noise(batch, text, 12, seed=2),
        timestep=torch.full((batch,), 0.5), img_ids=ids, txt_ids=torch.zeros(text, 4), **more,
    )  # fmt: skip


def _qwen() -> torch.nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _qwen_inputs(grid=(HEIGHT, WIDTH), batch=1, references=0, text=4, lengths=None) -> dict[str, Any]:
    shapes = [(1, *grid)] + ([(1, references, grid[1])] if references else [])
    n = sum(h * w for _, h, w in shapes)
    mask = None
    if lengths is not None:
        mask = torch.arange(text)[None, :] < torch.tensor(lengths)[:, None]
    return dict(
        hidden_states=noise(batch, n, 4), encoder_hidden_states=noise(batch, text, 12, seed=2),
        encoder_hidden_states_mask=mask, timestep=torch.full((batch,), 0.5), img_shapes=[shapes] * batch,
    )  # fmt: skip


def _hunyuan(patch_size=1) -> torch.nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=patch_size, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def _hunyuan_inputs(grid=(FRAMES, HEIGHT, WIDTH), batch=1, text=4, lengths=None) -> dict[str, Any]:
    lengths = lengths or [text] * batch
    mask = (torch.arange(text)[None, :] < torch.tensor(lengths)[:, None]).long()
    return dict(
        hidden_states=noise(batch, 4, *grid), timestep=torch.full((batch,), 500), encoder_attention_mask=mask,
        encoder_hidden_states=noise(batch, text, 12, seed=2), pooled_projections=noise(batch, 8, seed=3),
        guidance=torch.ones(batch) * 1000.0,
    )  # fmt: skip


def _wan() -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip


def _wan_inputs(grid=(FRAMES, HEIGHT, WIDTH), batch=1) -> dict[str, Any]:
    t, h, w = grid
    return dict(
        hidden_states=noise(batch, 4, t, 2 * h, 2 * w), timestep=torch.full((batch,), 500),
        encoder_hidden_states=noise(batch, 7, 12, seed=2),
    )  # fmt: skip


def _wan_vace() -> torch.nn.Module:
    return diffusers.WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=2, vace_layers=[0], vace_in_channels=6,
    )  # fmt: skip


def _wan_vace_inputs(grid=(FRAMES, HEIGHT, WIDTH), batch=1) -> dict[str, Any]:
    t, h, w = grid
    return {**_wan_inputs(grid, batch), "control_hidden_states": noise(batch, 6, t, 2 * h, 2 * w, seed=5)}


def _wan_animate() -> torch.nn.Module:
    return diffusers.WanAnimateTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=12, latent_channels=4,
        out_channels=4, text_dim=12, freq_dim=16, ffn_dim=32, num_layers=2, image_dim=4,
        motion_encoder_channel_sizes={str(n): 4 for n in (4, 8, 16)}, motion_encoder_size=16, motion_style_dim=4,
        motion_dim=4, motion_encoder_dim=4, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip


def _wan_animate_inputs(grid=(FRAMES, HEIGHT, WIDTH), batch=1) -> dict[str, Any]:
    """The reference picture is one frame more, before the others."""
    t, h, w = grid
    return dict(
        hidden_states=noise(batch, 12, t + 1, 2 * h, 2 * w), timestep=torch.full((batch,), 500),
        encoder_hidden_states=noise(batch, 7, 12, seed=2), encoder_hidden_states_image=noise(batch, 3, 4, seed=3),
        pose_hidden_states=noise(batch, 4, t, 2 * h, 2 * w, seed=4),
        face_pixel_values=noise(batch, 3, 4 * t - 3, 16, 16, seed=5),
    )  # fmt: skip


def _ltx() -> torch.nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=12,
    )  # fmt: skip


def _ltx_inputs(grid=(FRAMES, HEIGHT, WIDTH), batch=1) -> dict[str, Any]:
    t, h, w = grid
    return dict(
        hidden_states=noise(batch, t * h * w, 4), encoder_hidden_states=noise(batch, 7, 12, seed=2),
        timestep=torch.full((batch,), 500), encoder_attention_mask=torch.ones(batch, 7),
        num_frames=t, height=h, width=w,
    )  # fmt: skip


def _ltx_condition_inputs(grid=(FRAMES, HEIGHT, WIDTH), batch=1) -> dict[str, Any]:
    """As diffusers' pipeline with conditions: coordinates in pixels and seconds, four tokens at a later frame first."""
    t, h, w = grid
    axes = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid)).T
    own = torch.stack([(8 * axes[0] - 7).clamp(min=0) / 25, 32 * axes[1], 32 * axes[2]])
    late = own[:, :4] + torch.tensor([16 / 25, 0, 0])[:, None]
    coords = torch.cat([late, own], dim=1).expand(batch, -1, -1)
    timestep = torch.full((batch, 4 + t * h * w), 500.0)
    timestep[:, :4] = 0.0
    inputs = {**_ltx_inputs(grid, batch), "timestep": timestep, "video_coords": coords}
    return {
        **inputs,
        "hidden_states": noise(batch, 4 + t * h * w, 4),
        "num_frames": None,
        "height": None,
        "width": None,
    }


def _dit() -> torch.nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=12,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip


def _dit_inputs(grid=(HEIGHT, HEIGHT), batch=1) -> dict[str, Any]:
    h, w = grid
    return dict(
        hidden_states=noise(batch, 4, 2 * h, 2 * w), timestep=torch.full((batch,), 500),
        class_labels=torch.arange(batch) % 10,
    )  # fmt: skip


def _moh_dit() -> torch.nn.Module:
    from visionattn.models.dit_diffusers import MoHDiTTransformer2DModel

    return MoHDiTTransformer2DModel("test_moh_dit", sample_size=12)


def _pixart() -> torch.nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=12,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip


def _pixart_inputs(grid=(HEIGHT, WIDTH), batch=1) -> dict[str, Any]:
    h, w = grid
    return dict(
        hidden_states=noise(batch, 4, 2 * h, 2 * w), timestep=torch.full((batch,), 500),
        encoder_hidden_states=noise(batch, 7, 12, seed=2), added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
    )  # fmt: skip


def _sd3() -> torch.nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip


def _sd3_inputs(grid=(HEIGHT, WIDTH), batch=1, text=4) -> dict[str, Any]:
    h, w = grid
    return dict(
        hidden_states=noise(batch, 4, 2 * h, 2 * w), encoder_hidden_states=noise(batch, text, 12, seed=2),
        pooled_projections=noise(batch, 8, seed=3), timestep=torch.full((batch,), 500),
    )  # fmt: skip


def _cogvideox() -> torch.nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=10, sample_height=12, sample_frames=9, patch_size=2,
        max_text_seq_length=4,
        temporal_compression_ratio=4, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def _cogvideox_inputs(grid=(FRAMES, HEIGHT, WIDTH), batch=1, text=4) -> dict[str, Any]:
    t, h, w = grid
    angles = noise(t * h * w, 16, seed=4)
    return dict(
        hidden_states=noise(batch, t, 4, 2 * h, 2 * w), encoder_hidden_states=noise(batch, text, 12, seed=2),
        timestep=torch.full((batch,), 500), image_rotary_emb=(angles.cos(), angles.sin()),
    )  # fmt: skip


CASES = {
    "flux": Case(_flux, _flux_inputs),
    "chroma": Case(_chroma, _chroma_inputs),
    "flux2": Case(_flux2, _flux2_inputs),
    "flux3": Case(_flux3, _flux3_inputs),
    "qwen": Case(_qwen, _qwen_inputs),
    "hunyuan_video": Case(_hunyuan, _hunyuan_inputs, ndim=3, text_first=False),
    "wan": Case(_wan, _wan_inputs, ndim=3, text=0),
    "wan_vace": Case(_wan_vace, _wan_vace_inputs, ndim=3, text=0),
    "wan_animate": Case(_wan_animate, _wan_animate_inputs, ndim=3, text=None),
    "ltx_condition": Case(_ltx, _ltx_condition_inputs, ndim=3, text=4),
    "ltx": Case(_ltx, _ltx_inputs, ndim=3, text=0),
    "dit": Case(_dit, _dit_inputs, text=0),
    "moh_dit": Case(_moh_dit, _dit_inputs, text=0),
    "pixart": Case(_pixart, _pixart_inputs, text=0),
    "sd3": Case(_sd3, _sd3_inputs, text_first=False),
    "cogvideox": Case(_cogvideox, _cogvideox_inputs, ndim=3),
}


def grid_of(case: Case, name: str) -> tuple[int, ...]:
    if case.ndim == 3:
        return (FRAMES, HEIGHT, WIDTH)
    return (HEIGHT, HEIGHT) if name == "dit" else (HEIGHT, WIDTH)


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]
