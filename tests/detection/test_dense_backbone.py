"""The papers' backbones for dense prediction: their outputs, out of their classifiers' and detectors' files."""

import copy

import pytest
import timm
import torch
from torch import nn

from tests.extras import require_extra
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx

require_extra("mmdet", "detection")

from mmengine.runner.checkpoint import load_state_dict  # noqa: E402

from visionattn.detection import Backbone  # noqa: E402
from visionattn.models._checkpoint import CheckpointError  # noqa: E402

TOLERANCE = 5e-6  # networks


def official(name: str):
    manifest, expected = fx.load(FIXTURES / name)
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    return state, torch.from_numpy(fx.inputs(manifest)["x"]), expected, manifest


def sampled(y: torch.Tensor) -> torch.Tensor:
    """Rows floor((i + 0.5) H / 4) and such columns of the first image, as the fixtures have them."""
    rows, columns = (((torch.arange(4) + 0.5) * side / 4).long() for side in y.shape[2:])
    return y[:1, :, rows][..., columns]


DENSE = {
    "agent/agent_swin_tiny_dense": dict(
        model="agent_swin_tiny", agent_shapes=((9, 9), (12, 12), (14, 14), (7, 7)), out_norm=True
    ),
    "agent/agent_pvt_tiny_dense": dict(
        model="agent_pvt_tiny", agent_shapes=((12, 12), (16, 16), (28, 28), (28, 28))
    ),
    "mala/mala_tiny_dense": dict(model="mala_tiny", out_norm=True),
    "nat/nat_mini_dense_250x186": dict(model="nat_mini", out_norm=True),
}  # fmt: skip


@pytest.mark.parametrize("fixture", sorted(DENSE))
def test_published_backbone(fixture, tmp_path):
    """From a detector's file by ``prefix``, and with the whole detector under the authors' names."""
    state, x, expected, manifest = official(fixture)
    theirs = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"state_dict": theirs | {"neck.conv.bias": torch.ones(2)}}, tmp_path / "detector.pth")
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "detector.pth"), prefix="backbone.")
    backbone = Backbone(**DENSE[fixture], init_cfg=cfg).eval()
    assert sum(p.numel() for p in backbone.parameters()) == manifest["num_params"]
    backbone.init_weights()
    with torch.no_grad():
        maps = backbone(x)
    key = "feat" if "feat0" in expected else "out"
    for i, y in enumerate(maps):
        assert relative_error(y.mean((2, 3)), expected[f"{key}{i}"]) < TOLERANCE
        assert relative_error(sampled(y), expected[f"{key}{i}_grid"]) < TOLERANCE
    loaded = {name: value.clone() for name, value in backbone.state_dict().items()}
    for parameter in backbone.parameters():
        nn.init.zeros_(parameter)
    detector = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone)))  # as averages of weights have it
    load_state_dict(detector, theirs, strict=True)
    backbone = detector["backbone"]
    assert all(torch.equal(value, loaded[name]) for name, value in backbone.state_dict().items())


def test_from_the_classifier(tmp_path):
    """As the authors load it: all but the head, and norms of the outputs that begin as ones and zeros."""
    state, _, _, _ = official("agent/agent_swin_tiny")
    torch.save({"model": state}, tmp_path / "classifier.pth")
    backbone = Backbone(**DENSE["agent/agent_swin_tiny_dense"], pretrained=str(tmp_path / "classifier.pth"))
    backbone.init_weights()
    norms = 0
    for name, value in backbone.net.model.named_parameters():
        if name in state:
            assert torch.equal(value, state[name].reshape(value.shape)), name
        else:
            norms += 1
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
    assert norms == 8


def test_norms_that_are_not_asked_for(tmp_path):
    state = timm.create_model("test_nat", num_classes=0, global_pool="").state_dict()
    norms = {f"norm{i}.{leaf}": torch.ones(16 * 2**i) for i in range(4) for leaf in ("weight", "bias")}
    torch.save({n: v for n, v in state.items() if not n.startswith("norm.")} | norms, tmp_path / "dense.pth")
    with pytest.raises(CheckpointError, match=r"holds norms of the outputs .*: give out_norm=True"):
        Backbone("test_nat", pretrained=str(tmp_path / "dense.pth")).init_weights()
