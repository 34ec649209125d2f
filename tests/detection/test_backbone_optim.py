"""Layer decay: timm's own groups, with heads at the full rate."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from tests.extras import require_extra

require_extra("mmdet", "detection")

from mmengine.optim import build_optim_wrapper  # noqa: E402

from visionattn.detection import Backbone  # noqa: E402
from visionattn.detection.backbone import _bare, _flat  # noqa: E402


def wrapper(model: nn.Module, weight_decay: float = 0.05, **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=weight_decay),
            constructor="visionattn.LayerDecayOptimWrapperConstructor",
            paramwise_cfg=paramwise,
        ),
    )


def settings(groups: list[dict]) -> dict[int, tuple[float, float]]:
    return {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


# all wrappers of timm's: getter, list with flattened names; positions and tables without weight decay
@pytest.mark.parametrize(
    "name", ["test_agent_swin", "test_agent_deit", "test_mala", "test_nat", "test_halo", "test_ulsam", "resnet18",
             "swin_tiny_patch4_window7_224"],
)  # fmt: skip
def test_groups_are_timms(name):
    detector = nn.ModuleDict(dict(backbone=Backbone(name), head=nn.Conv2d(8, 4, 1)))
    optim = wrapper(detector, decay_rate=0.7)
    got = settings(optim.optimizer.param_groups)
    full = timm.create_model(name, **detector["backbone"].model_args)
    no_decay = full.no_weight_decay() if hasattr(full, "no_weight_decay") else ()
    expected = settings(
        param_groups_layer_decay(full, weight_decay=0.05, no_weight_decay_list=no_decay, layer_decay=0.7)
    )
    by_name = {_flat(n): expected[id(p)] for n, p in full.named_parameters()}
    compared = set()
    for n, p in detector["backbone"].net.named_parameters():
        assert got[id(p)] == pytest.approx(by_name[_flat(_bare(f"net.{n}"))]), n
        compared.add(got[id(p)][0])
    assert len(compared) > 4 and max(compared) == pytest.approx(0.7)
    assert [got[id(p)] for p in detector["head"].parameters()] == [(1.0, 0.05), (1.0, 0.0)]
    for group in optim.optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_scale"])


def test_plain_timm_model_custom_keys_and_frozen_parameters():
    model = nn.Module()
    model.backbone = timm.create_model("test_agent_swin", num_classes=0)
    model.head = nn.Linear(4, 4)
    model.backbone.patch_embed.requires_grad_(False)
    optim = wrapper(model, decay_rate=0.5, custom_keys={"head": dict(lr_mult=3.0, decay_mult=0.0)}, no_decay_1d=False)
    got = settings(optim.optimizer.param_groups)
    assert got[id(model.head.weight)] == (3.0, 0.0)
    assert got[id(model.backbone.layers[3].blocks[0].norm1.bias)] == (0.5, 0.05)
    assert got[id(model.backbone.layers[2].blocks[1].attn.relative_position_bias_table)][1] == 0.0
    assert not any(id(p) in got for p in model.backbone.patch_embed.parameters())
    optim.update_params(model.backbone(torch.randn(2, 3, 96, 96)).square().mean())


@pytest.mark.parametrize(
    "model, paramwise, message",
    [
        ("backbone", dict(decay_rate=1.5), "decay_rate=1.5: give a number above 0, at most 1"),
        ("backbone", {}, "decay_rate=None"),
        ("backbone", dict(decay_rate=0.9, num_layers=12), "paramwise_cfg has num_layers; layer decay takes decay_rate"),
        ("head", dict(decay_rate=0.9), "found no visionattn.Backbone"),
    ],
)
def test_bad_input(model, paramwise, message):
    module = nn.Linear(2, 2) if model == "head" else Backbone("test_ela")
    with pytest.raises(ValueError, match=message) as caught:
        wrapper(module, **paramwise)
    assert "\n" not in str(caught.value)
