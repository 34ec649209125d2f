"""Everything a user can get wrong: one line, status 2, the nearest right thing, and nothing half-written."""

import os
import pickle
import shutil

import pytest
import torch
import yaml

from .conftest import TINY, make_pictures, only_run

SYNTHETIC = f"{TINY} --dataset synthetic --synthetic-images 16 --num-classes 4 --epochs 1"


def refused(train, arguments: str, *more, output=None) -> str:
    """The one line that train.py ends with, having written no run."""
    status, _, err = train(arguments, *more, output=output)
    assert status == 2, err
    assert err.count("\n") == 1 and err.startswith("train.py: error: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--epochz 3", ["unknown argument '--epochz'", "'--epochs'"]),
        ("--opt adamv", ["opt='adamv' is unknown", "adam"]),
        ("--sched cosin", ["sched='cosin'", "Did you mean 'cosine'?"]),
        ("--epochs two", ["epochs='two' is not of type int"]),
        ("--epochs 0", ["epochs=0 is out of range: it must be at least 1"]),
        ("--lr nan", ["lr='nan'"]),
        ("--drop-path 1.5", ["drop_path=1.5 is out of range", "[0, 0.99]"]),
        ("--model test_rezzzt", ["test_rezzzt"]),
        ("--model halo_h9", ["halo_h9", "halo_h"]),
        ("--model-kwargs colour=3", ["colour"]),
        ("--in-chans 4 --dataset digits", ["in_chans=4"]),
        ("--dataset cifar", ["dataset='cifar' is unknown"]),
        ("--device tpu:0", ["device"]),
        ("--device cuda", ["no CUDA GPU"]) if not torch.cuda.is_available() else ("--device cuda:99x", ["device"]),
        ("--batch-size 7 --mixup 0.2", ["batch_size=7 must be even"]),
        ("--fsdp", ["torchrun"]),
        ("--sync-bn", ["sync_bn"]),
        ("--wandb", ["pip install wandb"]),
        ("--scale 0.9 0.2", ["scale"]),
        ("--auto-augment rand-x9", ["auto_augment='rand-x9'"]),
        ("--teacher nobody", ["nobody"]),
        ("--config nothing.yaml", ["nothing.yaml"]),
        ("--resume nowhere", ["nowhere"]),
    ],
)  # fmt: skip
def test_options(arguments, words, train, tmp_path):
    if "wandb" in arguments and __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    data = "" if "--dataset" in arguments or "auto-augment" in arguments else "--dataset synthetic --num-classes 4"
    data = "--dataset digits" if "auto-augment" in arguments else data
    err = refused(train, f"{TINY} {data} {arguments}")
    for word in words:
        assert word in err, err
    assert not (tmp_path / "runs").exists()


def test_yaml_keys_and_values(train, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: test_ela\nlerning_rate: 3\nlabel_smothing: 0.1\n")
    assert "unknown option 'lerning_rate'" in refused(train, "", "--config", path)
    path.write_text("model: test_ela\nsmothing: 0.1\n")
    assert "Did you mean 'smoothing'?" in refused(train, "", "--config", path)
    path.write_text("model: [test_ela\n")
    assert "recipe.yaml" in refused(train, "", "--config", path)
    path.write_text("- a\n- b\n")
    assert "recipe.yaml" in refused(train, "", "--config", path)


def test_data_folders(train, pictures, tmp_path):
    assert "no such folder" in refused(train, f"{TINY} --data-dir {tmp_path}/nothing")
    (tmp_path / "empty").mkdir()
    err = refused(train, f"{TINY} --data-dir {tmp_path}/empty")
    assert "no folder (nor .tar) of the split 'validation'" in err and "validation, val, valid" in err
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    (root / "train" / "nobody").mkdir()
    err = refused(train, f"{TINY} --data-dir {root}")
    assert "class folder" in err and "nobody" in err and "is empty" in err
    (root / "train" / "nobody").rmdir()
    shutil.rmtree(root / "val" / "b")
    err = refused(train, f"{TINY} --data-dir {root}")
    assert "different classes" in err and "'b'" in err
    assert "batch_size=4096" in refused(train, f"{TINY} --data-dir {pictures} --batch-size 4096")
    assert "num_classes=5, but the data set has 3" in refused(train, f"{TINY} --data-dir {pictures} --num-classes 5")


def test_corrupt_images_are_counted_and_more_than_one_in_a_hundred_ends_the_run(train, tmp_path):
    root = make_pictures(tmp_path / "many", train=100, val=4)
    broken = root / "train" / "a" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    status, out, err = train(f"{TINY} --batch-size 50 --epochs 2 --data-dir {root}")
    assert status == 0, err
    assert out.count("1 of 300 images can't be read") == 1 and "000.png" in out
    for i in range(1, 5):
        (root / "train" / "a" / f"{i:03d}.png").write_bytes(b"not a picture")
    status, out, err = train(f"{TINY} --batch-size 50 --epochs 2 --data-dir {root}")
    assert status != 0 and "images can't be read (at most 1%" in err and err.count("\n") == 1


def test_checkpoints(train, pictures, tmp_path):
    args = f"{TINY} --data-dir {pictures} --epochs 1"
    assert train(args)[0] == 0
    run = only_run(tmp_path / "runs")
    weights = run / "best.safetensors"
    for name in ("best.safetensors", "last.state.pt"):
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes((run / name).read_bytes()[: (run / name).stat().st_size // 2])
    fresh = tmp_path / "fresh"
    assert "cut short" in refused(train, f"{args} --checkpoint {tmp_path}/cut-best.safetensors", output=fresh)
    shutil.copytree(run, tmp_path / "torn")
    os.replace(tmp_path / "cut-last.state.pt", tmp_path / "torn" / "last.state.pt")
    assert "cut short" in refused(train, f"--resume {tmp_path}/torn", output=fresh)
    evil = tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"state_dict": Evil()}, evil)
    err = refused(train, f"{args} --checkpoint {evil}", output=fresh)
    assert "holds more than tensors" in err and "system" in err and not (tmp_path / "executed").exists()
    shutil.copytree(run, tmp_path / "evil")
    shutil.copy(evil, tmp_path / "evil" / "last.state.pt")
    assert "more than tensors" in refused(train, f"--resume {tmp_path}/evil", output=fresh)
    other = args.replace("test_resnet", "test_vit")
    err = refused(train, f"{other} --checkpoint {weights}", output=fresh)
    assert "best.safetensors" in err or "test_vit" in err
    assert "resume state" in refused(train, f"{args} --checkpoint {run}/last.state.pt", output=fresh)
    assert "does not exist" in refused(train, f"{args} --checkpoint {tmp_path}/gone.safetensors", output=fresh)
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(3))
    assert "old.pkl" in refused(train, f"{args} --checkpoint {tmp_path}/old.pkl", output=fresh)
    assert not fresh.exists() or not any(fresh.iterdir())


def test_resume_with_another_model_is_refused(train, tmp_path):
    assert train(f"{SYNTHETIC} --stop-step 1")[0] == 0
    run = only_run(tmp_path / "runs")
    before = (run / "last.state.pt").read_bytes()
    assert "does not fit this model" in refused(train, f"--resume {run} --model test_vit", output=tmp_path / "other")
    assert (run / "last.state.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(train, tmp_path):
    args = f"{SYNTHETIC} --synthetic-images 64 --epochs 4 --save-interval 1 --opt sgd"
    assert train(f"{args} --stop-step 3 --lr 0.01")[0] == 0
    run = only_run(tmp_path / "runs")
    good = torch.load(run / "last.state.pt", weights_only=True)
    status, _, err = train(f"--resume {run} --lr 1e30")
    assert status == 1 and "stopped;" in err and "keeps the checkpoint of update" in err and err.count("\n") == 1
    kept = torch.load(run / "last.state.pt", weights_only=True)
    assert all(t.isfinite().all() for t in kept["model"].values() if t.is_floating_point())
    assert kept["position"]["step"] >= good["position"]["step"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == "test_resnet"


def test_an_output_that_is_a_file(train, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "output=" in refused(train, SYNTHETIC, output=tmp_path / "taken")
