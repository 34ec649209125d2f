"""The weights that come along: offline, as good as stated, and the same in manifest, registry and documentation."""

import pickle
import re
import socket
from pathlib import Path

import pytest
import timm
import torch

import visionattn
from visionattn.checkpoints import CheckpointError, fetch, manifest, read_checkpoint, sha256
from visionattn.cli.models import model_card, render_card, zoo
from visionattn.cli.weights import as_markdown
from visionattn.models._shipped import weights_folder
from visionattn.training.data import Digits

SHIPPED = sorted(name for name, entry in manifest().items() if entry.file)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", SHIPPED)
def test_stated_accuracy(name):
    """All 364 held-out digits, through the cfg's own transform; a rounding of another computer may turn one of them."""
    entry = manifest()[name]
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    held_out = Digits(train=False)
    images = torch.stack([transform(image.convert("RGB")) for image, _ in held_out])
    assert tuple(images.shape[1:]) == model.pretrained_cfg["input_size"] == (3, entry.img_size, entry.img_size)
    assert model.pretrained_cfg["label_names"] == Digits.classes
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in images.split(91)])
    right = (found == torch.tensor(held_out.labels)).sum().item()
    assert abs(right - entry.top1 / 100 * len(images)) < 1.1
    card = model_card(name)
    assert f"| {name} | {entry.img_size} px | {entry.top1} | digits |" in card and entry.recipe in card
    assert f'timm.create_model("{name}", pretrained=True)' in card


@pytest.mark.parametrize("name", SHIPPED)
def test_file(name):
    entry = manifest()[name]
    path = fetch(name)
    assert path == weights_folder() / entry.file and path.stat().st_size == entry.size <= 2_000_000
    assert sha256(path) == entry.sha256
    assert all(torch.isfinite(t).all() for t in read_checkpoint(path).values() if t.is_floating_point())


def test_no_path_travels(tmp_path):
    name = SHIPPED[0]
    model = timm.create_model(name, pretrained=True).eval()
    folder = str(weights_folder().resolve()).encode()
    assert folder not in pickle.dumps(model) and str(weights_folder()) not in str(model.pretrained_cfg)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert folder not in (tmp_path / "config.json").read_bytes()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert torch.equal(again(x), model(x))


def test_uses_beside_the_plain_one(tmp_path):
    """Other heads, channels, sizes and features of the same weights; the untrained model stays the default."""
    name = "test_agent_swin.digits"
    assert timm.create_model("test_agent_swin").num_classes == 1000
    assert timm.create_model(name).num_classes == 10
    assert timm.create_model(name, pretrained=True, num_classes=3)(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert timm.create_model(name, pretrained=True, in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 10)
    assert timm.create_model(name, pretrained=True, img_size=96)(torch.randn(1, 3, 96, 96)).shape == (1, 10)
    maps = timm.create_model(name, pretrained=True, features_only=True)(torch.randn(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    for file in ("visionattn:nothing.safetensors", "visionattn:../weights/manifest.yaml"):
        with pytest.raises(FileNotFoundError, match="come with visionattn"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file))


def test_an_address_is_read_as_a_file_is(tmp_path):
    """Fetched once into the cache, under a name of its own, then read by the same safe reader."""
    source = tmp_path / "source.pth"
    state = timm.create_model("test_ela").state_dict()
    torch.save({"model": state}, source)
    overlay = dict(url=source.as_uri())
    for _ in range(2):
        model = timm.create_model("test_ela", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "c")
        assert torch.equal(model.state_dict()["fc.weight"], state["fc.weight"])
        source.unlink(missing_ok=True)
    assert [p.name.split("-")[0] for p in (tmp_path / "c").iterdir()] == ["test_ela.untrained"]
    with pytest.raises(CheckpointError, match="can't be fetched"):
        overlay = dict(url=(tmp_path / "nothing.pth").as_uri())
        timm.create_model("test_ela", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 1


def tagged() -> dict[str, timm.models.PretrainedCfg]:
    names = [tag for name in zoo() for tag in timm.list_models(f"{name}.*", include_tags=True)]
    return {name: timm.get_pretrained_cfg(name) for name in names}


def test_manifest_and_registered_tags_are_equal():
    entries = manifest()
    weights = {name: cfg for name, cfg in tagged().items() if cfg.has_weights}
    for name, cfg in weights.items():
        entry = entries[name]
        assert entry.model == name.partition(".")[0]
        assert (entry.url or "", entry.file) == (cfg.url or "", cfg.file and cfg.file.removeprefix("visionattn:")), name
        assert entry.img_size == cfg.input_size[-1], name
    for name, entry in entries.items():
        if entry.model and (entry.file or entry.url) and name.endswith((".in1k", ".digits")):
            assert name in weights, f"{name} is in the manifest, and no registered tag"
    assert {e.file for e in entries.values() if e.file} == {p.name for p in weights_folder().glob("*.safetensors")}


def test_documentation_has_the_manifest():
    if Path(visionattn.__file__).parents[1] != ROOT:
        pytest.skip("runs against an installed wheel: docs/ is not in it")
    text = (ROOT / "docs" / "weights.md").read_text()
    assert as_markdown(list(manifest().values())) in text, (
        "docs/weights.md is older than the manifest: python benchmarks/train_test_weights.py --document"
    )


def test_a_card_of_every_name():
    """Of every tag and every released file; counts are left to tests of a few, they cost seconds a model."""
    entries = manifest()
    facts = {"parameters": 1, "classes": 1, "MACs": 1, "input": [3, 8, 8], "mechanisms": [], "paper": None}
    names = {**tagged(), **{n: timm.get_pretrained_cfg(e.model) for n, e in entries.items() if e.model}}
    for name, cfg in names.items():
        own = [entries[name]] if name in entries else []
        facts["paper"] = f"{cfg.paper_name} {cfg.paper_ids}"
        card = render_card(name, cfg.to_dict(), facts, own)
        assert card.startswith(f"# {name}\n") and "None" not in card, name
        assert re.search(r"arXiv:\d{4}\.\d{5}|doi", card), name
        assert cfg.origin_url in card and (own or [cfg])[0] is not None
        recipe = re.search(r"`configs/train/(.+?)`", card)
        assert recipe is None or (weights_folder().parent / "configs" / "train" / recipe[1]).is_file()
        for entry in own:
            assert (entry.url or entry.file or entry.note) in card and entry.licence in card
    with pytest.raises(ValueError, match=r"has no tag 'digts': there are .*test_ela.digits"):
        model_card("test_ela.digts")
