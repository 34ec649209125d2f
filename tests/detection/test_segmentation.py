"""The backbone under mmsegmentation: configs and their counts, UPerNet and Semantic FPN, a training run."""

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.extras import require_extra

require_extra("mmengine", "detection")
require_extra("mmseg", "segmentation")

import visionattn.detection  # noqa: E402, F401
from visionattn.detection.complexity import detector_complexity  # noqa: E402

FOLDER = Path(__file__).parents[2] / "configs" / "segmentation"
FAMILIES = ["agent_pvt", "agent_swin", "dinat", "inline", "mala", "nat"]


@pytest.fixture(scope="module", autouse=True)
def metafiles_read_once():
    """mmengine reads all of mmsegmentation's metafiles for every ``mmseg::`` in a config."""
    import mmengine.config.utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.utils, "load", functools.cache(mmengine.config.utils.load))
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family):
    assert sorted(p.parent.name for p in FOLDER.glob("*/metafile.yml")) == FAMILIES
    models = yaml.safe_load((FOLDER / family / "metafile.yml").read_text())["Models"]
    listed = {model["Name"]: model["Metadata"] for model in models}
    assert set(listed) == {p.stem for p in (FOLDER / family).glob("*.py")}
    readme = (FOLDER / family / "README.md").read_text()
    # one of each kind where nothing was published that its size could be compared with
    smallest = {p.stem for p in (FOLDER / family).glob("*.py") if re.search("-(t|mini)_", p.stem)}
    assert smallest
    for name, told in listed.items():
        assert f"[{name}]({name}.py)" in readme
        if "Published FLOPs (G)" not in told and name not in smallest:
            continue
        found = detector_complexity(FOLDER / family / f"{name}.py")
        assert found.params / 1e6 == pytest.approx(told["Parameters (M)"], abs=6e-4), name
        if "Published FLOPs (G)" in told:
            assert found.params / 1e6 == pytest.approx(told["Published Parameters (M)"], abs=0.65), name
            assert found.macs / 1e9 == pytest.approx(told["Published FLOPs (G)"], rel=0.02), name


def small(kind: str, model: str, out_indices: tuple[int, ...], classes: int = 5, **backbone):
    """A small segmentor of mmsegmentation's own config ``kind`` on a backbone."""
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    init_default_scope("mmseg")
    cfg = Config.fromfile(FOLDER / "_base_" / f"{kind}.py").model
    cfg.backbone = dict(type="visionattn.Backbone", model=model, out_indices=out_indices, **backbone)
    with torch.device("meta"):
        channels = MODELS.build(cfg.backbone).out_channels
    cfg.data_preprocessor.size = (64, 64)
    cfg.decode_head.update(channels=32, num_classes=classes)
    if kind == "fpn":
        cfg.neck.update(in_channels=channels, out_channels=32)
        cfg.decode_head.in_channels = [32] * 4
    else:
        cfg.decode_head.in_channels = channels
        cfg.auxiliary_head.update(in_channels=channels[2], channels=32, num_classes=classes)
    return revert_sync_batchnorm(MODELS.build(cfg))


@pytest.mark.parametrize(
    "kind, model, backbone",
    [
        ("upernet", "test_agent_swin", dict(out_norm=True, frozen_stages=1)),
        ("fpn", "test_mala", dict(out_norm=True, with_cp=True)),
        ("upernet", "resnet10t", dict(out_indices=(1, 2, 3, 4), norm_eval=True)),
        ("fpn", "test_vit", {}),
    ],
)
def test_heads(kind, model, backbone):
    """Loss and gradients; predictions for an image whose sides no stride divides, whole and by sliding windows."""
    from mmengine.config import ConfigDict
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    segmentor = small(kind, model, backbone.pop("out_indices", (0, 1, 2, 3)), **backbone)
    segmentor.init_weights()
    segmentor.train()

    def sample(height, width, **maps):
        return SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)), **maps)

    truth = [PixelData(data=torch.randint(0, 5, (1, 64, 59))) for _ in range(2)]
    data = dict(
        inputs=[torch.randint(0, 256, (3, 64, 59), dtype=torch.uint8) for _ in truth],
        data_samples=[sample(64, 59, gt_sem_seg=t) for t in truth],
    )
    loss, log = segmentor.parse_losses(segmentor(**segmentor.data_preprocessor(data, True), mode="loss"))
    loss.backward()
    assert float(log["decode.loss_ce"]) == pytest.approx(math.log(5), rel=0.15)
    gradients = {n: p.grad for n, p in segmentor.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    frozen = {n for n, p in segmentor.named_parameters() if not p.requires_grad}
    assert bool(frozen) == ("frozen_stages" in backbone) and all(n.startswith("backbone.net.") for n in frozen)

    segmentor.eval()
    picture = torch.randint(0, 256, (3, 61, 93), dtype=torch.uint8)
    for cfg in (dict(mode="whole"), dict(mode="slide", crop_size=(64, 64), stride=(40, 40))):
        segmentor.test_cfg = ConfigDict(cfg)
        found = segmentor.test_step(dict(inputs=[picture], data_samples=[sample(61, 93)]))[0]
        assert found.pred_sem_seg.data.shape == (1, 61, 93) and found.seg_logits.data.shape == (5, 61, 93)
        assert found.seg_logits.data.isfinite().all()


def write_set(folder: Path, number: int, seed: int) -> None:
    """Discs and squares of two kinds of texture on a third: classes that colour alone does not tell apart."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(number):
        label = np.zeros((64, 64), np.uint8)
        for kind in (1, 2):
            row, column, radius = *rng.integers(14, 50, 2), int(rng.integers(9, 16))
            inside = (abs(y - row) < radius) & (abs(x - column) < radius)
            label[inside] = kind
        stripes = np.stack([rng.integers(0, 256, (64, 64)), 255 * (x // 4 % 2), 255 * (y // 4 % 2)])
        grey = np.take_along_axis(stripes, label[None].astype(int), 0)[0].astype(np.uint8)
        Image.fromarray(np.stack([grey] * 3, -1)).save(folder / "images" / f"{i}.png")
        Image.fromarray(label).save(folder / "masks" / f"{i}.png")


def test_runner(tmp_path):
    """A config of this repository, its data and sizes exchanged, learns textures; its checkpoint loads."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    write_set(tmp_path / "train", 32, 0)
    write_set(tmp_path / "val", 8, 1)
    cfg = Config.fromfile(FOLDER / "mala" / "mala-t_fpn_8xb2-80k_ade20k-512x512.py")
    cfg.model.backbone.update(model="test_mala", drop_path_rate=0.0, init_cfg=None)
    cfg.model.neck.update(in_channels=[16, 32, 48, 64], out_channels=32)
    cfg.model.decode_head.update(in_channels=[32] * 4, channels=32, num_classes=3, dropout_ratio=0.0)
    cfg.model.decode_head.norm_cfg.type = "BN"
    cfg.model.data_preprocessor.size = (64, 64)
    load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    for loader, split in ((cfg.train_dataloader, "train"), (cfg.val_dataloader, "val")):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset = dict(
            type="BaseSegDataset", metainfo=dict(classes=("noise", "columns", "rows")), data_root=str(tmp_path / split),
            data_prefix=dict(img_path="images", seg_map_path="masks"), img_suffix=".png", reduce_zero_label=False,
            pipeline=[*load, dict(type="PackSegInputs")],
        )  # fmt: skip
    cfg.train_dataloader.batch_size = 8
    cfg.test_dataloader = cfg.val_dataloader
    cfg.merge_from_dict(
        dict(
            train_cfg=dict(max_iters=80, val_interval=40),
            default_hooks=dict(checkpoint=dict(interval=40), logger=dict(interval=10), visualization=dict(draw=False)),
            optim_wrapper=dict(optimizer=dict(lr=2e-3)),
            param_scheduler=[dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=80, by_epoch=False)],
            work_dir=str(tmp_path / "run"), randomness=dict(seed=0), log_level="WARNING",
        )
    )  # fmt: skip
    Runner.from_cfg(cfg).train()
    assert (tmp_path / "run" / "iter_40.pth").is_file()
    cfg.load_from = str(tmp_path / "run" / "iter_80.pth")
    assert Runner.from_cfg(cfg).test()["mIoU"] > 60  # one class everywhere: less than 30
