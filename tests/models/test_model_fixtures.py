"""What the reference implementations compute, through the user's own door: a file and ``timm.create_model``."""

import numpy as np
import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn

import visionattn  # noqa: F401  registers the models
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers import HaloAttention

TOLERANCE = 5e-6

HALO = {
    "halonet/assembled_h0": ("halo_h0", {}),
    "halonet/assembled_toy_rv2p5": (
        "halo_h0",
        dict(block_size=4, halo_size=1, rv=2.5, rb=2, depths=(2, 1, 2, 1), final_dim=96, act_layer="relu"),
    ),
}
LOGITS = {
    **HALO,
    "ela/ela_b_mobilenetv2": ("ela_b_mobilenetv2", {}),
    "ela/ela_l_mobilenetv2": ("ela_l_mobilenetv2", {}),
    "ulsam/assembled_mv1_after_12_g4": ("ulsam_mobilenetv1_100", dict(insert_after=[12], groups=4)),
    "ulsam/assembled_mv2_replace_14_17_g4": ("ulsam_mobilenetv2_100", dict(replace=[14, 17], groups=4)),
    "ninformer/ninformer_cifar10": ("ninformer_patch4_32", {}),
    "ninformer/ninformer_cifar100": ("ninformer_patch4_32", {}),
}


def load_model(name: str, manifest: dict, path, wrapper: str | None = None, **kwargs):
    """The model with the fixture's weights, loaded as a user loads the authors' file."""
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    file = path / "official.pth"
    torch.save({wrapper: state} if wrapper else state, file)
    overlay = dict(file=str(file))
    if "num_classes" in kwargs:
        overlay["num_classes"] = kwargs["num_classes"]
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize("fixture", sorted(LOGITS))
def test_logits(fixture, tmp_path):
    name, kwargs = LOGITS[fixture]
    manifest, expected = fx.load(FIXTURES / fixture)
    classes = expected["logits"].shape[1]
    model = load_model(name, manifest, tmp_path, wrapper="state_dict", num_classes=classes, **kwargs)
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    with torch.no_grad():
        assert relative_error(model(x), expected["logits"]) < TOLERANCE


@pytest.mark.parametrize(
    "fixture, name, output_stride",
    [
        ("ela/ela_s_resnet18_os16", "ela_s_resnet18", 16),
        ("ela/ela_t_resnet50_os32", "ela_t_resnet50", 32),
    ],
)
def test_ela_trunk(fixture, name, output_stride, tmp_path):
    manifest, expected = fx.load(FIXTURES / fixture)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    kwargs = dict(output_stride=output_stride)
    trunk = load_model(name, manifest, tmp_path, num_classes=0, **kwargs)
    assert sum(p.numel() for p in trunk.parameters()) == manifest["num_params"]
    features = load_model(name, manifest, tmp_path, features_only=True, out_indices=(2, 4), **kwargs)
    with torch.no_grad():
        layer2, layer4 = features(x)
        assert relative_error(layer2, expected["layer2"]) < TOLERANCE
        assert relative_error(layer4, expected["layer4"]) < TOLERANCE
        assert relative_error(trunk.forward_features(x), expected["layer4"]) < TOLERANCE


def test_ela_deeplabv3(tmp_path):
    """The trunk out of the segmentor's file, all else torchvision's."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation import DeepLabV3
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    manifest, expected = fx.load(FIXTURES / "ela/ela_s_deeplabv3_resnet18_os16")
    trunk = load_model("ela_s_resnet18", manifest, tmp_path, num_classes=0, output_stride=16)
    model = DeepLabV3(IntermediateLayerGetter(trunk, {"layer4": "out"}), DeepLabHead(512, 21, (6, 12, 18))).eval()
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    heads = {k.removeprefix("classifier."): torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    missing = model.load_state_dict({k: v for k, v in heads.items() if k.startswith("classifier.")}, strict=False)[0]
    assert all(name.startswith("backbone.") or name.endswith("num_batches_tracked") for name in missing)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    with torch.no_grad():
        assert relative_error(model.classifier(model.backbone(x)["out"]), expected["low"]) < TOLERANCE


def test_ninformer_tokens(tmp_path):
    manifest, expected = fx.load(FIXTURES / "ninformer/ninformer_cifar10")
    model = load_model("ninformer_patch4_32", manifest, tmp_path)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    with torch.no_grad():
        tokens, blocks = model.forward_intermediates(x, output_fmt="NLC")
        assert relative_error(blocks[0], expected["block0_tokens"]) < TOLERANCE
        means = torch.stack([b.mean(dim=1) for b in blocks])
        assert relative_error(means, expected["block_tokens_mean"]) < TOLERANCE
        assert relative_error(model.forward_head(tokens, pre_logits=True), expected["features"]) < TOLERANCE


def test_head_of_another_size(tmp_path):
    """A file with 10 classes under a model with 7: the trunk loads, the head is new."""
    manifest, _ = fx.load(FIXTURES / "ninformer/ninformer_cifar10")
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    torch.save({"model_ema": state, "model": {}}, tmp_path / "official.pth")
    model = timm.create_model(
        "ninformer_patch4_32",
        pretrained=True,
        num_classes=7,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "official.pth")),
    )
    assert model.classifier.out_features == 7
    assert np.array_equal(model.patcher.weight.detach().numpy(), state["patcher.weight"].numpy())


def with_our_attention(model: torch.nn.Module) -> torch.nn.Module:
    """timm's network with our layer in the place of each of timm's ``HaloAttn``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, HaloAttn):
            ours = HaloAttention(
                module.q.in_channels,
                module.dim_out_v,
                stride=2 if module.block_stride > 1 or isinstance(module.pool, torch.nn.AvgPool2d) else 1,
                num_heads=module.num_heads,
                dim_head=module.dim_head_qk,
                block_size=module.block_size,
                halo_size=module.halo_size,
                avg_down=isinstance(module.pool, torch.nn.AvgPool2d),
                scale_pos_embed=module.scale_pos_embed,
            )
            model.set_submodule(name, ours)
    return model


@pytest.mark.parametrize("name", ["halonet26t", "halonet_h1"])
def test_halo_layer_in_timms_networks(name):
    """timm's own weights and networks, with our attention layer."""
    manifest, expected = fx.load(FIXTURES / f"halonet/timm_{name}")
    model = with_our_attention(timm.create_model(name))
    assert any(isinstance(m, HaloAttention) for m in model.modules())
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    model.eval()
    with torch.no_grad():
        assert relative_error(model(x), expected["logits"]) < TOLERANCE
        assert relative_error(model.forward_features(x).mean((2, 3)), expected["features"]) < TOLERANCE
