"""DiT and MoH-DiT: what the released code computes, counts, names, and diffusers."""

import json

import pytest
import torch

import visionattn
from tests.extras import require_extra
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers.moh import HeadRouter, pop_aux_loss
from visionattn.models._checkpoint import CheckpointError
from visionattn.models.dit import DiTBlock, list_dits
from visionattn.models.dit_convert import dit_from_diffusers, dit_to_diffusers

TOLERANCE = 5e-6
NETWORKS = {
    "moh_dit_s_2_75": ("moh_dit_s_2_75", {}),
    "moh_dit_xl_2_90_slice3": (
        "moh_dit_xl_2_90",
        dict(depth=3, num_heads=[8, 16, 24], shared_head=[8, 16, 16], routed_head=[0, 0, 3], input_size=16),
    ),
}
TINY = dict(input_size=8, depth=2, hidden_size=48, num_heads=6, num_classes=10)


def tiny(name="test_moh_dit", **kwargs):
    """A small model whose output is not zero, as every DiT's is at first."""
    torch.manual_seed(0)
    model = visionattn.create_dit(name, **{**TINY, **kwargs})
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def official(manifest) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}


@pytest.mark.parametrize("fixture", sorted(NETWORKS))
def test_networks(fixture, tmp_path):
    name, overrides = NETWORKS[fixture]
    manifest, expected = fx.load(FIXTURES / "moh_dit" / fixture)
    torch.save({"ema": official(manifest), "model": {}, "opt": {}}, tmp_path / "official.pt")
    model = visionattn.create_dit(name, checkpoint=str(tmp_path / "official.pt"), **overrides).eval()
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    given = {k: torch.from_numpy(v) for k, v in fx.inputs(manifest).items()}
    x, t, y = given["x"], given["t"], given["y"]
    blocks, loads = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: blocks.append(out))
    layers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed_head > 0]
    for layer in layers:

        def gates(x, q, layer=layer, original=layer.gates):
            out = original(x, q)
            loads.append((out[..., layer.shared_head :] > 0).float().mean((0, 1)))
            return out

        layer.gates = gates
        layer.training = True
    with torch.no_grad():
        assert relative_error(model(x, t, y), expected["out"]) < TOLERANCE
        assert relative_error(torch.stack([b.mean(1) for b in blocks]), expected["block_tokens_mean"]) < TOLERANCE
        assert relative_error(blocks[-1], expected["last_block_tokens"]) < TOLERANCE
        assert relative_error(model.condition(t, y), expected["cond"]) < TOLERANCE
        assert relative_error(model.pos_embed[0, ::16], expected["pos_embed_every16"]) < TOLERANCE
        assert relative_error(loads[0], expected["load_first_routed"]) < TOLERANCE
        assert relative_error(loads[-1], expected["load_last_routed"]) < TOLERANCE
        aux = torch.stack([layer._aux_loss for layer in layers])
        assert relative_error(aux, expected["l_aux"]) < TOLERANCE
        torch.testing.assert_close(pop_aux_loss(model), 0.01 * aux.mean())
        labels = torch.stack([y[0], torch.tensor(1000)])
        out = model.forward_with_cfg(torch.cat([x[:1], x[:1]]), t[:1].expand(2), labels, 4.0)
        assert relative_error(out, expected["out_cfg4"]) < TOLERANCE


def test_block():
    manifest, expected = fx.load(FIXTURES / "moh_dit/dit_block")
    block = DiTBlock(**{k: v for k, v in manifest["config"].items() if k != "class"}).eval()
    block.load_state_dict(official(manifest))
    given = {k: torch.from_numpy(v) for k, v in fx.inputs(manifest).items()}
    assert relative_error(block(given["x"], given["c"]), expected["y"]) < 1e-6


def test_counts():
    table = json.loads((FIXTURES / "moh_dit/paper_table.json").read_text())["models"]
    for row in table.values():
        name = row["constructor"].lower()
        model = visionattn.create_dit(name, device="meta")
        params = sum(p.numel() for p in model.parameters())
        assert params == row["official_num_params"]
        assert params - model.pos_embed.numel() == row["official_num_params_without_pos_embed"]
        layers = [block.attn for block in model.blocks]
        assert [a.shared_head for a in layers] == row["shared_head"]
        assert [a.routed_head for a in layers] == row["routed_head_topk"]
    dense = dict(s=32963360, b=130512416, l=458102816, xl=675129632)
    for size, params in dense.items():
        assert sum(p.numel() for p in visionattn.create_dit(f"dit_{size}_2", device="meta").parameters()) == params
    assert {f"dit_{s}_{p}" for s in dense for p in (2, 4, 8)} <= set(list_dits())


def test_starts_as_published():
    torch.manual_seed(0)
    model = visionattn.create_dit("test_moh_dit").eval()
    x = torch.randn(2, 4, 8, 8)
    assert (model(x, torch.tensor([0, 999]), torch.tensor([3, 10])) == 0).all()
    tokens = torch.randn(2, 16, 48)
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 48)), tokens)
    assert not model.pos_embed.requires_grad


def test_other_latents():
    """Positions are grid indices at every size: a model for those latents has the same."""
    model = tiny()
    wide = tiny(input_size=(4, 12))
    wide.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"}, strict=False)
    x, t, y = torch.randn(2, 4, 4, 12), torch.tensor([3.5, 10.0]), torch.tensor([1, 2])
    torch.testing.assert_close(model(x, t, y), wide(x, t, y))
    with pytest.raises(ValueError, match="whole patches"):
        model(torch.randn(1, 4, 5, 8), t[:1], y[:1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(checkpointing):
    model = tiny().train()
    model.set_grad_checkpointing(checkpointing)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 10]), torch.tensor([1, 2])
    torch.manual_seed(1)
    out = model(x, t, y)
    (out.square().mean() + pop_aux_loss(model)).backward()
    assert pop_aux_loss(model) is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_labels_are_dropped_in_training_only():
    model = tiny(class_dropout_prob=0.5)
    y = torch.ones(200, dtype=torch.long)
    table = model.y_embedder.embedding_table.weight
    torch.manual_seed(0)
    dropped = (model.train().y_embedder(y) == table[10]).all(1).float().mean()
    assert 0.35 < dropped < 0.65
    assert torch.equal(model.eval().y_embedder(y), table[1].expand(200, -1))


@pytest.mark.parametrize("how", ["compile", "export"])
def test_programs(how):
    model = tiny()
    args = (torch.randn(2, 4, 8, 8), torch.tensor([3, 10]), torch.tensor([1, 2]))
    if how == "compile":
        program = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        program = torch.export.export(model, args).module()
    with torch.no_grad():
        torch.testing.assert_close(program(*args), model(*args))


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'moh_dit_s_2_75'"):
        visionattn.create_dit("moh_dit_s_2_76")
    with pytest.raises(TypeError):
        visionattn.create_dit("test_moh_dit", nonsense=1)
    with pytest.raises(ValueError, match=r"hidden_size=54: .* multiple of 4"):
        visionattn.create_dit("test_moh_dit", hidden_size=54)
    with pytest.raises(ValueError, match="depth=2"):
        visionattn.create_dit("test_moh_dit", shared_head=[1, 2, 3])
    torch.save(tiny("dit_s_2", hidden_size=24, num_heads=3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        visionattn.create_dit("test_moh_dit", checkpoint=str(tmp_path / "other.pt"))


def test_names_of_diffusers_and_back(tmp_path):
    model = tiny("dit_s_2")
    theirs = dit_to_diffusers(model.state_dict())
    back = dit_from_diffusers(theirs)
    own = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    assert back.keys() == own.keys() and all(torch.equal(back[k], own[k]) for k in own)
    torch.save(theirs, tmp_path / "diffusers.bin")
    again = visionattn.create_dit("dit_s_2", checkpoint=str(tmp_path / "diffusers.bin"), **TINY)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match="router"):
        dit_to_diffusers(tiny().state_dict())


def test_diffusers_network():
    """diffusers' own DiT with our weights; it divides the exponents of the sinusoids by 127 where facebook has 128."""
    require_extra("diffusers", "diffusion")
    from diffusers.models.embeddings import get_timestep_embedding

    from visionattn.models.dit_diffusers import to_diffusers

    model = tiny("dit_s_2")
    theirs = to_diffusers(model)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 10])
    with torch.no_grad():
        exact = model(x, t, y)
        got = theirs(x, timestep=t, class_labels=y).sample
        assert not torch.allclose(got, exact)
        model.t_embedder.forward = lambda t, dtype=None: model.t_embedder.mlp(
            get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
        )
        torch.testing.assert_close(got, model(x, t, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_sampling(scheduler, guidance):
    diffusers = require_extra("diffusers", "diffusion")
    from visionattn.models.dit_diffusers import sample

    model = tiny()
    chosen = None if scheduler is None else getattr(diffusers, scheduler)()

    def draw():
        generator = torch.Generator().manual_seed(3)
        return sample(model, [1, 2], chosen, 4, guidance, generator)

    first = draw()
    assert first.shape == (2, 4, 8, 8) and first.isfinite().all() and torch.equal(first, draw())


def test_first_step_of_the_default_sampler():
    """One step back, written out: the learned range of variances and the posterior mean (DDPM, equations 6 and 7)."""
    require_extra("diffusers", "diffusion")
    from visionattn.models.dit_diffusers import sample

    model = tiny()
    for p in model.final_layer.parameters():
        p.data.mul_(0.01)
    noise = torch.randn(1, 4, 8, 8)
    got = sample(model, [3], num_inference_steps=1, latents=noise, generator=torch.Generator().manual_seed(0))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = (1 - betas)[0]  # with one step, t = 0 is the only one: x_0 is predicted from it
    with torch.no_grad():
        eps = model(noise, torch.tensor([0]), torch.tensor([3]))[:, :4]
    expected = (noise - (1 - signal).sqrt() * eps) / signal.sqrt()
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


def test_pipeline(tmp_path):
    diffusers = require_extra("diffusers", "diffusion")
    from visionattn.models.dit_diffusers import MoHDiTTransformer2DModel

    overrides = {k: v for k, v in TINY.items() if k not in ("input_size", "num_classes")}
    transformer = MoHDiTTransformer2DModel("test_moh_dit", sample_size=8, overrides=dict(overrides, num_classes=1000))
    for p in transformer.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    transformer.eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], num_inference_steps=2, output_type="pt", generator=torch.manual_seed(0)).images
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    transformer.save_pretrained(tmp_path / "transformer")
    again = MoHDiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 10])
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, y).sample, transformer(x, t, y).sample)
