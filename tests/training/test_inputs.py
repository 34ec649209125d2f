"""Bad input: one line that says what was given, what is allowed, what to do; and nothing is left behind."""

import pickle
import tarfile

import pytest
import torch
import yaml
from PIL import Image

from tests.training.conftest import TINY, make_pictures, only_run, state_of
from visionattn.training import checkpoint, config
from visionattn.training.checkpoint import read_state
from visionattn.training.config import UserError

SYNTHETIC = f"{TINY} --dataset synthetic --synthetic-images 16 --num-classes 4 --epochs 1"


class Evil:
    """Its pickle runs a function of the reader's Python on loading."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def refused(result, tmp_path, *words, status=2):
    """The call ended with one line on standard error that holds the words, and made no run folder."""
    code, _, err = result
    assert code == status, err
    assert err.count("\n") == 1 and err.startswith("train.py: error: ") and len(err) < 700, err
    for word in words:
        assert word in err, (word, err)
    assert not (tmp_path / "runs").exists(), "a run folder was made"


WRONG = {
    "model name": (f"{SYNTHETIC} --model test_resnot", "test_resnot", "Did you mean 'test_resnet'?"),
    "model tag": (f"{SYNTHETIC} --model test_resnet.nonsense --pretrained", "nonsense"),
    "model argument": (f"{SYNTHETIC} --model-kwargs wings=2", "wings"),
    "option": (f"{SYNTHETIC} --learning-rte 3", "--learning-rte"),
    "option, nearest": (f"{SYNTHETIC} --smoothin 0.1", "Did you mean '--smoothing'?"),
    "type": (f"{SYNTHETIC} --epochs many", "epochs='many'", "int"),
    "fraction of an epoch": (f"{SYNTHETIC} --epochs 1.5", "epochs='1.5'"),
    "range": (f"{SYNTHETIC} --smoothing 1.5", "smoothing=1.5", "[0, 0.99]"),
    "range, of two words": (f"{SYNTHETIC} --batch-size 0", "--batch-size=0 is out of range"),
    "choice": (f"{SYNTHETIC} --loss bec", "bec", "Did you mean 'bce'?"),
    "optimizer": (f"{SYNTHETIC} --opt adamm", "adamm", "Did you mean 'adam"),
    "optimizer argument": (f"{SYNTHETIC} --opt sgd --opt-kwargs wings=2", "sgd", "wings"),
    "schedule argument": (f"{SYNTHETIC} --sched-kwargs wings=2", "cosine", "wings"),
    "augmentation": (f"{TINY} --data-dir PICTURES --auto-augment rend-m9", "rend-m9"),
    "odd batch for mixup": (f"{SYNTHETIC} --mixup 0.8 --batch-size 7", "batch_size=7", "even"),
    "warm-up": (f"{SYNTHETIC} --warmup-epochs 5", "warmup_epochs=5", "epochs=1"),
    "size": ("--model test_vit --img-size 100 --dataset synthetic --num-classes 4 --epochs 1", "test_vit", "100"),
    "channels": (f"{TINY} --data-dir PICTURES --in-chans 5", "in_chans=5", "1", "3"),
    "device": (f"{SYNTHETIC} --device tpux", "tpux"),
    "GPU": (f"{SYNTHETIC} --device cuda", "cuda", "give auto or cpu"),
    "data set": (f"{TINY} --dataset imagenot", "imagenot"),
    "data folder": (f"{TINY} --data-dir /no/such/folder", "/no/such/folder", "--data-dir"),
    "classes": (f"{TINY} --data-dir PICTURES --num-classes 7", "num_classes=7", "3 classes"),
    "batch": (f"{TINY} --data-dir PICTURES --batch-size 512", "batch_size=512", "48"),
    "statistics": (f"{SYNTHETIC} --mean 0.5 0.5", "mean", "3"),
    "config file": ("--config no_such_recipe", "no_such_recipe", "digits"),
    "resume": ("--resume /no/such/run", "/no/such/run"),
    "checkpoint": (f"{SYNTHETIC} --checkpoint /no/such/file.safetensors", "/no/such/file.safetensors"),
    "teacher": (f"{SYNTHETIC} --teacher test_resnot", "test_resnot", "Did you mean 'test_resnet'?"),
    "fsdp without torchrun": (f"{SYNTHETIC} --fsdp", "torchrun"),
    "weights that do not exist": (f"{TINY} --validate test_ela --data-dir PICTURES", "test_ela", "--checkpoint"),
    "wandb": (f"{SYNTHETIC} --wandb", "pip install wandb"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_option_is_one_line(case, train, pictures, tmp_path):
    if case == "GPU" and torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU here")
    if case == "wandb":
        try:
            import wandb  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("wandb is here")
    args, *words = WRONG[case]
    refused(train(args.replace("PICTURES", str(pictures))), tmp_path, *words)


def test_an_output_that_cannot_be_made():
    with pytest.raises(config.UserError, match=r"^output=/proc/none can't hold run folders \(.*\); give another\.$"):
        checkpoint.make_run_folder("/proc/none", "test_ela", "now")


def test_unknown_key_of_a_file_names_the_nearest(train, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: test_resnet\nweight_deccay: 0.1\n")
    refused(train(f"--config {path}"), tmp_path, str(path), "weight_deccay", "Did you mean 'weight_decay'?")
    path.write_text("model: [unclosed\n")
    refused(train(f"--config {path}"), tmp_path, str(path), "YAML")
    path.write_text("- a\n- b\n")
    refused(train(f"--config {path}"), tmp_path, "list")


def test_command_line_over_file_over_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: synthetic\nlr: 3e-4\nepochs: 7\nmodel_kwargs: {groups: 2}\n")
    cfg, explicit = config.parse(["--config", str(path), "--epochs", "9", "--opt-kwargs", "eps=1e-6", "--no-ema"])
    assert (cfg.lr, cfg.epochs, cfg.batch_size) == (3e-4, 9, 128)
    assert cfg.model_kwargs == {"groups": 2} and cfg.opt_kwargs == {"eps": 1e-6} and cfg.ema is False
    assert set(explicit) == {"dataset", "lr", "epochs", "model_kwargs", "opt_kwargs", "ema"}


def test_written_config_repeats_the_run(train, tmp_path):
    assert train(f"{SYNTHETIC} --mixup 0.5 --opt-kwargs eps=1e-7 --scale 0.3 1")[0] == 0
    run = only_run(tmp_path / "runs")
    status, _, err = train(f"--config {run / 'config.yaml'}", output=tmp_path / "again")
    assert status == 0, err
    a, b = (yaml.safe_load((r / "config.yaml").read_text()) for r in (run, only_run(tmp_path / "again")))
    assert a | {"output": ""} == b | {"output": ""} and a["mixup"] == 0.5
    weights = [state_of(r)["model"] for r in (run, only_run(tmp_path / "again"))]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_missing_split_and_empty_class(train, tmp_path):
    root = make_pictures(tmp_path / "data", train=4, val=2)
    (root / "val").rename(root / "holdout")
    refused(train(f"{TINY} --data-dir {root}"), tmp_path, "validation", "val", "--val-split")
    assert train(f"{TINY} --data-dir {root} --val-split holdout --epochs 1", output=tmp_path / "named")[0] == 0
    (root / "train" / "empty").mkdir()
    (root / "train" / "empty" / "notes.txt").write_text("no image")
    refused(train(f"{TINY} --data-dir {root} --val-split holdout"), tmp_path, "empty", "train")


def test_splits_with_different_classes(train, tmp_path):
    root = make_pictures(tmp_path / "data", train=4, val=2)
    (root / "val" / "c").rename(root / "val" / "z")
    refused(train(f"{TINY} --data-dir {root}"), tmp_path, "'c', 'z'")


def test_tar_that_is_none(train, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.tar", "val.tar"):
        (tmp_path / "data" / name).write_bytes(b"not a tar archive at all")
    refused(train(f"{TINY} --data-dir {tmp_path / 'data'}"), tmp_path, ".tar")


def test_corrupt_images(train, tmp_path):
    """Up to one per cent: counted, named, replaced. More: the run ends, and says so."""
    root = make_pictures(tmp_path / "data", train=40, val=2)  # 120: one is 0.8 %
    victims = sorted((root / "train").rglob("*.png"))
    victims[5].write_bytes(victims[5].read_bytes()[:100])
    args = f"{TINY} --data-dir {root} --epochs 2"
    for workers in (0, 2):
        status, out, err = train(f"{args} --workers {workers}", output=tmp_path / str(workers))
        assert status == 0, err
        warnings = [line for line in out.splitlines() if line.startswith("warning:")]
        assert len(warnings) == 1 and "1 of 120 images" in warnings[0] and victims[5].name in warnings[0], out
    victims[77].write_bytes(b"")
    for workers in (0, 2):
        status, out, err = train(f"{args} --workers {workers}", output=tmp_path / f"bad{workers}")
        assert status != 0 and "2 of 120 images" in err and err.count("\n") == 1, err


def test_corrupt_evaluation_image_is_reported(train, tmp_path):
    root = make_pictures(tmp_path / "data", train=4, val=40)
    victim = min((root / "val").rglob("*.png"))
    victim.write_bytes(b"GIF89a")
    status, out, _ = train(f"{TINY} --data-dir {root} --epochs 1")
    assert status == 0 and "1 of 120 images" in out and victim.name in out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder, made once."""
    from visionattn.training.cli import main

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    assert main([*SYNTHETIC.split(), "--output", str(folder)]) == 0
    return only_run(folder)


def test_truncated_files(train, finished, tmp_path):
    weights, state = finished / "last.safetensors", finished / "last.state.pt"
    cut = tmp_path / "cut.safetensors"
    for share in (0.0, 0.01, 0.5, 0.99):
        cut.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
        refused(train(f"{SYNTHETIC} --checkpoint {cut}"), tmp_path, str(cut), "cut short")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    for share in (0.0, 0.5, 0.99):
        (folder / "last.state.pt").write_bytes(state.read_bytes()[: int(state.stat().st_size * share)])
        refused(train(f"--resume {folder}"), tmp_path, str(folder), "cut short")
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "last.state.pt"}  # nothing added


def test_pickle_with_more_than_tensors(train, finished, tmp_path):
    mark = tmp_path / "was_run"
    pickle.loads(pickle.dumps(Evil(mark))).close()
    assert mark.exists()  # the trap works
    mark.unlink()
    evil = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "x": Evil(mark)}, evil)
    refused(train(f"{SYNTHETIC} --checkpoint {evil}"), tmp_path, str(evil), "more than tensors", "safetensors")
    refused(train(f"{SYNTHETIC} --teacher test_resnet --teacher-checkpoint {evil}"), tmp_path, "more than tensors")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    torch.save({"optimizer": {}, "x": Evil(mark)}, folder / "last.state.pt")
    refused(train(f"--resume {folder}"), tmp_path, "more than tensors")
    assert not mark.exists(), "loading ran the pickle's code"


def test_files_of_another_kind(train, finished, tmp_path):
    refused(train(f"{SYNTHETIC} --checkpoint {finished / 'last.state.pt'}"), tmp_path, "resume state", ".safetensors")
    refused(train(f"{SYNTHETIC} --checkpoint {finished}"), tmp_path, "folder", "best.safetensors")
    refused(train(f"--model test_vit --img-size 160 --dataset synthetic --num-classes 4 --epochs 1 "
                  f"--checkpoint {finished / 'last.safetensors'}"), tmp_path, "test_vit")  # fmt: skip
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no state of a run"):
        read_state(tmp_path / "other.pt")
    status, _, err = train(f"--resume {finished} --model test_convnext --epochs 2")
    assert status == 2 and "does not fit" in err and err.count("\n") == 1


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(train, pictures, tmp_path):
    args = f"{TINY} --data-dir {pictures} --epochs 40 --opt sgd --save-interval 2 --log-interval 3"
    assert train(f"{args} --stop-step 2")[0] == 0
    run = only_run(tmp_path / "runs")
    status, _, err = train(f"--resume {run} --lr 1e30")
    assert status == 1 and err.count("\n") == 1, err
    assert "at update" in err and "keeps the checkpoint of update" in err, err
    kept = int(err.split("checkpoint of update ")[1].split(".")[0])
    assert state_of(run)["position"]["step"] == kept >= 2
    for name in ("model", "optimizer"):
        flat = [t for t in tensors(state_of(run)[name]) if t.is_floating_point()]
        assert flat and all(bool(t.isfinite().all()) for t in flat)
    assert train(f"--resume {run} --lr 1e-4 --stop-step {kept + 3}")[0] == 0  # and it goes on from there


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [t for v in values for t in tensors(v)]


def test_output_that_is_a_file(train, tmp_path):
    (tmp_path / "runs").write_text("a file")
    status, _, err = train(SYNTHETIC)
    assert status == 2 and "output=" in err and err.count("\n") == 1


def test_tar_archives_are_read_as_folders_are(train, pictures, tmp_path):
    """The same pictures in train.tar and val.tar give the same run, bit for bit."""
    data = tmp_path / "tars"
    data.mkdir()
    for split in ("train", "val"):
        with tarfile.open(data / f"{split}.tar", "w") as t:
            for folder in sorted((pictures / split).iterdir()):
                t.add(folder, arcname=folder.name)
    states = []
    for root, out in ((pictures, "a"), (data, "b")):
        status, _, err = train(f"{TINY} --data-dir {root} --epochs 1", output=tmp_path / out)
        assert status == 0, err
        states.append(state_of(only_run(tmp_path / out)))
    assert all(torch.equal(states[0]["model"][k], states[1]["model"][k]) for k in states[0]["model"])


def test_grey_images_for_a_grey_model(train, tmp_path):
    root = make_pictures(tmp_path / "data", train=4, val=2)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    status, out, err = train(f"{TINY} --data-dir {root} --in-chans 1 --epochs 1")
    assert status == 0 and "input 1x32x32" in out, err
    weights = only_run(tmp_path / "runs") / "best.safetensors"
    status, out, err = train(f"--validate test_resnet --checkpoint {weights} --data-dir {root} --workers 0")
    assert status == 0 and "top1" in out, err
