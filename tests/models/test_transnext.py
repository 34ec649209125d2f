"""TransNeXt and MoH-ViT: what the released code computes, published counts, sizes, and the released names."""

import argparse
import json

import pytest
import timm
import torch

import visionattn  # noqa: F401  registers the models
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn._meta import NoInit
from visionattn.layers.moh import HeadRouter, pop_aux_loss
from visionattn.layers.transnext import AggregatedAttention

TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file as the authors': the whole training state."""
    manifest, expected = fx.load(FIXTURES / "moh_vit/moh_vit_small_80_224")
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    file = tmp_path_factory.mktemp("moh") / "moh_transnext_small_80.pth"
    torch.save({"model": state, "epoch": 299, "scaler": {}, "args": argparse.Namespace(lr=1e-3)}, file)
    return file, manifest, expected


def routing_layers(model):
    return [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed and m.routed_head > 0]


def test_moh_vit_small_80(official):
    file, manifest, expected = official
    model = timm.create_model("moh_vit_small_80", pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    loads = []
    for layer in routing_layers(model):

        def gates(x, q, layer=layer, original=layer.gates):
            out = original(x, q)
            loads.append((out[..., layer.shared_head :] > 0).float().mean((0, 1)))
            return out

        layer.gates = gates
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert relative_error(model.forward_head(last), expected["logits"]) < TOLERANCE
        assert relative_error(model.forward_head(last, pre_logits=True), expected["features"]) < TOLERANCE
        for i, y in enumerate(maps):
            assert relative_error(y.mean((2, 3)), expected[f"stage{i + 1}_mean"]) < TOLERANCE
        for i in (2, 3):
            tokens = maps[i].flatten(2).transpose(1, 2)
            assert relative_error(tokens, expected[f"stage{i + 1}_tokens"]) < TOLERANCE
        assert relative_error(torch.stack(loads[:22]), expected["load_stage3"]) < TOLERANCE
        assert relative_error(torch.stack(loads[22:]), expected["load_stage4"]) < TOLERANCE
        for layer in routing_layers(model):
            layer.training = True
        model(x)
    aux = torch.stack([layer._aux_loss for layer in routing_layers(model)])
    assert relative_error(aux, expected["l_aux"]) < TOLERANCE
    assert relative_error(pop_aux_loss(model)[None], 0.01 * expected["l_aux"].mean(keepdims=True)) < TOLERANCE


def test_head_of_another_size(official):
    file, manifest, _ = official
    model = timm.create_model(
        "moh_vit_small_80", pretrained=True, num_classes=7, img_size=64, pretrained_cfg_overlay=dict(file=str(file))
    )
    assert model.head.out_features == 7
    weights = fx.state_dict(manifest)
    assert torch.equal(model.stages[1].patch_embed.proj.weight, torch.from_numpy(weights["patch_embed2.proj.weight"]))


@NoInit()
def test_counts():
    table = json.loads((FIXTURES / "moh_vit/paper_table.json").read_text())["models"]
    for row in table.values():
        model = timm.create_model(row["constructor"].replace("moh_transnext", "moh_vit"), device="meta")
        params = sum(p.numel() for p in model.parameters())
        assert params == row["official_num_params"] and round(params / 1e6) == row["params_M"]
        active = total = 0
        for m in (m for m in model.modules() if isinstance(m, HeadRouter)):
            active, total = active + m.shared_head + m.routed_head, total + m.num_heads
        assert abs(100 * active / total - row["activated_heads_percent"]) < 0.5


@pytest.mark.parametrize(
    "name, params",
    [("micro", 12809304), ("tiny", 28258960), ("small", 49741564), ("base", 89721496)],
)
@NoInit()
def test_dense_counts(name, params):
    assert sum(p.numel() for p in timm.create_model(f"transnext_{name}", device="meta").parameters()) == params


def test_test_model_is_small():
    assert sum(p.numel() for p in timm.create_model("test_moh_vit", device="meta").parameters()) <= 500_000


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (97, 75), (32, 33)])
def test_sizes(size):
    torch.manual_seed(0)
    model = timm.create_model("test_moh_vit").eval()
    features = timm.create_model("test_moh_vit", features_only=True).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert model(x).isfinite().all()
        for y, r in zip(features(x), (4, 8, 16, 32), strict=True):
            assert y.shape[2:] == (-(-size[0] // r), -(-size[1] // r))


def test_image_size_does_not_change_the_function():
    """Built for its input, or given another size: the same, where pretrain_size is the same."""
    torch.manual_seed(0)
    at_96 = timm.create_model("test_moh_vit").eval()
    at_128 = timm.create_model("test_moh_vit", img_size=(128, 64), pretrain_size=96).eval()
    at_128.load_state_dict(at_96.state_dict())
    x = torch.randn(1, 3, 128, 64)
    with torch.no_grad():
        assert torch.equal(at_96(x), at_128(x))
        at_96.set_input_size((128, 64))
        assert torch.equal(at_96(x), at_128(x)) and at_96.img_size == (128, 64)
        other = timm.create_model("test_moh_vit", img_size=(128, 64)).eval()
        other.load_state_dict(at_96.state_dict())
        assert not torch.allclose(at_96(x), other(x))


def test_fixed_pool_size():
    model = timm.create_model("test_moh_vit", fixed_pool_size=2).eval()
    pooled = [m.pooled_grid((20, 9)) for m in model.modules() if isinstance(m, AggregatedAttention)]
    assert pooled and set(pooled) == {(2, 2)}
    assert model(torch.randn(1, 3, 96, 64)).isfinite().all()


def test_no_weight_decay():
    model = timm.create_model("test_moh_vit")
    kept = model.no_weight_decay()
    assert "stages.0.blocks.0.attn.cpb_fc1.weight" in kept and "stages.3.blocks.0.attn.temperature" in kept
    assert not any("learnable" in name for name in kept)


@pytest.mark.parametrize("how", ["script", "export"])  # tests/conformance/test_extra.py compiles it
def test_programs(how):
    torch.manual_seed(0)
    model = timm.create_model("test_moh_vit", img_size=64).eval()
    x = torch.randn(2, 3, 64, 96)
    if how == "script":
        program = torch.jit.script(model)
    else:
        program = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
