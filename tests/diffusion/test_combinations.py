"""Sparse attention beside what else people switch on: each cell of the table in docs/diffusion.md is a test here.

Right means: the patched network equals the same network, with the same other features on, under the pattern's boolean
mask; and after removal it equals, to the bit, what it was.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

import diffusers  # noqa: E402

from visionattn.diffusion import Disk, Neighborhood, sparsify  # noqa: E402

from . import pipelines, tiny  # noqa: E402
from .test_adapters import masked_sdpa  # noqa: E402

GRID = (tiny.HEIGHT, tiny.WIDTH)
PATTERN = Disk(2)


@pytest.fixture()
def flux():
    return tiny.randomise(tiny._flux())


def masked(model, inputs, monkeypatch, case="flux", references=0):
    with monkeypatch.context() as m:
        calls = masked_sdpa(m, tiny.CASES[case], GRID, PATTERN, references)
        expected = tiny.run(model, inputs())
    assert calls
    return expected


def check(model, monkeypatch, inputs=None, case="flux", **tolerance):
    """Patched equals masked, differs from dense, and removal leaves nothing."""
    inputs = inputs or (lambda: tiny.CASES[case].inputs(GRID, batch=2))
    dense = tiny.run(model, inputs())
    with sparsify(model, PATTERN) as handle:
        sparse = tiny.run(model, inputs())
        rows = handle.report().rows
    assert all(row["sparse"] for row in rows), str(handle.report())
    torch.testing.assert_close(
        sparse, masked(model, inputs, monkeypatch, case), **(tolerance or dict(rtol=1e-4, atol=1e-4))
    )
    assert not torch.allclose(sparse, dense, rtol=1e-2, atol=1e-2)
    assert torch.equal(tiny.run(model, inputs()), dense)
    return sparse


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# LoRA


def lora(rank: int = 2) -> dict[str, torch.Tensor]:
    """Weights under the names that diffusers' loaders expect, for the attentions' projections."""
    state, model = {}, tiny._flux()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("to_q", "to_k", "to_v"):
            n = len(state)
            state[f"transformer.{name}.lora_A.weight"] = tiny.noise(rank, module.in_features, seed=n)
            state[f"transformer.{name}.lora_B.weight"] = tiny.noise(module.out_features, rank, seed=n + 1)
    return state


def test_lora(tmp_path, monkeypatch):
    require_extra("peft")
    pipe = pipelines.flux(tmp_path)
    model = pipe.transformer
    inputs = lambda: tiny.CASES["flux"].inputs(GRID, batch=2)  # noqa: E731
    dense = tiny.run(model, inputs())
    with sparsify(pipe, PATTERN) as handle:
        plain = tiny.run(model, inputs())
        pipe.load_lora_weights(lora(), adapter_name="style")  # loaded while patched
        styled = tiny.run(model, inputs())
        assert not torch.allclose(styled, plain, atol=1e-2)
        close(styled, masked_while_patched(handle, model, inputs, monkeypatch))
        pipe.fuse_lora()
        assert model.transformer_blocks[0].attn.to_q.merged
        close(tiny.run(model, inputs()), styled)
        pipe.unfuse_lora()
        close(tiny.run(model, inputs()), styled)
        pipe.unload_lora_weights()
        close(tiny.run(model, inputs()), plain)
    close(tiny.run(model, inputs()), dense)  # not to the bit: fusing and unfusing rounds the weights
    pipe.load_lora_weights(lora(), adapter_name="style")  # loaded before the patch, and left after it
    close(check(model, monkeypatch), styled)


def masked_while_patched(handle, model, inputs, monkeypatch):
    """The mask's result with the patch's layers made dense for the moment."""
    (session,) = handle.sessions
    pattern = {layer: layer.pattern for layer in session.layers.values()}
    for layer in pattern:
        layer.pattern = Neighborhood(64)
    try:
        return masked(model, inputs, monkeypatch)
    finally:
        for layer, was in pattern.items():
            layer.pattern = was


# Other networks beside it, and tokens that come from elsewhere


def test_controlnet(tmp_path, monkeypatch):
    pipe = pipelines.flux(tmp_path)
    torch.manual_seed(0)
    control = diffusers.FluxControlNetModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.FluxControlNetPipeline(**parts, controlnet=tiny.randomise(control))
    pipe.set_progress_bar_config(disable=True)

    def generate():
        return pipe(
            "a red fox", control_image=torch.full((1, 3, 96, 80), 0.5), height=96, width=80, num_inference_steps=2,
            max_sequence_length=4, output_type="latent", generator=torch.Generator().manual_seed(0),
            controlnet_conditioning_scale=1.0,
        ).images  # fmt: skip

    dense = generate()
    with sparsify(pipe, PATTERN) as handle:
        sparse = generate()
        assert len(handle.sessions) == 2 and len(handle.report().rows) == 5
        assert all(row["sparse"] == 2 for row in handle.report().rows)
    with sparsify(pipe, PATTERN, controlnet=False) as handle:
        half = generate()
        assert len(handle.report().rows) == 3
    with monkeypatch.context() as m:
        masked_sdpa(m, tiny.CASES["flux"], GRID, PATTERN)
        close(sparse, generate())
    assert not torch.allclose(half, sparse, atol=1e-3) and not torch.allclose(sparse, dense, atol=1e-3)
    assert torch.equal(generate(), dense)


def ip_adapter(model) -> None:
    """FLUX's IP-Adapter with random weights, in place as its loader puts it."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

    torch.manual_seed(3)
    model.set_attn_processor(
        {
            name: FluxAttnProcessor() if "single" in name else FluxIPAdapterAttnProcessor(32, 12)
            for name in model.attn_processors
        }
    )
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, 12, 4)])


def test_ip_adapter(flux, monkeypatch):
    def inputs():
        embeds = [tiny.noise(2, 1, 6, seed=5)]
        return {
            **tiny.CASES["flux"].inputs(GRID, batch=2),
            "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds},
        }

    plain = tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2))
    with sparsify(flux, PATTERN) as handle:
        ip_adapter(flux)  # loaded while patched
        later = tiny.run(flux, inputs())
        rows = handle.report().rows
        assert rows[0]["sparse"] == rows[0]["dense"] == 1 and "not the grid's attention" in rows[0]["reason"]
        kept = list(flux.attn_processors.values())
    assert all(p._attention_backend is None for p in kept)
    close(check(flux, monkeypatch, inputs), later)
    assert not torch.allclose(tiny.run(flux, inputs()), plain, atol=1e-2)


def test_classifier_free_guidance_in_one_batch(flux):
    one, other = (tiny.CASES["flux"].inputs(GRID) for _ in range(2))
    other["encoder_hidden_states"] = tiny.noise(1, 4, 12, seed=9)
    both = {k: torch.cat([v, other[k]]) if k not in ("img_ids", "txt_ids") else v for k, v in one.items()}
    with sparsify(flux, PATTERN):
        close(tiny.run(flux, both), torch.cat([tiny.run(flux, one), tiny.run(flux, other)]))


# Where weights live, and how they are stored


@pytest.mark.parametrize("how", ["model", "sequential", "group", "group to disk"])
def test_offload(how, flux, monkeypatch, tmp_path):
    """Their hooks run as on a GPU, from CPU to CPU: a machine without one has no other place for weights."""
    import accelerate

    dense = tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2))
    with sparsify(flux, PATTERN):
        sparse = tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2))
        if how == "model":
            accelerate.cpu_offload_with_hook(flux, execution_device="cpu")
        elif how == "sequential":
            accelerate.cpu_offload(flux, execution_device="cpu")
            assert flux.transformer_blocks[0].attn.to_q.weight.is_meta
        else:
            path = str(tmp_path) if "disk" in how else None
            flux.enable_group_offload(
                onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level",
                offload_to_disk_path=path,
            )  # fmt: skip
        offloaded = tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2))
        close(offloaded, sparse)
    close(tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2)), dense)
    close(check(flux, monkeypatch), sparse)  # patched after offload was set up


class Int8Linear(nn.Linear):
    """Stands in for torchao where it is not installed: int8 weights, a scale a row, computed in the inputs' type."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        new = copy.copy(linear)
        new.__class__ = cls
        weight = new._parameters.pop("weight").detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        new._buffers = {"scale": scale, "weight": (weight / scale).round().to(torch.int8)}
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(model: nn.Module) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear.of(child))
    else:
        quantize_(model, Int8WeightOnlyConfig())


def test_quantised_linears(flux, monkeypatch):
    before = tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2))
    with sparsify(flux, PATTERN):
        exact = tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2))
        quantise(flux)
        rounded = tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2))
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1
    close(check(flux, monkeypatch), rounded)
    assert not torch.equal(tiny.run(flux, tiny.CASES["flux"].inputs(GRID, batch=2)), before)


@pytest.mark.parametrize("name", ["dit", "moh_dit"])
def test_eight_bit_weights_of_dits(name):
    """Weights stored in float8 or int8, whose own type is nothing to compute in."""
    model = tiny.randomise(tiny.CASES[name].build())
    inputs = tiny.CASES[name].inputs((6, 6), batch=2)
    with sparsify(model, PATTERN) as handle:
        exact = tiny.run(model, inputs)
        quantised = copy.deepcopy(model)
        quantise(quantised)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        stored = tiny.run(model, inputs)
        assert all(row["sparse"] == 2 for row in handle.report().rows)
    with sparsify(quantised, PATTERN):
        rounded = tiny.run(quantised, inputs)
    for got in (rounded, stored):
        assert 1e-4 < (got - exact).norm() / exact.norm() < (0.1 if name == "dit" else 0.5)  # routes change, too


def test_fp8_layerwise_casting(flux, monkeypatch):
    flux.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert flux.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    check(flux, monkeypatch)


def test_fused_projections(flux, monkeypatch):
    expected = check(flux, monkeypatch)
    flux.fuse_qkv_projections()
    close(check(flux, monkeypatch), expected)


# Compilation


def test_a_whole_compiled_transformer():
    """As ``pipe.transformer = torch.compile(pipe.transformer)``: two sizes, and removal. Blocks: test_adapters.py."""
    model = tiny.randomise(tiny._flux())
    del model.single_transformer_blocks[1:]
    inputs = [tiny.CASES["flux"].inputs(grid) for grid in (GRID, (4, 7))]
    dense = tiny.run(model, inputs[0])
    with sparsify(model, PATTERN):
        eager = [tiny.run(model, x) for x in inputs]
    compiled = torch.compile(model, backend="eager")
    with sparsify(compiled, PATTERN):
        for x, expected in zip(inputs, eager, strict=True):
            close(tiny.run(compiled, x), expected)
    close(tiny.run(compiled, inputs[0]), dense)
    torch._dynamo.reset()


# diffusers' caches


clock = [0]


def callback() -> int:
    return clock[0]


def steps(model, count: int = 4) -> list[torch.Tensor]:
    """Denoising steps whose inputs hardly move, inside the context that pipelines open for caches."""
    outs = []
    for i in range(count):
        inputs = tiny.CASES["flux"].inputs(GRID)
        inputs["timestep"] = torch.tensor([0.9 - 0.01 * i])
        clock[0] = 900 - 150 * i
        with model.cache_context("cond"):
            outs.append(tiny.run(model, inputs))
    return outs


CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=1e6),
    "pyramid attention broadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=callback,
    ),
    "faster cache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("transformer_blocks",),
        is_guidance_distilled=True, current_timestep_callback=callback, tensor_format="BCHW",
    ),
    "mag cache": lambda: diffusers.MagCacheConfig(
        threshold=1e3, retention_ratio=0.1, num_inference_steps=4, mag_ratios=[1.0] * 4
    ),
    "taylor seer": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_caches(name, flux, monkeypatch):
    """The cache skips the same calls, patched or not, and what is computed is the pattern's."""
    plain = steps(flux)
    with sparsify(flux, PATTERN):
        sparse = steps(flux)
    flux.enable_cache(CACHES[name]())
    with monkeypatch.context() as m:
        calls = masked_sdpa(m, tiny.CASES["flux"], GRID, PATTERN)
        expected = steps(flux)
    flux._reset_stateful_cache()
    with sparsify(flux, PATTERN) as handle:
        got = steps(flux)
        rows = handle.report().rows
    assert sum(row["sparse"] for row in rows) == len(calls) < 4 * len(rows), str(handle.report())
    for a, b in zip(got, expected, strict=True):
        close(a, b)
    assert not torch.equal(got[-1], sparse[-1])
    flux.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(steps(flux), plain, strict=True))


def test_perturbed_attention_by_a_guider():
    """Guiders hook PyTorch's attention; a patched layer would slip past them, so it is dense in their calls."""
    from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

    model, inputs = tiny.randomise(tiny._qwen()), tiny.CASES["qwen"].inputs(GRID)
    config = LayerSkipConfig([0], "transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False)
    with sparsify(model, PATTERN) as handle:
        sparse = tiny.run(model, inputs)
        apply_layer_skip(model, config)
        perturbed = tiny.run(model, inputs)
        row = handle.report().rows[0]
        assert (row["sparse"], row["dense"]) == (1, 1) and "guider" in row["reason"]
        HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0].attn).remove_hook("layer_skip_hook")
        assert torch.equal(tiny.run(model, inputs), sparse)
    apply_layer_skip(model, config)
    with sparsify(model, PATTERN, layers="transformer_blocks.1*"):
        assert torch.equal(tiny.run(model, inputs), perturbed)
    assert not torch.allclose(perturbed, sparse, atol=1e-2)


# What cannot be


def test_what_cannot_combine_says_why():
    sd3 = tiny.randomise(tiny._sd3())
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0

    inputs = tiny.CASES["sd3"].inputs(GRID, batch=2)
    sd3.transformer_blocks[1].attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(16, 16, 8))
    with pytest.raises(ValueError, match=r"blocks\.1\.attn has a SD3IPAdapter.*more than the attention.*layers="):
        sparsify(sd3, PATTERN)
    with sparsify(sd3, PATTERN, layers="transformer_blocks.0.*") as handle:  # and what it advises
        assert len(handle.report().rows) == 2
    plain = tiny.randomise(tiny._sd3())
    with sparsify(plain, PATTERN) as handle:  # guidance by perturbed attention: the pipeline sets this for a call
        attn = plain.transformer_blocks[0].attn
        kept, processor = attn.processor, PAGJointAttnProcessor2_0()
        attn.set_processor(processor)
        tiny.run(plain, inputs)
        row = handle.report().rows[0]
        assert attn.processor is processor and (row["sparse"], row["reason"]) == (
            0,
            "a PAGJointAttnProcessor2_0 was set",
        )
        attn.set_processor(kept)


def test_diffusers_finds_the_classes_it_knows():
    """Its loaders ask for a processor's class, and make another of it."""
    model, inputs = tiny.randomise(tiny._sd3()), tiny.CASES["sd3"].inputs(GRID)
    with sparsify(model, PATTERN):
        sparse = tiny.run(model, inputs)
        model.set_attn_processor({name: value.__class__() for name, value in model.attn_processors.items()})
        assert torch.equal(tiny.run(model, inputs), sparse)


def test_a_processor_kept_beyond_removal_is_the_original():
    sd3 = tiny.randomise(tiny._sd3())
    inputs = tiny.CASES["sd3"].inputs(GRID)
    dense = tiny.run(sd3, inputs)
    with sparsify(sd3, PATTERN):
        assert not np.allclose(tiny.run(sd3, inputs), dense, atol=1e-2)
        kept = dict(sd3.attn_processors)
    sd3.set_attn_processor(kept)
    assert torch.equal(tiny.run(sd3, inputs), dense)


@pytest.mark.parametrize("case", ["flux", "sd3", "qwen"])  # the latter two normalise queries and keys in float32
def test_autocast(case, monkeypatch):
    model = tiny.randomise(tiny.CASES[case].build())
    inputs = lambda: tiny.CASES[case].inputs(GRID)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        got = check(model, monkeypatch, inputs, case, rtol=0.05, atol=0.05)
    assert got.dtype == torch.bfloat16
