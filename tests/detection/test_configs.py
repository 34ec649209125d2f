"""configs/detection: every config builds, has the published size, and one of each kind takes a training step."""

import functools
import re
from pathlib import Path

import pytest
import torch
import yaml

from tests.extras import require_extra

require_extra("mmdet", "detection")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

from visionattn.detection.complexity import detector_complexity  # noqa: E402

FOLDER = Path(__file__).parents[2] / "configs" / "detection"
FAMILIES = sorted(p.parent.name for p in FOLDER.glob("*/metafile.yml"))
# the attention of these is not all that a CPU computes: its tiles hold products that no window asks for
NEIGHBOURHOOD = {"nat", "dinat"}


@pytest.fixture(scope="module", autouse=True)
def metafiles_read_once():
    """mmengine reads a hundred metafiles of mmdet for every ``mmdet::`` in a config."""
    import mmengine.config.utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.utils, "load", functools.cache(mmengine.config.utils.load))
        yield


def test_families():
    assert FAMILIES == ["agent_pvt", "agent_swin", "dinat", "ela", "halonet", "inline", "mala", "nat", "ulsam"]


def neighbourhood_macs(config: Config, size: tuple[int, int] = (1280, 800), kernel: int = 7) -> int:
    """2 N K^2 C a block: queries with keys, weights with values (Hassani et al. 2023, section 3.3)."""
    import timm

    import visionattn.models  # noqa: F401

    with torch.device("meta"):
        net = timm.create_model(config.model.backbone.model)
    tokens = [size[0] * size[1] // 4 ** (2 + i) for i in range(4)]
    return sum(2 * n * kernel**2 * level.blocks[0].norm1.weight.numel() * len(level.blocks)
               for n, level in zip(tokens, net.levels, strict=True))  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family):
    listed = {
        m["Name"]: m["Metadata"] for m in yaml.safe_load((FOLDER / family / "metafile.yml").read_text())["Models"]
    }
    configs = {p.stem: p for p in (FOLDER / family).glob("*.py")}
    assert set(listed) == set(configs)
    readme = (FOLDER / family / "README.md").read_text()
    for name, path in sorted(configs.items()):
        config, told = Config.fromfile(path), listed[name]
        found = detector_complexity(config)
        assert found.params / 1e6 == pytest.approx(told["Parameters (M)"], abs=6e-4), name
        assert f"[{name}]({name}.py)" in readme
        if "Published FLOPs (G)" not in told:
            continue
        assert round(found.params / 1e6) == pytest.approx(told["Published Parameters (M)"], abs=0.51), name
        macs = found.macs
        if family in NEIGHBOURHOOD:
            macs = found.weight_macs + neighbourhood_macs(config)
        assert macs / 1e9 == pytest.approx(told["Published FLOPs (G)"], rel=0.02), name


STEPS = [
    "agent_swin/mask-rcnn_agent-swin-t_fpn_ms-crop-1x_coco",
    "agent_swin/cascade-mask-rcnn_agent-swin-t_fpn_ms-crop-3x_coco",
    "agent_pvt/retinanet_agent-pvt-t_fpn_1x_coco",
    "agent_pvt/mask-rcnn_agent-pvt-t_fpn_1x_coco",
    "mala/retinanet_mala-t_fpn_amp-1x_coco",
    "mala/mask-rcnn_mala-t_fpn_amp-1x_coco",
    "mala/cascade-mask-rcnn_mala-s_fpn_amp-ms-crop-3x_coco",
    "nat/mask-rcnn_nat-mini_fpn_amp-ms-crop-3x_coco",
    "dinat/cascade-mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco",
    "inline/retinanet_inline-pvt-t_fpn_1x_coco",
    "inline/mask-rcnn_inline-swin-t_fpn_ms-crop-1x_coco",
    "halonet/mask-rcnn_halo-h0_fpn_1x_coco",
    "ulsam/retinanet_ulsam-mobilenetv2_fpn_1x_coco",
    "ulsam/ssdlite_ulsam-mobilenetv2-scratch_8xb24-600e_coco",
    "ela/yolof_r50-c5-ela_8xb2-1x_coco",
    "ela/yolox_nano-ela_1xb16-72e_voc",
]


# RetinaNet takes no map at stride 4, so that map's norm learns nothing; its config finds unused parameters
UNUSED = {"mala": {f"backbone.net.model.extra_norms.0.norm.{kind}" for kind in ("weight", "bias")}}


def test_a_step_of_each_kind():
    def kind(path: str) -> tuple[str, str]:
        return path.partition("/")[0], re.match(r"(cascade-)?[a-z]+(-rcnn)?", path.partition("/")[2])[0]

    there = {kind(str(p.relative_to(FOLDER))) for f in FAMILIES for p in (FOLDER / f).glob("*.py")}
    tested = {kind(path) for path in STEPS}
    # the same detectors with the same attention: one of each pair
    assert there - tested == {("nat", "cascade-mask-rcnn"), ("dinat", "mask-rcnn")}
    assert tested <= there


@pytest.mark.parametrize("path", STEPS)
def test_training_step(path):
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.model import revert_sync_batchnorm
    from mmengine.optim import build_optim_wrapper

    torch.manual_seed(0)
    cfg = Config.fromfile(FOLDER / f"{path}.py")
    init_default_scope("mmdet")
    if "rcnn" in path:  # 512 regions through every head take minutes on a CPU
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
        cfg.model.train_cfg.rpn_proposal.max_per_img = 100
    model = revert_sync_batchnorm(MODELS.build(cfg.model))  # no init_weights: it would read checkpoints
    model.train()
    for norm in model.modules():  # HaloNet's residual branches end in weights of zero, which let no gradient through
        if isinstance(norm, torch.nn.BatchNorm2d) and not norm.weight.any():
            torch.nn.init.ones_(norm.weight)
    cfg.optim_wrapper.type = "OptimWrapper"  # AMP asks for a GPU
    cfg.optim_wrapper.pop("loss_scale", None)
    optim = build_optim_wrapper(model, cfg.optim_wrapper)
    # SSDLite needs a size at which its last map is one pixel at least; two pictures, so that batch norm has something
    side = 320 if "ssdlite" in path else 96
    data = demo_mm_inputs(
        2, [[3, side, side], [3, side, side - 7]], num_items=[2, 1], with_mask="rcnn" in path,
        num_classes=cfg.model.get("bbox_head", {}).get("num_classes", 80),
    )  # fmt: skip
    loss, log = model.parse_losses(model(**model.data_preprocessor(data, True), mode="loss"))
    optim.backward(loss)
    assert all(torch.isfinite(torch.as_tensor(v)).all() for v in log.values()), log
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    unused = {name for name, g in gradients.items() if g is None}
    assert unused <= UNUSED.get(path.partition("/")[0], set())
    found = [g for g in gradients.values() if g is not None]
    assert all(g.isfinite().all() for g in found)
    assert sum(bool(g.any()) for g in found) > 0.7 * len(found)
    optim.step()
    assert all(p.isfinite().all() for p in model.parameters())
    if path.startswith("agent_swin"):
        groups = {id(p): g for g in optim.param_groups for p in g["params"]}
        decays = {name: groups[id(p)]["weight_decay"] for name, p in model.named_parameters()}
        tables = [d for name, d in decays.items() if re.search(r"norm|_bias$|bias_table", name) and "net." in name]
        assert set(tables) == {0.0}
        assert decays["neck.lateral_convs.0.conv.weight"] == 0.05
