"""Whole pipelines on a CPU: prompts to pictures, CLEAR's weights, the high-resolution recipe."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

import visionattn  # noqa: E402
from visionattn.diffusion import Disk, Neighborhood, load_clear, sparsify, upscale_generate  # noqa: E402
from visionattn.diffusion.session import pool  # noqa: E402

from . import pipelines  # noqa: E402


def generate(pipe, prompt="a red fox", size=(128, 96), **kwargs):
    kwargs = {"num_inference_steps": 3, "max_sequence_length": 8, "output_type": "np", **kwargs}
    return pipe(prompt, height=size[0], width=size[1], generator=torch.Generator().manual_seed(0), **kwargs).images


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return pipelines.flux(tmp_path_factory.mktemp("flux"))


def test_flux_from_prompt_to_picture(flux):
    dense = generate(flux)
    assert dense.shape == (1, 128, 96, 3) and np.isfinite(dense).all()
    handle = sparsify(flux, Disk(2))
    sparse = generate(flux)
    text = str(handle.report())
    handle.remove()
    assert not np.allclose(sparse, dense, atol=1e-4)
    assert "8 x 6 tokens" in text and "of the pairs skipped" in text
    assert np.array_equal(generate(flux), dense)


def test_flux_batches_sizes_and_dense_steps(flux):
    prompts = ["a red fox", "the cat in the snow"]
    dense = generate(flux, prompts)
    with sparsify(flux, Disk(2)):
        both = generate(flux, prompts)
        generate(flux, size=(64, 160))
        again = generate(flux, prompts)
    assert both.shape[0] == 2 and np.array_equal(both, again)
    with sparsify(flux, Disk(2), dense_steps=3):
        assert np.array_equal(generate(flux, prompts), dense)
    with sparsify(flux, Neighborhood(64)):
        assert np.array_equal(generate(flux, prompts), dense)


def test_presets_say_what_they_rest_on(flux):
    for name in ("quality", "balanced", "fast"):
        with sparsify(flux, name) as handle:
            generate(flux)
            assert "preset: " in str(handle.report())


def test_dit_pipeline(tmp_path):
    pipe = pipelines.dit()

    def run():
        seed = torch.Generator().manual_seed(0)
        return pipe([1, 2], num_inference_steps=2, generator=seed, output_type="np").images

    dense = run()
    with sparsify(pipe, Disk(2)) as handle:
        sparse = run()
        assert all(row["sparse"] for row in handle.report().rows)
    assert not np.allclose(sparse, dense, atol=1e-4) and np.array_equal(run(), dense)


def clear_file(flux, path, downsample=None):
    torch.manual_seed(1)
    state = {}
    for name, p in flux.transformer.named_parameters():
        if any(f".attn.{part}." in name for part in ("to_q", "to_k", "to_v", "to_out.0")):
            state[name] = torch.randn_like(p) * 0.3
            layer = name.split(".attn.")[0] + ".attn"
            if downsample:
                state[f"{layer}.processor.spatial_weight"] = torch.rand(1, 1, 1, downsample, 1, downsample, 1)
    save_file(state, path)
    return path


def test_clear_weights_come_and_go(flux, tmp_path):
    dense = generate(flux)
    file = clear_file(flux, tmp_path / "clear_local_2.safetensors")
    handle = load_clear(flux, file)
    assert handle.sessions[0].layers["transformer_blocks.0.attn"].pattern == Disk(2)
    student = generate(flux)
    handle.remove()
    assert np.array_equal(generate(flux), dense) and not np.allclose(student, dense, atol=1e-4)


def test_clear_pooled_is_its_formula(flux, tmp_path):
    file = clear_file(flux, tmp_path / "clear_local_2_down_2.safetensors", downsample=2)
    with load_clear(flux, file) as handle:
        layer = handle.sessions[0].layers["single_transformer_blocks.0.attn"]
        assert layer.pattern == Disk(2, 2)
        generate(flux)
        layout = handle.sessions[0].layout
        torch.manual_seed(2)
        q, k, v = torch.randn(3, 1, layout.text + layout.tokens, 2, 16)
        out = layer.sparse(q, k, v, None)
        weight = layer.pool_weight
    t, (h, w) = layout.text, layout.grid
    mask = torch.ones(t + h * w, t + h * w + h * w // 4, dtype=torch.bool)
    mask[t:, t : t + h * w] = Disk(2).mask((h, w))
    mask[:t, t + h * w :] = False
    blocks = lambda x: torch.stack(  # noqa: E731
        [
            sum(weight[a, b] * x[:, t + (2 * i + a) * w + 2 * j + b] for a in range(2) for b in range(2))
            for i in range(h // 2)
            for j in range(w // 2)
        ],
        dim=1,
    )
    keys, values = (torch.cat([x, blocks(x)], dim=1).transpose(1, 2) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool(k[:, t:], (h, w), weight), blocks(k))


def test_clear_refuses_what_does_not_fit(flux, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_clear(flux, tmp_path / "clear_local_8.safetensors")
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(3, 3)}, tmp_path / "clear_local_8.safetensors")
    with pytest.raises(ValueError, match=r"is not for this transformer: .*to_q.weight \(3, 3\), it is \(32, 32\) here"):
        load_clear(flux, tmp_path / "clear_local_8.safetensors")
    save_file({"other": torch.zeros(3)}, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="tells no radius"):
        load_clear(flux, tmp_path / "mine.safetensors")
    assert not flux.transformer._forward_pre_hooks


def test_the_high_resolution_recipe(flux):
    theta, scheduler = flux.transformer.pos_embed.theta, flux.scheduler
    dense = generate(flux)
    with sparsify(flux, Disk(2), proportional=True) as handle:
        result = upscale_generate(
            flux, "a red fox", height=128, width=96, base_height=64, base_width=48, num_inference_steps=4,
            generator=torch.Generator().manual_seed(0), max_sequence_length=8,
        )  # fmt: skip
        assert handle.sessions[0].layout.grid == (8, 6)
    assert result.images[0].size == (96, 128)
    assert flux.transformer.pos_embed.theta == theta and flux.scheduler is scheduler and not flux.vae.use_tiling
    assert np.array_equal(generate(flux), dense)
    assert visionattn.sparsify is sparsify  # the one line of the README
    with pytest.raises(ValueError, match="multiples of 16"):
        upscale_generate(flux, "a red fox", height=100)
