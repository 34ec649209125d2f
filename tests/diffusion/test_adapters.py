"""Every adapter: dense where the window covers the grid, the mask's result elsewhere, and removed without a trace."""

import contextlib
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

import visionattn  # noqa: E402
from visionattn.diffusion import Disk, GridError, Neighborhood, sparsify  # noqa: E402
from visionattn.diffusion.adapters import Flux  # noqa: E402

from . import tiny  # noqa: E402
from .tiny import noise  # noqa: E402

NAMES = list(tiny.CASES)


@pytest.fixture(scope="module")
def models():
    return {name: tiny.randomise(case.build()) for name, case in tiny.CASES.items()}


def masked_sdpa(monkeypatch, case, grid, pattern, references=0):
    """Diffusers' own processors, with the pattern's mask put into PyTorch's attention where lengths are the grid's."""
    real = F.scaled_dot_product_attention
    n = torch.Size(grid).numel()
    extra = references * grid[-1]
    words = torch.Size(grid[-2:]).numel() if case.text is None else case.text
    calls = []

    def attention(query, key, value, attn_mask=None, **kwargs):
        total = query.shape[-2]
        text = {n + extra + words: words, n + extra: 0, n: 0}.get(total)
        if text is None or key.shape[-2] != total:
            return real(query, key, value, attn_mask=attn_mask, **kwargs)
        mask = torch.ones(total, total, dtype=torch.bool)
        start = text if case.text_first else 0
        mask[start : start + n, start : start + n] = pattern.mask(grid)
        if attn_mask is not None:
            mask = mask & attn_mask
        calls.append(total)
        return real(query, key, value, attn_mask=mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_sparse_is_the_mask(name, models, monkeypatch):
    case, model = tiny.CASES[name], models[name]
    grid = tiny.grid_of(case, name)
    pattern = Neighborhood(3) if case.ndim == 2 else Neighborhood((2, 3, 3))
    inputs = case.inputs(grid, batch=2)
    dense = tiny.run(model, inputs)
    with sparsify(model, pattern) as handle:
        sparse = tiny.run(model, inputs)
        report = handle.report()
    assert all(row["sparse"] > 0 and row["dense"] == 0 for row in report.rows), str(report)
    assert 0.0 < report.rows[0]["saved"] < 1.0
    with monkeypatch.context() as m:
        calls = masked_sdpa(m, case, grid, pattern)
        expected = tiny.run(model, inputs)
    assert len(calls) == len(report.rows)
    torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse, dense, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_window_over_the_grid_is_dense_and_removal_leaves_nothing(name, models):
    case, model = tiny.CASES[name], models[name]
    inputs = case.inputs(tiny.grid_of(case, name))
    before = tiny.run(model, inputs)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    processors = {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")}
    handle = sparsify(model, Neighborhood(64))
    assert torch.equal(tiny.run(model, inputs), before)
    assert all(row["reason"] == "the pattern covers the whole grid" for row in handle.report().rows)
    assert list(model.state_dict()) == list(state)
    handle.remove()
    handle.remove()
    assert torch.equal(tiny.run(model, inputs), before)
    assert {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")} == processors
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", NAMES)
def test_resolutions_and_batches(name, models, monkeypatch):
    case, model = tiny.CASES[name], models[name]
    pattern = Disk(2)
    grids = [tiny.grid_of(case, name)]
    if name != "dit":  # its position table is for one size
        grids.append((*grids[0][:-2], 4, 7))
    with sparsify(model, pattern):
        results = [tiny.run(model, case.inputs(grid, batch=b)) for grid in grids for b in (1, 3)]
    for i, grid in enumerate(grids):
        with monkeypatch.context() as m:
            masked_sdpa(m, case, grid, pattern)
            expected = tiny.run(model, case.inputs(grid, batch=3))
        torch.testing.assert_close(results[2 * i + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "flux2", "flux3", "qwen"])
def test_reference_tokens_are_always_visible(name, models, monkeypatch):
    case, model = tiny.CASES[name], models[name]
    grid = tiny.grid_of(case, name)
    inputs = case.inputs(grid, references=2)
    with sparsify(model, Neighborhood(3)) as handle:
        sparse = tiny.run(model, inputs)
        assert all(row["sparse"] for row in handle.report().rows)
    with monkeypatch.context() as m:
        masked_sdpa(m, case, grid, Neighborhood(3), references=2)
        expected = tiny.run(model, inputs)
    torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, references", [("qwen", 0), ("qwen", 2), ("hunyuan_video", 0), ("chroma", 0)])
def test_prompts_of_different_lengths(name, references, models, monkeypatch):
    case, model = tiny.CASES[name], models[name]
    grid = tiny.grid_of(case, name)
    inputs = case.inputs(grid, batch=2, lengths=[2, 4], **({"references": references} if references else {}))
    with sparsify(model, Disk(2)) as handle:
        sparse = tiny.run(model, inputs)
        assert all(row["sparse"] for row in handle.report().rows), str(handle.report())
    with monkeypatch.context() as m:
        masked_sdpa(m, case, grid, Disk(2), references)
        expected = tiny.run(model, inputs)
    torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)
    if name == "chroma":  # what diffusers' pipeline makes of it: ones and zeros, added to the logits
        with sparsify(model, Disk(2)) as handle:
            tiny.run(model, {**inputs, "attention_mask": inputs["attention_mask"].float()})
            assert "padding needs a bool mask" in str(handle.report())


@pytest.mark.parametrize("name", ["flux", "dit", "moh_dit"])
def test_a_copy_carries_no_patch(name, models, tmp_path):
    case, model = tiny.CASES[name], models[name]
    inputs = case.inputs(tiny.grid_of(case, name))
    dense = tiny.run(model, inputs)
    with sparsify(model, Disk(2)):
        sparse = tiny.run(model, inputs)
        pickled = pickle.dumps(model)
        assert b"visionattn_" not in pickled  # a backend of this process
        for twin in (copy.deepcopy(model), pickle.loads(pickled)):
            assert torch.equal(tiny.run(twin, inputs), dense) and not twin._forward_pre_hooks
        fresh = copy.deepcopy(model)
        with sparsify(fresh, Disk(2)):  # patched before its first call
            assert torch.equal(tiny.run(fresh, inputs), sparse)
        assert torch.equal(tiny.run(fresh, inputs), dense)
        model.save_pretrained(tmp_path)
        assert torch.equal(tiny.run(model, inputs), sparse)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny.run(loaded, inputs), dense, rtol=1e-5, atol=1e-4)  # memory-mapped: other alignment
    assert not torch.allclose(sparse, dense, rtol=1e-3, atol=1e-2)


def test_a_bare_moh_dit(models):
    """Positional arguments ``(x, t, y)``, its own guidance, steps that stay dense; routed heads keep their gates."""
    model = copy.deepcopy(models["moh_dit"].dit)
    x, t, y = noise(2, 4, 12, 8), torch.full((2,), 500), torch.tensor([1, 2])
    with torch.no_grad():
        dense = model(x, t, y)
        with sparsify(model, Disk(2), layers="blocks.0.attn", dense_until=600) as handle:
            sparse = model(x, t, y)
            row = handle.report().rows[0]
            assert row["sparse"] == 1 and row["grid"] == (6, 4) and len(handle.report().rows) == 1
            model.forward_with_cfg(x, t, y, 2.0)
            assert handle.report().rows[0]["sparse"] == 2
            late = model(x, t + 200, y)
            assert handle.report().rows[0]["dense"] == 1
            with pytest.raises(ValueError, match="patched already"):
                sparsify(model, Disk(3), layers="blocks.0.attn")
        assert torch.equal(model(x, t + 200, y), late) and torch.equal(model(x, t, y), dense)
    assert not torch.allclose(sparse, dense, atol=1e-2)
    assert all("attend" not in vars(block.attn) for block in model.blocks)
    with pytest.raises(ValueError, match="this DiT is not visionattn's"):
        sparsify(type("DiT", (torch.nn.Module,), {})(), Disk(2))


def test_dense_steps_follow_the_timestep(models):
    model, case = models["flux"], tiny.CASES["flux"]
    inputs = case.inputs()
    dense = tiny.run(model, {**inputs, "timestep": torch.tensor([0.7])})
    with sparsify(model, Disk(2), dense_steps=2):
        for _ in range(2):  # two generations, two passes a step as classifier-free guidance has them
            sparse = []
            for t in (1.0, 0.7, 0.4, 0.1):
                outs = [tiny.run(model, {**inputs, "timestep": torch.tensor([t])}) for _ in range(2)]
                assert torch.equal(outs[0], outs[1])
                sparse.append(outs[0])
            assert torch.equal(sparse[1], dense)
    with sparsify(model, Disk(2)):
        assert torch.equal(sparse[2], tiny.run(model, {**inputs, "timestep": torch.tensor([0.4])}))
    with sparsify(model, Disk(2), dense_until=0.5):
        assert torch.equal(tiny.run(model, {**inputs, "timestep": torch.tensor([0.7])}), dense)
        assert torch.equal(tiny.run(model, {**inputs, "timestep": torch.tensor([0.4])}), sparse[2])


def test_dense_steps_of_timesteps_that_do_not_tell(models):
    """Two networks of a pipeline share the count; a token's own timestep; bfloat16's, all the same but for the last."""
    pair = SimpleNamespace(transformer=models["wan"], transformer_2=copy.deepcopy(models["wan"]))
    inputs = tiny.CASES["wan"].inputs()
    with sparsify(pair, Neighborhood((2, 3, 3)), dense_steps=2) as handle:
        for _ in range(2):
            for net, t in zip([pair.transformer] + 4 * [pair.transformer_2], (1000, 900, 800, 700, 600), strict=True):
                tokens = torch.tensor([[0.0] * 30 + [t] * 60])
                tiny.run(net, {**inputs, "timestep": tokens.expand(1, -1) if t < 900 else torch.tensor([t])})
        calls = [(row["dense"], row["sparse"]) for row in handle.report().rows]
        assert calls == 2 * [(2, 0)] + 2 * [(2, 6)]
    pipe = SimpleNamespace(transformer=models["flux"], scheduler=SimpleNamespace(step_index=None))
    inputs = {**tiny.CASES["flux"].inputs(), "timestep": torch.ones(1, dtype=torch.bfloat16)}
    with sparsify(pipe, Disk(2), dense_steps=2) as handle:
        for _ in range(2):
            for index in (None, 1, 2, 3):
                pipe.scheduler.step_index = index
                tiny.run(pipe.transformer, inputs)
                tiny.run(pipe.transformer, inputs)  # the other half of guidance
        row = handle.report().rows[0]
        assert (row["dense"], row["sparse"]) == (8, 8) and "dense steps of the last generation: 2" in str(
            handle.report()
        )


@pytest.mark.parametrize("grid", [(2, 600), (520, 3), (1, 1), (1, 7), (300, 300)])
def test_ids_in_the_networks_type(grid):
    """bfloat16 knows no odd number above 256: FLUX at more than 4096 px."""
    ids = tiny.image_ids(*grid).bfloat16()
    assert Flux.grid(ids) == (grid, 0)
    assert Flux.grid(torch.cat([ids, tiny.image_ids(2, 5, time=1).bfloat16()])) == (grid, 10)
    if grid[0] > 1 and grid[1] > 1:
        for broken in (ids.flip(0), ids[:-1], torch.cat([ids[1:], ids[:1]])):
            with pytest.raises(GridError):
                Flux.grid(broken)


def test_control_networks_of_several_kinds(models, monkeypatch):
    """A union's mode is one token more; several in one module are each patched."""
    import diffusers

    def network(**more):
        return tiny.randomise(
            diffusers.FluxControlNetModel(
                patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
                guidance_embeds=True, **more,
            )
        )  # fmt: skip

    union = network(num_mode=3)
    inputs = {
        **tiny.CASES["flux"].inputs(),
        "controlnet_cond": noise(1, 30, 4, seed=8),
        "controlnet_mode": torch.tensor([[1]]),
    }
    both = SimpleNamespace(
        transformer=models["flux"], controlnet=diffusers.FluxMultiControlNetModel([union, network()])
    )
    with sparsify(both, Disk(2)) as handle:
        assert len(handle.sessions) == 3
        sparse = tiny.run(union, inputs)[-1]
        assert [row["sparse"] for row in handle.report().rows] == [0, 0, 0, 1, 1, 0, 0], str(handle.report())
    with monkeypatch.context() as m:
        assert not masked_sdpa(m, tiny.Case(None, None, text=5), (tiny.HEIGHT, tiny.WIDTH), Disk(2))
        expected = tiny.run(union, inputs)[-1]
    torch.testing.assert_close(sparse, expected, rtol=1e-4, atol=1e-4)


def test_two_patches_at_once_and_layers(models):
    a, b = models["flux"], copy.deepcopy(models["flux"])
    inputs = tiny.CASES["flux"].inputs()
    with sparsify(a, Disk(2)):
        alone = tiny.run(a, inputs)
    with sparsify(a, Disk(2)), sparsify(b, Disk(3), layers=[0, 2]) as second:
        assert torch.equal(tiny.run(a, inputs), alone)
        assert not torch.equal(tiny.run(b, inputs), alone)
        assert [r["layer"] for r in second.report().rows] == [
            "transformer_blocks.0.attn",
            "single_transformer_blocks.1.attn",
        ]


def test_another_backend_set_later_becomes_the_dense_one(models):
    model = copy.deepcopy(models["flux"])
    inputs = tiny.CASES["flux"].inputs()
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active = _AttentionBackendRegistry._active_backend
    try:
        with sparsify(model, Disk(2)):
            sparse = tiny.run(model, inputs)
            model.set_attention_backend("_native_math")
            assert torch.equal(tiny.run(model, inputs), sparse)
        processor = model.transformer_blocks[0].attn.processor
        assert processor._attention_backend.value == "_native_math"
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("name", ["flux", "wan", "dit", "moh_dit"])
def test_compiled_blocks_stay_whole(name, models):
    case, model = tiny.CASES[name], copy.deepcopy(models[name])
    inputs = case.inputs(tiny.grid_of(case, name))
    if name == "flux":  # two graphs of the single blocks, by their inputs' strides, however many blocks there are
        model.single_transformer_blocks.append(copy.deepcopy(model.single_transformer_blocks[1]))
    limit = torch._dynamo.config.patch(recompile_limit=2) if name == "flux" else contextlib.nullcontext()
    with sparsify(model, Disk(2)) as handle, limit:
        eager = tiny.run(model, inputs)
        for block in model.modules():
            if type(block).__name__ in (model._repeated_blocks or ["BasicTransformerBlock"]):
                block.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(tiny.run(model, inputs), eager)
        assert "compiled blocks are not counted" in str(handle.report())
    torch._dynamo.reset()


def test_errors_are_one_line(models):
    model = models["flux"]
    with pytest.raises(ValueError, match=r"Linear has no adapter; .*FluxTransformer2DModel"):
        sparsify(torch.nn.Linear(2, 2), Disk(2))
    with pytest.raises(ValueError, match="no preset is called 'fastest'"):
        sparsify(model, "fastest")
    with pytest.raises(ValueError, match="give a Disk, Neighborhood, Cross"):
        sparsify(model, 16)
    with pytest.raises(ValueError, match="0 to 2"):
        sparsify(model, Disk(2), layers=[7])
    with pytest.raises(ValueError, match="matches none"):
        sparsify(model, Disk(2), layers="blocks.9*")
    with sparsify(model, Disk(2)), pytest.raises(ValueError, match="patched already"):
        sparsify(model, Disk(3))
    assert tiny.run(model, tiny.CASES["flux"].inputs()) is not None
    with sparsify(model, Neighborhood(4, dilation=2)), pytest.raises(ValueError, match="window 4 x dilation 2"):
        tiny.run(model, tiny.CASES["flux"].inputs())
    assert visionattn.list_modules()
