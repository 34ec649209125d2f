"""What the options of train.py do, each seen in the numbers it changes."""

import csv
import io
import json
import tarfile

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from tests.training.conftest import ROOT, TINY, differences, only_run, state_of
from visionattn._world import World
from visionattn.training import build, config, data
from visionattn.training.engine import Trainer

SYNTHETIC = f"{TINY} --dataset synthetic --synthetic-images 16 --num-classes 4 --epochs 1"
# no BatchNorm and no dropout: a sum over images is a sum over images
PLAIN = "--model test_vit --model-kwargs img_size=32 --img-size 32 --batch-size 8 --workers 0 --seed 1 --epochs 1"


def trainer(arguments: str) -> Trainer:
    torch.set_num_threads(1)
    cfg, _ = config.parse(arguments.split())
    return Trainer(cfg, World(torch.device("cpu")))


def weights_after(run) -> dict:
    return state_of(only_run(run))["model"]


def close(a: dict, b: dict, tolerance: float) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=tolerance, atol=tolerance) for k in a)


def rows(run) -> list[dict]:
    with open(only_run(run) / "summary.csv") as f:
        return list(csv.DictReader(f))


@pytest.mark.timeout(400)
def test_default_run(train, tmp_path):
    """No arguments: the digits, at least 97 % of the held-out ones, and every output that the manual lists."""
    status, out, err = train("--threads 1")
    assert status == 0, err
    run = only_run(tmp_path / "runs")
    assert run.name.endswith("-test_ela")
    names = {"config.yaml", "summary.csv", "curves.png"}
    names |= {f"{tag}.{kind}" for tag in ("last", "best") for kind in ("safetensors", "state.pt")}
    assert names <= {p.name for p in run.iterdir()}
    summary = rows(tmp_path / "runs")
    best = max(float(r["eval_top1"]) for r in summary)
    assert best >= 97, best
    assert "images/s" in out and (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # the best weights, evaluated alone, give the figure of the summary
    status, out, err = train(f"--validate test_ela --checkpoint {run / 'best.safetensors'} --dataset digits")
    assert status == 0 and f"top1 {best:.3f}" in out, (out, err)


def test_digits_split_is_fixed_and_stratified():
    train_set, held_out = data.Digits(True), data.Digits(False)
    assert (len(train_set), len(held_out)) == (1433, 364)
    seen = {image.tobytes() for image in train_set.images}
    assert sum(image.tobytes() in seen for image in held_out.images) == 0
    for c in range(10):
        share = held_out.labels.count(c) / (held_out.labels.count(c) + train_set.labels.count(c))
        assert abs(share - 0.2) < 0.01


def test_accumulated_gradient_is_that_of_the_large_batch(train, pictures, tmp_path):
    base = f"{PLAIN} --data-dir {pictures} --opt momentum --lr 0.1 --momentum 0"
    train(f"{base} --batch-size 4 --grad-accum 2", output=tmp_path / "parts")
    train(f"{base} --batch-size 8", output=tmp_path / "whole")
    train(f"{base} --batch-size 4", output=tmp_path / "other")
    parts, whole, other = (weights_after(tmp_path / n) for n in ("parts", "whole", "other"))
    assert close(parts, whole, 1e-6) and not close(other, whole, 1e-4)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_limits_the_update(mode):
    t = trainer(f"{PLAIN} --dataset synthetic --num-classes 4 --synthetic-images 8 --opt momentum --lr 1 --momentum 0 "
                f"--sched constant --clip-grad 1e-3 --clip-mode {mode}")  # fmt: skip
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    t.train_epoch()
    change = {k: v - before[k] for k, v in t.model.state_dict().items() if v.is_floating_point()}
    total = torch.stack([c.norm() for c in change.values()]).norm()
    largest = max(c.abs().max() for c in change.values())
    if mode == "norm":
        assert total == pytest.approx(1e-3, rel=1e-3)
    elif mode == "value":
        assert largest == pytest.approx(1e-3, rel=1e-3) and total > 2e-3
    else:
        assert 0 < change["blocks.0.attn.qkv.weight"].norm() < 2e-3 * before["blocks.0.attn.qkv.weight"].norm()


def test_ema_is_the_average_it_says():
    t = trainer(f"{SYNTHETIC} --synthetic-images 24 --ema --ema-decay 0.9 --opt sgd --lr 0.1")
    expected = {k: v.clone() for k, v in t.model.state_dict().items()}
    update = t.task.update_ema

    def watched(step):
        update(step=step)
        decay = 0.9 if step > 1 else 0.0  # timm starts the average at the first update's weights
        for k, v in t.model.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v if v.is_floating_point() else v.clone()

    t.task.update_ema = watched
    t.train_epoch()
    ema = t._modules()[1].state_dict()
    assert t.step == 3 and close(ema, expected, 1e-6) and not close(ema, t.model.state_dict(), 1e-4)


def test_layer_decay_scales_the_learning_rate_by_depth():
    t = trainer(f"{PLAIN} --dataset synthetic --num-classes 4 --layer-decay 0.5 --sched constant --lr 0.1")
    rate = {id(p): g["lr"] for g in t.optimizer.param_groups for p in g["params"]}
    named = {n: rate[id(p)] for n, p in t.model.named_parameters()}
    depth = len(t.model.blocks)
    assert named["head.weight"] == pytest.approx(0.1)
    ratio = named["blocks.1.attn.qkv.weight"] / named["blocks.0.attn.qkv.weight"]
    assert ratio == pytest.approx(2) and named["patch_embed.proj.weight"] <= 0.1 * 0.5**depth


def test_weight_decay_leaves_biases_and_norms_alone():
    for flag, undecayed in (("", True), ("--decay-all", False)):
        t = trainer(f"{PLAIN} --dataset synthetic --num-classes 4 --weight-decay 0.3 {flag}")
        decay = {id(p): g["weight_decay"] for g in t.optimizer.param_groups for p in g["params"]}
        assert (decay[id(t.model.blocks[0].norm1.weight)] == 0) is undecayed
        assert decay[id(t.model.blocks[0].attn.qkv.weight)] == 0.3


@pytest.mark.parametrize("more, kind", [
    ("", "CrossEntropyLoss"), ("--smoothing 0.1", "LabelSmoothingCrossEntropy"),
    ("--mixup 0.8 --cutmix 1", "SoftTargetCrossEntropy"), ("--loss bce --smoothing 0.1", "BinaryCrossEntropy"),
    ("--loss bce --mixup 0.2 --bce-target-thresh 0.2", "BinaryCrossEntropy"),
    ("--loss asl", "AsymmetricLossMultiLabel"),
])  # fmt: skip
def test_criterion(more, kind):
    t = trainer(f"{SYNTHETIC} {more}")
    name = type(t.task.criterion).__name__
    assert name == kind or name.startswith(kind[:10]), name
    t.train_epoch()
    assert t.step == 2 and all(torch.isfinite(loss) for _, loss in t.losses)


def test_mixup_changes_images_and_targets_until_it_is_off():
    seen = []
    t = trainer(f"{SYNTHETIC} --mixup 0.8 --mixup-off-epoch 1 --epochs 2")
    task = t.task.forward
    t.task.forward = lambda x, y: seen.append((x.clone(), y.clone())) or task(x, y)
    t.train_epoch()
    t.epoch, t.batch = 1, 0
    t.train_epoch()
    (mixed, soft), (plain, hard) = seen[0], seen[-1]
    assert torch.equal(plain, t.loader.x) and not torch.equal(mixed, t.loader.x)
    assert soft.shape == hard.shape == (8, 4)
    assert ((soft > 0).sum(1) > 1).any() and (hard.max(1).values == 1).all()


def test_random_erasing_and_bf16_and_channels_last():
    seen = []
    t = trainer(f"{SYNTHETIC} --random-erasing 1 --erasing-mode const --amp bf16 --channels-last")
    task = t.task.forward
    t.task.forward = lambda x, y: seen.append(x) or task(x, y)
    t.model.fc.register_forward_hook(lambda m, a, out: seen.append(out))
    t.train_epoch()
    assert (seen[0] == 0).any(dim=(1, 2, 3)).all() and not (t.loader.x == 0).any()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert t.model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert any(s.dtype == torch.bfloat16 for s in seen)


def test_repeated_augmentation_gives_copies_to_different_ranks():
    cfg = config.make({"aug_repeats": 3, "batch_size": 4})
    ranks = [list(data.EpochSampler(48, cfg, r, 3)) for r in range(3)]
    assert [len(r) for r in ranks] == [16, 16, 16]
    for place in range(16):
        indices, seeds = zip(*(r[place] for r in ranks), strict=True)
        assert len(set(indices)) == 1 and len(set(seeds)) == 3  # the same image, three augmentations
    assert len({i for i, _ in ranks[0]}) == 16


def test_ranks_together_see_what_one_process_with_twice_the_batch_sees():
    one = list(data.EpochSampler(50, config.make({"batch_size": 8}), 0, 1))
    two = [list(data.EpochSampler(50, config.make({"batch_size": 4}), r, 2)) for r in range(2)]
    for step in range(6):
        parts = two[0][step * 4 : step * 4 + 4] + two[1][step * 4 : step * 4 + 4]
        assert sorted(parts) == sorted(one[step * 8 : step * 8 + 8])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Weights of a test_vit teacher, as a file."""
    from safetensors.torch import save_file

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(timm.create_model("test_vit", num_classes=4).state_dict(), path)
    return path


@pytest.mark.parametrize("kind, student", [
    ("logit", "test_vit"), ("feature", "test_vit"), ("feature", "test_ela"),
    ("token", "deit_tiny_distilled_patch16_224 --model-kwargs img_size=160 depth=1 embed_dim=48 num_heads=3"),
])  # fmt: skip
def test_distillation(kind, student, train, tmp_path, teacher):
    """The student follows the teacher: its loss is not that of the labels alone, and a resume is exact."""
    args = (f"--model {student} --img-size 160 --dataset synthetic --synthetic-images 8 --num-classes 4 --batch-size 4 "
            f"--epochs 2 --teacher test_vit --teacher-checkpoint {teacher} --distill {kind}")  # fmt: skip
    if "kwargs" not in student and student == "test_vit":
        args += " --drop 0.1"
    status, _, err = train(args, output=tmp_path / "whole")
    assert status == 0, err
    assert train(f"{args} --stop-step 2", output=tmp_path / "parts")[0] == 0
    run = only_run(tmp_path / "parts")
    assert train(f"--resume {run}")[0] == 0
    whole = only_run(tmp_path / "whole")
    assert differences(state_of(whole), state_of(run)) == []
    assert train(f"{args} --distill-weight 0", output=tmp_path / "alone")[0] == 0
    assert rows(tmp_path / "alone")[0]["train_loss"] != rows(tmp_path / "whole")[0]["train_loss"]
    # the weights file holds the student alone
    model = timm.create_model(student.split()[0], pretrained=True, num_classes=4,
                              pretrained_cfg_overlay={"file": str(whole / "last.safetensors"), "num_classes": 4},
                              **({"img_size": 160, "depth": 1, "embed_dim": 48, "num_heads": 3}
                                 if kind == "token" else {}))  # fmt: skip
    student_weights = {k.removeprefix("student."): v for k, v in state_of(whole)["model"].items()}
    assert all(torch.equal(v, student_weights[k]) for k, v in model.state_dict().items())


class Balanced(nn.Module):
    """A layer with a loss of its own, as a mixture's router has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.kept = None

    def forward(self, x):
        self.kept = 3 * self.weight if self.training else None
        return x

    def pop_aux_loss(self):
        kept, self.kept = self.kept, None
        return kept


def test_losses_of_modules_are_added(monkeypatch):
    create = timm.create_model

    def with_balance(*args, **kwargs):
        model = create(*args, **kwargs)
        model.norm = nn.Sequential(model.norm, Balanced())
        return model

    args = f"{PLAIN} --dataset synthetic --num-classes 4 --synthetic-images 8 --opt momentum --lr 0.1 --momentum 0"
    plain = trainer(args)
    plain.train_epoch()
    monkeypatch.setattr(timm, "create_model", with_balance)
    for weight, gradient in ((1.0, 3.0), (0.5, 1.5)):
        t = trainer(f"{args} --aux-weight {weight} --sched constant")
        t.train_epoch()
        assert t.losses[0][1] - plain.losses[0][1] == pytest.approx(6.0 * weight, abs=1e-4)
        assert t.model.norm[1].weight.item() == pytest.approx(2.0 - 0.1 * gradient, abs=1e-6)


def test_mixture_of_heads_trains_with_its_balance():
    args = "--model test_moh_vit --dataset synthetic --num-classes 4 --synthetic-images 4 --batch-size 4 --img-size 64"
    with_loss, without = trainer(args), trainer(f"{args} --aux-weight 0")
    assert with_loss.aux_modules
    for t in (with_loss, without):
        t.train_epoch()
    assert with_loss.losses[0][1] > without.losses[0][1]


ZOO = [n for n in timm.list_models("test_*", module="") if timm.model_entrypoint(n).__module__.startswith("visionattn")]


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_of_the_zoo_gets_a_gradient(name):
    """Otherwise DDP would stop in the second step."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).train()
    size = model.pretrained_cfg["input_size"]
    loss = model(torch.randn(2, *size)).square().sum()
    for extra in [m.pop_aux_loss() for m in build.auxiliary_modules(model)]:
        loss = loss if extra is None else loss + extra
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_zoo_is_not_empty():
    assert {"test_ela", "test_halo", "test_ulsam", "test_ninformer"} <= set(ZOO)


def test_tensorboard(train, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(f"{SYNTHETIC} --tensorboard --epochs 2")[0] == 0
    events = accumulator.EventAccumulator(str(only_run(tmp_path / "runs")))
    events.Reload()
    values = [e.value for e in events.Scalars("train_loss")]
    assert values == pytest.approx([float(r["train_loss"]) for r in rows(tmp_path / "runs")])


def test_compile_runs_the_same_numbers(train, tmp_path, monkeypatch):
    """Through the eager backend of torch.compile: the wiring, for task, EMA, checkpoint names and resume."""
    compiled = []
    real = torch.compile

    def eager(model, **kwargs):
        compiled.append(model)
        return real(model, **{**kwargs, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", eager)
    args = f"{SYNTHETIC} --ema --synthetic-images 32"
    assert train(args, output=tmp_path / "plain")[0] == 0
    assert not compiled
    assert train(f"{args} --compile --stop-step 2", output=tmp_path / "compiled")[0] == 0
    assert compiled
    run = only_run(tmp_path / "compiled")
    assert train(f"--resume {run}")[0] == 0
    a, b = weights_after(tmp_path / "plain"), weights_after(tmp_path / "compiled")
    assert list(a) == list(b) and close(a, b, 1e-5)


def test_validation_uses_the_models_own_transform(train, pictures, tmp_path):
    """MODEL:DIRECTORY as timm saves it; size, crop and filter of its pretrained_cfg, its test size first."""
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg.update(num_classes=3, test_input_size=(3, 64, 64), test_crop_pct=1.0, interpolation="bicubic")
    save_for_hf(model, tmp_path / "saved", model_config={"num_classes": 3})
    status, out, err = train(f"--validate local-dir:{tmp_path / 'saved'} --data-dir {pictures} --workers 0")
    assert status == 0, err
    assert "64x64 px, crop 1.0, bicubic" in out and "on 12 images" in out
    assert not (tmp_path / "runs").exists()
    # by hand
    cfg = timm.data.resolve_data_config(model=model, use_test_size=True)
    transform = timm.data.create_transform(**cfg)
    found = timm.data.create_dataset("", root=str(pictures / "val"), transform=transform)
    with torch.no_grad():
        right = sum(int(model.eval()(x[None]).argmax() == y) for x, y in found)
    assert f"top1 {100 * right / 12:.3f}" in out


def test_checkpoint_of_another_class_count_starts_a_fine_tuning(train, pictures, tmp_path):
    assert train(SYNTHETIC, output=tmp_path / "four")[0] == 0
    source = only_run(tmp_path / "four") / "last.safetensors"
    args = f"{TINY} --data-dir {pictures} --epochs 1 --opt sgd --lr 0 --checkpoint {source}"
    assert train(args, output=tmp_path / "three")[0] == 0
    a, b = weights_after(tmp_path / "four"), weights_after(tmp_path / "three")
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    assert {"fc.weight", "fc.bias"} <= changed and all(k.startswith("fc.") or "running" in k or "num_b" in k
                                                       for k in changed)  # fmt: skip


def test_webdataset_shards(train, pictures, tmp_path):
    """Two shards a split, with the description that timm reads; a run that stops within its second epoch goes on as the
    whole one, whether the loop reads or two workers do."""
    pytest.importorskip("webdataset")
    shards = tmp_path / "shards"
    shards.mkdir()
    info = {}
    for split, name in (("train", "train"), ("val", "validation")):
        files = sorted((pictures / split).rglob("*.png"))
        info[name] = {"name": name, "num_samples": len(files), "filenames": [], "shard_lengths": []}
        for i in range(2):
            part = files[i::2]
            info[name]["filenames"].append(f"{name}-{i:04d}.tar")
            info[name]["shard_lengths"].append(len(part))
            with tarfile.open(shards / f"{name}-{i:04d}.tar", "w") as t:
                for k, file in enumerate(part):
                    label = str("abc".index(file.parent.name)).encode()
                    for suffix, content in (("png", file.read_bytes()), ("cls", label)):
                        entry = tarfile.TarInfo(f"{i}_{k:04d}.{suffix}")
                        entry.size = len(content)
                        t.addfile(entry, io.BytesIO(content))
    (shards / "_info.json").write_text(json.dumps({"splits": info}))
    for workers in (0, 2):
        args = f"{TINY} --dataset wds/ --data-dir {shards} --num-classes 3 --epochs 2 --workers {workers}"
        whole, parts = tmp_path / f"whole{workers}", tmp_path / f"parts{workers}"
        status, out, err = train(args, output=whole)
        assert status == 0 and "6 batches of 8" in out, err
        assert train(f"{args} --stop-step 8", output=parts)[0] == 0
        run = only_run(parts)
        assert train(f"--resume {run}")[0] == 0
        assert state_of(run)["position"]["step"] == 12
        assert differences(state_of(only_run(whole)), state_of(run)) == []


def test_manual_lists_every_option():
    text = (ROOT / "docs" / "training.md").read_text()
    assert config.options_table() in text, "put in the table that python -m visionattn.training.config prints"


def test_script_stays_readable():
    """Files of at most 600 lines."""
    for path in (ROOT / "visionattn" / "training").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path
