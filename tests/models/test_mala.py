"""MAViT: what the released code computes, published counts, sizes, and the authors' files."""

import argparse
import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import visionattn  # noqa: F401  registers the models
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn._meta import NoInit
from visionattn.models._checkpoint import CheckpointError
from visionattn.models.mala import Block, ChannelNorm, Stem

TOLERANCE = 5e-6
TABLE = json.loads((FIXTURES / "mala/paper_table.json").read_text())["models"]


def weights(manifest: dict) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file as the authors': the whole training state, with the angles that their state dict has."""
    manifest, expected = fx.load(FIXTURES / "mala/mala_tiny")
    state = weights(manifest)
    state |= {f"layers.{i}.RoPE.angle": torch.full((32,), float("nan")) for i in range(4)}
    file = tmp_path_factory.mktemp("mala") / "MAViT_T.pth"
    torch.save({"model": state, "epoch": 299, "scaler": {}, "args": argparse.Namespace(lr=1e-3)}, file)
    return file, manifest, expected


def grid_of(y: torch.Tensor) -> torch.Tensor:
    H, W = y.shape[2:]
    rows = [int((i + 0.5) * H / 4) for i in range(4)]
    columns = [int((i + 0.5) * W / 4) for i in range(4)]
    return y[:1, :, rows][..., columns]


def test_mala_tiny(official):
    file, manifest, expected = official
    model = timm.create_model("mala_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert relative_error(model.forward_head(last), expected["logits"]) < TOLERANCE
        assert relative_error(model.forward_head(last, pre_logits=True), expected["pre_logits"]) < TOLERANCE
    for i, y in enumerate(maps):
        assert relative_error(y.mean((2, 3)), expected[f"stage{i + 1}"]) < TOLERANCE
        assert relative_error(grid_of(y), expected[f"stage{i + 1}_grid"]) < TOLERANCE


def test_mala_tiny_dense(tmp_path):
    manifest, expected = fx.load(FIXTURES / "mala/mala_tiny_dense")
    torch.save({"state_dict": weights(manifest)}, tmp_path / "dense.pth")
    model = timm.create_model(
        "mala_tiny", pretrained=True, features_only=True, out_norm=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "dense.pth")),
    ).eval()  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    with torch.no_grad():
        maps = model(torch.from_numpy(fx.inputs(manifest)["x"]))
    for i, y in enumerate(maps):
        assert list(y.shape[2:]) == [int(n) for n in expected["out_hw"][i]]
        assert relative_error(y.mean((2, 3)), expected[f"out{i}"]) < TOLERANCE
        assert relative_error(grid_of(y), expected[f"out{i}_grid"]) < TOLERANCE


def test_dense_from_a_classification_file(official):
    """The norms that such a file lacks stay as initialised; without them its features are those of the classifier."""
    file, manifest, _ = official
    kwargs = dict(pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=str(file)))
    plain, normed = (timm.create_model("mala_tiny", out_norm=out, **kwargs).eval() for out in (False, True))
    x = torch.from_numpy(fx.inputs(manifest)["x"])[:1]
    with torch.no_grad():
        for y, z in zip(plain(x), normed(x), strict=True):
            z = z.permute(0, 2, 3, 1)
            assert z.mean(-1).abs().max() < 1e-4 and (z.var(-1, correction=0) - 1).abs().max() < 1e-3
            torch.testing.assert_close(torch.nn.functional.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]), z)


def test_dense_file_without_its_norms(tmp_path):
    state = timm.create_model("test_mala", features_only=True, out_norm=True).state_dict()
    dense = {f"backbone.{name.removeprefix('model.')}": value for name, value in state.items()}
    torch.save({"state_dict": dense}, tmp_path / "dense.pth")
    overlay = dict(file=str(tmp_path / "dense.pth"))
    with pytest.raises(CheckpointError, match=r"dense\.pth is of .*features_only=True, out_norm=True$"):
        timm.create_model("test_mala", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)


def test_head_of_another_size(official):
    file, manifest, _ = official
    model = timm.create_model("mala_tiny", pretrained=True, num_classes=7, pretrained_cfg_overlay=dict(file=str(file)))
    assert model.head.out_features == 7
    assert torch.equal(model.proj.weight, weights(manifest)["proj.weight"])


def test_block():
    manifest, expected = fx.load(FIXTURES / "mala/mala_block")
    block = Block(64, 2)
    state = {k.removeprefix("block."): v for k, v in weights(manifest).items()}
    assert sum(p.numel() for p in block.parameters()) == manifest["num_params"]
    block.load_state_dict(state)
    got = {}
    for name in ("pos", "attn", "ffn"):  # the branches without layer scale, which they apply themselves

        def hook(module, args, kwargs, output, name=name):
            if name == "pos":  # which adds its input
                got[name] = output - args[0]
                return
            scaled = kwargs.get("layer_scale") if name == "attn" else args[1]
            got[name] = output / scaled.flatten()

        getattr(block, name).register_forward_hook(hook, with_kwargs=True)
    x = torch.from_numpy(fx.inputs(manifest)["x"]).permute(0, 2, 3, 1)
    sin, cos = timm.create_model("mala_tiny", num_heads=(2, 2, 4, 8)).layers[0].RoPE((14, 14), 0, torch.float32)
    out = block.eval()(x, (sin, cos)).permute(0, 3, 1, 2)
    assert relative_error(out, expected["out"]) < 1e-6
    for name, y in got.items():
        y = y.reshape(1, 14, 14, 64).permute(0, 3, 1, 2)
        assert relative_error(y, expected[name]) < (1e-5 if name == "pos" else 1e-6), name


def test_stem():
    manifest, expected = fx.load(FIXTURES / "mala/mala_stem")
    stem = Stem(3, 64)
    missing, unexpected = stem.load_state_dict(weights(manifest), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    assert relative_error(stem.eval()(torch.from_numpy(fx.inputs(manifest)["x"])), expected["out"]) < 1e-6


@pytest.mark.parametrize("name", sorted(TABLE))
@NoInit()
def test_counts(name):
    row = TABLE[name]
    model = timm.create_model(name, device="meta")
    params = sum(p.numel() for p in model.parameters())
    assert params == row["official_num_params"] and round(params / 1e6) == row["params_M"]
    eps = {m.norm.eps for m in model.modules() if isinstance(m, ChannelNorm)}
    assert eps == {1e-6}


def test_test_model_is_small():
    assert sum(p.numel() for p in timm.create_model("test_mala", device="meta").parameters()) <= 500_000


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (97, 75), (32, 33)])
def test_sizes(size):
    torch.manual_seed(0)
    model = timm.create_model("test_mala").eval()
    features = timm.create_model("test_mala", features_only=True).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert model(x).isfinite().all()
        for y, r in zip(features(x), (4, 8, 16, 32), strict=True):
            assert y.shape[2:] == (-(-size[0] // r), -(-size[1] // r))


@pytest.mark.parametrize("how", ["script", "export", "export any size"])  # tests/conformance/test_extra.py compiles it
def test_programs(how):
    torch.manual_seed(0)
    model = timm.create_model("test_mala").eval()
    x, other = torch.randn(2, 3, 64, 96), torch.randn(2, 3, 96, 128)
    if how == "script":
        program = torch.jit.script(model)
    else:
        h, w = torch.export.Dim("h", min=1, max=64), torch.export.Dim("w", min=1, max=64)
        shapes = ({2: 32 * h, 3: 32 * w},) if how == "export any size" else None
        program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    with torch.no_grad():
        # relative to the output, which a fresh head makes small
        assert relative_error(program(x), model(x).numpy()) < 1e-5
        if how != "export":
            assert relative_error(program(other), model(other).numpy()) < 1e-5


def test_refused():
    with pytest.raises(ValueError, match="attn_type='linea' is unknown"):
        timm.create_model("test_mala", attn_type="linea")
    with pytest.raises(ValueError, match="differ in length"):
        timm.create_model("test_mala", depths=(1, 1))


@pytest.mark.parametrize("name", ["mala_tiny", "mala_small", "mala_base", "mala_large"])
@NoInit()
def test_flops(name):
    """Products and convolutions of one image, as PyTorch counts them, within 1 % of the released code's."""
    model = timm.create_model(name, device="meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert abs(counter.get_total_flops() / 1e9 / TABLE[name]["torch_flop_counter_gflops"] - 1) < 0.01
