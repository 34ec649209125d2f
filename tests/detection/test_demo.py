"""The detection demo: what the set holds, a short run, resuming, two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.extras import require_extra

require_extra("mmdet", "detection")
require_extra("skimage", "detection")

from visionattn.detection import demo, demo_data  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_set_is_what_its_annotations_say(tmp_path):
    from pycocotools.coco import COCO

    folder = demo_data.make_demo_set(tmp_path / "set", train=12, val=3)
    for split, number in (("train", 12), ("val", 3)):
        coco = COCO(folder / "annotations" / f"{split}.json")
        assert len(coco.imgs) == number and [c["name"] for c in coco.cats.values()] == list(demo_data.CATEGORIES)
        for index, image in coco.imgs.items():
            picture = np.asarray(Image.open(folder / split / image["file_name"]))
            again, objects = demo_data.compose(split, index)
            assert np.array_equal(picture, again) and picture.shape[:2] == (image["height"], image["width"])
            annotations = coco.loadAnns(coco.getAnnIds(index))
            assert len(annotations) == len(objects) >= 1
            covered = np.zeros(picture.shape[:2], int)
            for annotation, (label, mask) in zip(annotations, objects, strict=True):
                assert np.array_equal(coco.annToMask(annotation), mask) and annotation["area"] == mask.sum()
                left, top, width, height = annotation["bbox"]
                inside = mask[top : top + height, left : left + width]
                assert inside.sum() == mask.sum() and inside[[0, -1]].any(1).all() and inside[:, [0, -1]].any(0).all()
                assert annotation["category_id"] == label + 1
                covered += mask
            assert covered.max() == 1  # a pixel shows one object


def test_set_again(tmp_path):
    folder = demo_data.make_demo_set(tmp_path / "set", train=1, val=1)
    stamp = (folder / "val" / "000000.png").stat().st_mtime_ns
    assert demo_data.make_demo_set(folder, train=1, val=1) == folder
    assert (folder / "val" / "000000.png").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="does not hold this set"):
        demo_data.make_demo_set(folder, train=2, val=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]
    # splits have no photograph in common, nor a digit
    train, val = (demo_data.photographs(split) for split in ("train", "val"))
    assert not any(a.shape == b.shape and np.array_equal(a, b) for a in train for b in val)
    digits = [{d.tobytes() for d in demo_data._digits(split)[0]} for split in ("train", "val")]
    assert not digits[0] & digits[1]


def launch(*flags: str, torchrun: int = 0) -> subprocess.CompletedProcess:
    """The command, as a user gives it."""
    start = [sys.executable]
    if torchrun:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={torchrun}", f"--master-port={port}"]
    command = [*start, "-m", "visionattn.detection.demo", "--quick", "--device", "cpu", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def test_short_run_and_resume(tmp_path):
    """Mask R-CNN: one epoch, then a second one from its checkpoint; a third call without --resume is refused."""
    flags = ("--detector", "mask-rcnn", "--model", "test_agent_swin", "--lr", "1e-3", "--work-dir", str(tmp_path))
    first = launch(*flags)
    assert first.returncode == 0, first.stderr[-2000:]
    run = tmp_path / "mask-rcnn_test_agent_swin"
    result = json.loads((run / "result.json").read_text())
    assert result == json.loads(first.stdout.splitlines()[-1]) and (result["epochs"], result["lr"]) == (1, 1e-3)
    assert {"bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50"} <= set(result)
    assert np.asarray(Image.open(run / "pictures.png")).std() > 20

    refused = launch(*flags)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: ")

    second = launch(*flags, "--epochs", "2", "--resume")
    assert second.returncode == 0, second.stderr[-2000:]
    assert json.loads((run / "result.json").read_text())["epochs"] == 2
    assert (run / "last_checkpoint").read_text().endswith("epoch_2.pth")
    assert "Epoch(train) [1]" not in second.stdout.replace("  ", " ") and "Epoch(train) [2]" in second.stdout


def test_two_processes(tmp_path):
    """RetinaNet by torchrun over gloo: both ranks train on their half, one of them writes."""
    done = launch("--work-dir", str(tmp_path), torchrun=2)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "retinanet_test_mala" / "result.json").read_text())
    assert result["epochs"] == 1 and "bbox_mAP_50" in result
    assert done.stdout.count('{"detector"') == 1
    log = next((tmp_path / "retinanet_test_mala").glob("*/*.log")).read_text()
    assert "[1][2/2]" in log.replace(" ", "")  # 16 pictures, 4 a step, 2 processes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(detector="yolo"), "unknown detector 'yolo': one of retinanet, mask-rcnn"),
        (dict(model="agent_swim_tiny"), "agent_swim_tiny"),
        (dict(epochs=0), "at least one"),
        (dict(lr=0.0), "between 0 and 1"),
        (dict(pictures=0), "pictures=0: give at least one"),
        (dict(seconds=-5.0), "seconds=-5.0: give more than 0"),
        (dict(workers=-1), "workers=-1: give 0"),
    ],
)
def test_bad_input(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        demo.run_demo(**{"quick": True, "work_dir": tmp_path, **settings})
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_flags_reach_the_config_and_time_decides_the_epochs(tmp_path, monkeypatch, capsys):
    folder = demo_data.make_demo_set(tmp_path / "set", train=4, val=1)
    cfg = demo.demo_config("retinanet", "test_mala", folder, tmp_path, batch_size=2, workers=0, scale=1.5, lr=1e-3)
    factors = [[s.scale_factor for s in loader.dataset.pipeline if s.type == "Resize"]
               for loader in (cfg.train_dataloader, cfg.val_dataloader)]  # fmt: skip
    assert factors == [[1.5], [1.5]] and cfg.model.bbox_head.anchor_generator.octave_base_scale == 4.5
    assert cfg.train_dataloader.batch_size == 2 and cfg.optim_wrapper.optimizer.lr == 1e-3

    monkeypatch.setattr(demo, "TRIAL", (1, 3))
    demo._fit(cfg, demo.EVALUATION + 200)
    told = float(capsys.readouterr().out.partition(" s a step, 2 steps an epoch")[0].splitlines()[-1])
    epochs = cfg.train_cfg.max_epochs
    assert epochs > 1 and epochs == cfg.param_scheduler[1].T_max == cfg.param_scheduler[1].end
    assert epochs * 2 * told < 200
    assert cfg.train_cfg.val_interval == (epochs + 1) // 2
    demo._fit(cfg, 1)
    assert cfg.train_cfg.max_epochs == 1
