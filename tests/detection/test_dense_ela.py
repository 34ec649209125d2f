"""ELA in dense prediction against the authors' networks: YOLOX-Nano, YOLOF's encoder, DeepLabV3."""

from collections import OrderedDict

import pytest
import torch

from tests.extras import require_extra
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx

require_extra("mmdet", "detection")

from mmengine.registry import MODELS, init_default_scope  # noqa: E402

import visionattn.detection  # noqa: E402, F401

TOLERANCE = 5e-6  # networks

NANO = dict(
    type="visionattn.ELAYOLOX",
    data_preprocessor=dict(type="DetDataPreprocessor", pad_size_divisor=32),
    backbone=dict(type="CSPDarknet", deepen_factor=0.33, widen_factor=0.25, out_indices=(2, 3, 4), use_depthwise=True),
    neck=dict(
        type="visionattn.ELAYOLOXPAFPN",
        in_channels=[64, 128, 256],
        out_channels=64,
        num_csp_blocks=1,
        use_depthwise=True,
    ),
    bbox_head=dict(type="YOLOXHead", num_classes=20, in_channels=64, feat_channels=64, use_depthwise=True),
    train_cfg=dict(assigner=dict(type="SimOTAAssigner", center_radius=2.5)),
    test_cfg=dict(score_thr=0.01, nms=dict(type="nms", iou_threshold=0.65)),
)


def build(cfg: dict) -> torch.nn.Module:
    init_default_scope("mmdet")
    return MODELS.build(cfg)


def official(name: str):
    manifest, expected = fx.load(FIXTURES / "ela" / name)
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    return state, torch.from_numpy(fx.inputs(manifest)["x"]), expected, manifest["num_params"]


def assert_loads(model: torch.nn.Module, state: dict) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing), (missing, unexpected)


def test_yolox_nano():
    """The published layout, with the modules that its class builds and never calls, loads by name."""
    state, x, expected, num_params = official("ela_t_yolox_nano_voc")
    state |= {"backbone.feat5.gn.weight": torch.ones(512), "backbone.feat10.gn.weight": torch.ones(1024)}
    model = build(NANO).eval()
    assert sum(p.numel() for p in model.parameters()) == num_params
    assert_loads(model, state)
    with torch.no_grad():
        scores, boxes, objectness = model(x, mode="tensor")
    for i, level in enumerate(("p3", "p4", "p5")):
        assert relative_error(torch.cat([boxes[i], objectness[i], scores[i]], 1), expected[level]) < TOLERANCE
    again = build(NANO)
    again.load_state_dict(model.state_dict())  # mmdet's own names, strictly


@pytest.mark.parametrize("residual", [False, True])
def test_yolox_neck_trains(residual):
    neck = build(NANO["neck"] | dict(residual=residual, version="b"))
    maps = [torch.randn(2, c, *hw) for c, hw in ((64, (12, 8)), (128, (6, 4)), (256, (3, 2)))]
    outs = neck(maps)
    assert [tuple(y.shape) for y in outs] == [(2, 64, 12, 8), (2, 64, 6, 4), (2, 64, 3, 2)]
    sum(y.square().mean() for y in outs).backward()
    assert all(p.grad is not None for p in neck.parameters())
    with pytest.raises(ValueError, match="takes 3 maps, got 2"):
        neck(maps[:2])


def test_yolof_encoder():
    state, x, expected, num_params = official("ela_t_yolof_encoder")
    cfg = dict(in_channels=2048, out_channels=512, block_mid_channels=128, num_residual_blocks=4)
    encoder = build(dict(type="visionattn.ELADilatedEncoder", block_dilations=[2, 4, 6, 8], **cfg)).eval()
    encoder.init_weights()
    assert sum(p.numel() for p in encoder.parameters()) == num_params
    assert_loads(encoder, state)
    with torch.no_grad():
        (out,) = encoder([x])
    assert relative_error(out, expected["out"]) < TOLERANCE
    detector = torch.nn.ModuleDict(dict(neck=encoder))  # under a prefix, as in a detector's file
    assert_loads(detector, {f"neck.{name}": value for name, value in state.items()})


class Maps(torch.nn.Module):
    """A backbone as torchvision's segmentation networks want it: the last map under 'out'."""

    def __init__(self, backbone: torch.nn.Module):
        super().__init__()
        self.body = backbone

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return OrderedDict(out=self.body(x)[-1])


def test_deeplabv3(tmp_path):
    """torchvision's network and head over our backbone, which loads the authors' trunk out of the segmentor's file."""
    from torchvision.models.segmentation import DeepLabV3
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    state, x, expected, num_params = official("ela_s_deeplabv3_resnet18_os16")
    torch.save(state, tmp_path / "segmentor.pth")
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "segmentor.pth"), prefix="backbone.")
    backbone = build(
        dict(type="visionattn.Backbone", model="ela_s_resnet18", out_indices=(4,), output_stride=16, init_cfg=cfg)
    )
    backbone.init_weights()
    assert backbone.strides == [16] and backbone.out_channels == [512]
    model = DeepLabV3(Maps(backbone), DeepLabHead(512, 21, (6, 12, 18))).eval()
    prefix = "classifier.classifier."
    assert_loads(model.classifier, {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
    assert sum(p.numel() for p in model.parameters()) == num_params
    with torch.no_grad():
        low = model.classifier(model.backbone(x)["out"])
        assert relative_error(low, expected["low"]) < TOLERANCE
        resized = torch.nn.functional.interpolate(low, x.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(x)["out"], resized)
