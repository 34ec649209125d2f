"""visionattn.Backbone: maps of any model at any size, frozen stages, weights, bad input."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from tests.extras import require_extra

require_extra("mmdet", "detection")

from mmengine.model import convert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS as ROOT  # noqa: E402

from visionattn.detection import Backbone  # noqa: E402
from visionattn.models._checkpoint import CheckpointError  # noqa: E402

VIT = dict(model="vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2)
SWIN = dict(model="swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), embed_dim=16, num_heads=(1, 2, 2, 4))


def maps_fit(backbone: Backbone, maps, size: tuple[int, int]) -> bool:
    expected = [
        (channels, -(-size[0] // stride), -(-size[1] // stride))
        for channels, stride in zip(backbone.out_channels, backbone.strides, strict=True)
    ]
    return isinstance(maps, tuple) and [tuple(y.shape[1:]) for y in maps] == expected


def test_registered():
    """By its scope in mmengine's root registry and in mmdet's, whatever the default scope."""
    from mmdet.registry import MODELS

    assert ROOT.get("visionattn.Backbone") is Backbone and MODELS.get("visionattn.Backbone") is Backbone
    built = MODELS.build(dict(type="visionattn.Backbone", model="test_ela", out_indices=(2, 3)))
    assert built.out_indices == (2, 3) and built.strides == [8, 16]


# channels first and last; odd sizes by the model itself, by padding to the stride, or to the window
@pytest.mark.parametrize(
    "kwargs, divisor",
    [
        (dict(model="test_agent_swin"), 1),
        (dict(model="agent_pvt_tiny", embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1)), 32),
        (dict(model="test_mala", with_cp=True), 1),
        (dict(model="test_nat", out_norm=True), 1),
        (dict(model="test_halo", norm_eval=True), 1),
        (dict(model="test_ulsam", in_channels=1), 1),
        (dict(model="test_ela", with_cp=True, out_norm=True), 1),
        (dict(SWIN, out_norm=True), 32),
        (dict(model="maxvit_rmlp_pico_rw_256", out_norm=True), 256),
        (dict(model="convnext_atto", out_indices=(1, 3)), 32),
        (dict(VIT, drop_path_rate=0.1), 1),
        (dict(model="resnet18", feature_cls="getter", features_only=True), 1),
        (dict(VIT, pyramid=dict(out_channels=24), out_indices=(1, 2), out_norm=True), 1),
        (dict(model="test_agent_deit"), 1),
    ],
    ids=lambda value: value["model"] if isinstance(value, dict) else "",
)
def test_maps(kwargs, divisor):
    """Every map has its size and channels at an odd size; every parameter learns."""
    backbone = Backbone(**kwargs)
    backbone.init_weights()
    assert backbone.divisor == divisor
    size = (75, 109)
    maps = backbone.train()(torch.randn(2, kwargs.get("in_channels", 3), *size))
    assert maps_fit(backbone, maps, size)
    assert not any(hasattr(m, "num_classes") for m in backbone.modules())  # what mmdet's hook takes for a head
    sum(y.square().mean() for y in maps).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["inception_v3", "tinynet_e", "hrnet_w18_small", "test_moh_vit"])
def test_maps_of_large_models(name):
    """Unpadded convolutions, extractors of timm's own kinds: shapes alone, on the meta device, as FLOPs are counted."""
    with torch.device("meta"):
        backbone = Backbone(name, frozen_stages=1).eval()
    maps = backbone.to("meta")(torch.empty(1, 3, 333, 411, device="meta"))
    assert maps_fit(backbone, maps, (333, 411)) and backbone.strides == [4, 8, 16, 32]


def test_channels_last_and_padding_by_hand():
    """timm's Swin: its NHWC maps turned; an odd image is a padded one whose maps are cropped."""
    backbone = Backbone(**SWIN).eval()
    x = torch.randn(1, 3, 75, 109)
    padded = nn.functional.pad(x, (0, 128 - 109, 0, 96 - 75))
    with torch.no_grad():
        maps, raw = backbone(x), backbone.net(padded)
    for y, z, stride in zip(maps, raw, backbone.strides, strict=True):
        expected = z.permute(0, 3, 1, 2)[:, :, : -(-75 // stride), : -(-109 // stride)]
        torch.testing.assert_close(y, expected)


def test_simple_feature_pyramid():
    """ViTDet, figure 2: the map itself at its own stride, pooled where coarser, transposed convolutions where finer."""
    backbone = Backbone(**VIT).eval()
    with torch.no_grad():
        fine, finer, same, coarse = backbone(torch.randn(1, 3, 64, 96))
        (raw,) = backbone.net(torch.randn(1, 3, 64, 96))
        first, _, _, second = backbone.pyramid.levels[0]
        up = second(nn.functional.gelu(backbone.pyramid.levels[0][1](first(raw))))
        levels = backbone.pyramid(raw)
    assert fine.shape[1] == 8 and finer.shape[1] == 16 and same.shape == raw.shape and coarse.shape[2:] == (2, 3)
    torch.testing.assert_close(levels[0], up)
    assert torch.equal(levels[2], raw) and torch.equal(levels[3], nn.functional.max_pool2d(raw, 2))


def test_recomputed_activations_change_nothing():
    torch.manual_seed(0)
    plain, recomputing = Backbone("test_agent_swin"), Backbone("test_agent_swin", with_cp=True)
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 96)
    calls = []
    for backbone in (plain, recomputing):
        count = []
        backbone.net.model.layers[0].blocks[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        sum(y.square().mean() for y in backbone(x)).backward()
        calls.append(len(count))
    assert calls == [1, 2]
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_image_of_one_size():
    """A model of one size is built for the largest image; smaller ones are padded, larger ones refused."""
    backbone = Backbone("levit_128s", img_size=(96, 128), out_indices=(0, 1)).eval()
    assert maps_fit(backbone, backbone(torch.randn(1, 3, 75, 109)), (75, 109))
    with pytest.raises(ValueError, match=r"images of up to 96 x 128 px \(img_size\), got 97 x 128"):
        backbone(torch.randn(1, 3, 97, 128))


@pytest.mark.parametrize(
    "kwargs, frozen, free",
    [
        (dict(model="test_agent_swin", frozen_stages=0), "net.model.patch_embed", "net.model.layers.0.blocks"),
        (dict(model="test_agent_swin", frozen_stages=1, out_norm=True), "net.model.layers.0", "net.model.layers.1"),
        (dict(model="test_mala", frozen_stages=4, out_norm=True), "net.model.layers.3", "net.model.extra_norms"),
        (dict(SWIN, frozen_stages=2), "net.layers_1", "net.layers_2"),
        (dict(model="resnet18", frozen_stages=1), "net.layer1", "net.layer2"),
        (dict(VIT, frozen_stages=1), "net.model.blocks.0", "net.model.blocks.1"),
    ],
)
def test_frozen_stages(kwargs, frozen, free):
    backbone = Backbone(**kwargs, drop_path_rate=0.5).train()
    named = dict(backbone.named_parameters())
    assert [n for n, p in named.items() if n.startswith(frozen) and p.requires_grad] == []
    assert [n for n, p in named.items() if n.startswith(free) and not p.requires_grad] == []
    # the first of all layers, whatever it is called
    assert not next(
        p for n, p in named.items() if n.endswith(("patch_embed.proj.weight", "conv1.weight", "proj.0.weight"))
    ).requires_grad
    modules = dict(backbone.named_modules())
    assert not any(m.training for n, m in modules.items() if n.startswith(f"{frozen}."))
    assert all(m.training for n, m in modules.items() if n.startswith(f"{free}."))
    assert not backbone.eval().training


@pytest.mark.parametrize("model, indices", [("mobilenetv3_small_050", (1, 2)), ("test_efficientnet", (0,))])
def test_blocks_behind_the_last_map(model, indices, tmp_path):
    """timm keeps and computes them: without a gradient, which DistributedDataParallel does not forgive."""
    torch.manual_seed(0)
    classifier = timm.create_model(model).eval()
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    backbone = Backbone(model, out_indices=indices, pretrained=str(tmp_path / "classifier.pth"))
    backbone.init_weights()
    x = torch.randn(1, 3, 67, 45)
    expected = timm.create_model(model, features_only=True, out_indices=indices)
    expected.load_state_dict(classifier.state_dict(), strict=False)
    for y, reference in zip(backbone.eval()(x), expected.eval()(x), strict=True):
        torch.testing.assert_close(y, reference)
    sum(y.square().mean() for y in backbone.train()(x.repeat(2, 1, 1, 1))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_norm_eval():
    backbone = Backbone("resnet18", norm_eval=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
    assert backbone.training and all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_ulsam", "test_mala"])
def test_synchronised_batch_norms(name):
    """mmengine's ``sync_bn='torch'`` keeps the activations that timm has inside its batch norms."""
    torch.manual_seed(0)
    x, backbone = torch.randn(1, 3, 64, 64), Backbone(name).eval()
    with torch.no_grad():
        expected = backbone(x)
        names = list(backbone.state_dict())
        converted = convert_sync_batchnorm(backbone, "torch").eval()
        maps = converted(x)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert list(converted.state_dict()) == names
    for y, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(y, reference)


@pytest.mark.parametrize("kwargs", [dict(model="test_agent_swin"), dict(model="test_ela"), dict(VIT), dict(SWIN)])
def test_classification_files(kwargs, tmp_path):
    """A classifier of 7 classes, plain and wrapped, is loaded whole; so is the backbone out of a detector's file."""
    args = {k: v for k, v in kwargs.items() if k != "model"}
    classifier = timm.create_model(kwargs["model"], num_classes=7, **args)
    for norm in classifier.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
    torch.save({"model": classifier.state_dict(), "epoch": 3}, tmp_path / "classifier.pth")
    file = str(tmp_path / "classifier.pth")
    backbone = Backbone(**kwargs, init_cfg=dict(type="Pretrained", checkpoint=file))
    backbone.init_weights()
    theirs = {n.replace(".", "_"): v for n, v in classifier.state_dict().items()}
    for name, value in backbone.net.state_dict().items():
        assert torch.equal(value, theirs[name.removeprefix("model.").replace(".", "_")]), name
    torch.save({"state_dict": {f"backbone.{n}": v for n, v in backbone.state_dict().items()}}, tmp_path / "ours.pth")
    other = Backbone(**kwargs, pretrained=str(tmp_path / "ours.pth"))
    other.init_weights()
    assert all(
        torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_checkpoint_of_another_model(tmp_path):
    """Ours and timm's: one line that names the file and the model, where timm itself would load in silence."""
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.pth")
    torch.save(timm.create_model("test_mala").state_dict(), tmp_path / "mala.pth")
    ours = {f"backbone.{n}": v for n, v in Backbone("test_ela").state_dict().items()}
    torch.save(ours, tmp_path / "detector.pth")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint at all")
    for model, file, message in [
        ("resnet18", "resnet34.pth", "does not fit resnet18: it has"),
        ("resnet18", "mala.pth", "does not fit resnet18: it lacks"),
        ("test_agent_swin", "mala.pth", "does not fit test_agent_swin"),
        ("resnet50", "resnet34.pth", "does not fit resnet50"),
        ("resnet18", "broken.pth", "can't be read"),
        ("resnet18", "detector.pth", "is of another backbone than resnet18"),
    ]:
        backbone = Backbone(model, pretrained=str(tmp_path / file))
        with pytest.raises(CheckpointError, match=message) as caught:
            backbone.init_weights()
        assert file in str(caught.value) and "\n" not in str(caught.value)


def test_detector_over_another_backbone():
    """Its other parts load where the loader is not strict, and the names are reported where it is."""
    detector = nn.ModuleDict(dict(backbone=Backbone("test_ela"), neck=nn.Linear(2, 2)))
    before = detector["backbone"].net.conv1[0].weight.clone()
    theirs = {f"backbone.{n}": v for n, v in timm.create_model("test_mala", num_classes=0).state_dict().items()}
    theirs |= {"neck.weight": torch.ones(2, 2), "neck.bias": torch.ones(2)}
    result = detector.load_state_dict(theirs, strict=False)
    assert detector["neck"].bias.sum() == 2 and torch.equal(detector["backbone"].net.conv1[0].weight, before)
    assert any(n.startswith("backbone.net.") for n in result.missing_keys) and result.unexpected_keys


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(model="agent_swin_tinny"), ValueError, "neither by visionattn nor by timm: did you mean agent_"),
        (dict(model=None), ValueError, "registered neither by visionattn nor by timm"),
        (dict(model="test_ela", out_indices=(0, 5)), ValueError, "has 5 maps, 0 to 4, at strides 2, 4, 8, 16, 32"),
        (dict(VIT, out_indices=(4,)), ValueError, "has 4 maps, 0 to 3"),
        (dict(model="test_ela", out_indices=(2, 1)), ValueError, "do not ascend"),
        (dict(model="test_ninformer"), ValueError, "takes images of 32 x 32 px only"),
        (dict(model="levit_128s"), ValueError, "takes images of 224 x 224 px only.*img_size="),
        (dict(model="test_mala", agents=3), TypeError, "test_mala: .*unexpected keyword argument 'agents'"),
        (dict(model="test_ela", img_size=(96, 96)), TypeError, "it is of no size, leave img_size='dynamic'"),
        (dict(model="test_ela", img_size="large"), ValueError, "img_size='large': give 'dynamic', or"),
        (dict(model="hrnet_w18_small", with_cp=True), ValueError, "can't recompute activations"),
        (dict(model="test_ela", checkpoint_path="x.pth"), TypeError, "give init_cfg="),
        (dict(model="test_ela", frozen_stages=9), ValueError, "has 4 stages"),
        (dict(model="test_ela", pyramid=dict(out_channels=8)), ValueError, "is for models with one stride"),
        (dict(model="vit_small_patch14_dinov2", depth=1), ValueError, "stride 14, which is no power of two"),
        (dict(model="test_ela", pretrained="x", init_cfg=dict(type="Pretrained")), ValueError, "not by both"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        Backbone(**kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "checkpoint, error, message",
    [
        ("nowhere/x.pth", FileNotFoundError, "nowhere/x.pth does not exist"),
        ("in22k", ValueError, "no tag of agent_swin_tiny, which has agent_swin_tiny.in1k"),
        ("agent_pvt_tiny.in1k", ValueError, "no tag of agent_swin_tiny"),
    ],
)
def test_bad_checkpoints(checkpoint, error, message):
    with pytest.raises(error, match=message):
        Backbone("agent_swin_tiny", depths=(1, 1, 1, 1), embed_dim=12, pretrained=checkpoint).init_weights()


IMPORT = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.startswith("mm") else found(name, *a)
try:
    import visionattn.detection
except ImportError as error:
    print(error)
importlib.util.find_spec = found
import visionattn.detection
importlib.util.find_spec = lambda name, *a: None if name == "mmdet" else found(name, *a)
from mmengine.registry import MODELS
MODELS.build(dict(type="visionattn.Backbone", model="test_ela"))
assert not any(name.partition(".")[0] == "mmdet" for name in sys.modules)
"""


def test_import():
    """Without mmdet one line that says what to install; a backbone of mmsegmentation's, say, is built without it."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("visionattn.detection needs mmdet: pip install 'visionattn[detection]'")
    assert done.stdout.count("\n") == 1
