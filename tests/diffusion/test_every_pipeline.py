"""diffusers' own pipelines, all parts tiny and random, from a prompt on: each as its pattern's mask would have it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

from visionattn.diffusion import Disk, Neighborhood, sparsify  # noqa: E402

from . import pipelines  # noqa: E402

PROMPTS = ["a red fox", "the cat in the snow and a lighthouse"]
PICTURE, VIDEO = Disk(2), Neighborhood((2, 3, 3))
SMALL, WIDE = {"height": 96, "width": 80}, {"height": 64, "width": 112}
LAYERS = {"text_encoder_out_layers": (1, 2, 3)}
PLAIN = {"use_resolution_binning": False, "clean_caption": False}
TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}}
CLIP, CLIPS = {**SMALL, "num_frames": 9}, {**WIDE, "num_frames": 5}


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def kontext(sizes: dict) -> dict:
    area = sizes["height"] * sizes["width"]
    return {**sizes, "max_area": area, "image": picture(32, 48), "_auto_resize": False}


def fill(sizes: dict) -> dict:
    hole = Image.new("L", (sizes["width"], sizes["height"]), 255)
    return {**sizes, "image": picture(sizes["height"], sizes["width"]), "mask_image": hole}


def doubled(sizes: dict) -> dict:
    return {k: 2 * n if k != "num_frames" else 2 * n - 1 for k, n in sizes.items()}  # LTX: 32 x 32 px, 8 frames a token


# pipeline, two sizes with what else it takes, the grids that these are
PIPELINES = {
    "flux": (lambda: pipelines.flux(None), SMALL, WIDE, (6, 5), (4, 7)),
    "flux kontext": (pipelines.flux_kontext, kontext(SMALL), kontext(WIDE), (6, 5), (4, 7)),
    "flux fill": (pipelines.flux_fill, fill(SMALL), fill(WIDE), (6, 5), (4, 7)),
    "flux2": (pipelines.flux2, {**SMALL, **LAYERS}, {**WIDE, **LAYERS}, (6, 5), (4, 7)),
    "sd3": (pipelines.sd3, SMALL, WIDE, (6, 5), (4, 7)),
    "pixart sigma": (pipelines.pixart, {**SMALL, **PLAIN}, {**WIDE, **PLAIN}, (6, 5), (4, 7)),
    "qwen image": (pipelines.qwen, SMALL, WIDE, (6, 5), (4, 7)),
    "wan 2.1": (pipelines.wan, CLIP, CLIPS, (3, 6, 5), (2, 4, 7)),
    "wan 2.2": (lambda: pipelines.wan(two=True), CLIP, CLIPS, (3, 6, 5), (2, 4, 7)),
    "ltx": (pipelines.ltx, doubled(CLIP), doubled(CLIPS), (3, 6, 5), (2, 4, 7)),
    "cogvideox": (pipelines.cogvideox, CLIP, CLIPS, (3, 6, 5), (2, 4, 7)),
    "hunyuan video": (pipelines.hunyuan_video, {**CLIP, **TEMPLATE}, {**CLIPS, **TEMPLATE}, (3, 6, 5), (2, 4, 7)),
}


def generate(pipe, prompt, **kwargs):
    kwargs = {"num_inference_steps": 2, "max_sequence_length": 48, "output_type": "latent", **kwargs}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), return_dict=False, **kwargs)[0]


def masked_sdpa(monkeypatch, layout, pattern):
    """PyTorch's attention with the pattern's mask, where the lengths are this layout's."""
    real, calls = F.scaled_dot_product_attention, []
    n, extra = layout.tokens, layout.extra

    def attention(query, key, value, attn_mask=None, **kwargs):
        role = layout.role(query.shape[-2], key.shape[-2])
        if role is None:
            return real(query, key, value, attn_mask=attn_mask, **kwargs)
        start = layout.text if role == "joint" and layout.text_first else 0
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        mask[start : start + n, start : start + n] = pattern.mask(layout.grid)
        assert extra == 0 or role != "grid"
        calls.append(role)
        return real(query, key, value, attn_mask=mask if attn_mask is None else mask & attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return calls


@pytest.mark.parametrize("name", PIPELINES)
def test_from_prompt_to_picture(name, monkeypatch):
    build, first, second, *grids = PIPELINES[name]
    pipe = build()
    pattern = VIDEO if len(grids[0]) == 3 else PICTURE
    dense = generate(pipe, PROMPTS[0], **first)
    runs = [(first, PROMPTS[0], grids[0]), (second, PROMPTS[0], grids[1]), (first, PROMPTS, grids[0])]
    for sizes, prompt, grid in runs:
        with sparsify(pipe, pattern) as handle:
            sparse = generate(pipe, prompt, **sizes)
            layout, rows = handle.sessions[0].layout, handle.report().rows
            assert layout.grid == grid
            assert all(row["sparse"] and not row["dense"] for row in rows), str(handle.report())
        with monkeypatch.context() as m:
            calls = masked_sdpa(m, layout, pattern)
            expected = generate(pipe, prompt, **sizes)
        assert len(calls) == sum(row["sparse"] for row in rows)
        torch.testing.assert_close(sparse, expected, rtol=1e-3, atol=1e-3)
        assert len(sparse) == (1 if prompt is PROMPTS[0] else 2)
        if sizes is first and prompt is PROMPTS[0]:
            assert not torch.allclose(sparse, dense, rtol=1e-2, atol=1e-2)
    with sparsify(pipe, Neighborhood(64)):
        torch.testing.assert_close(generate(pipe, PROMPTS[0], **first), dense)
    with sparsify(pipe, pattern):
        assert np.isfinite(np.asarray(generate(pipe, PROMPTS[0], **first, output_type="np"))).all()
    assert torch.equal(generate(pipe, PROMPTS[0], **first), dense)
