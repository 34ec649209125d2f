"""``predict`` and ``maps`` as a user calls them; the pictures are read again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import visionattn  # noqa: F401  registers the models
from tests.cli.test_commands import call


def run(*argv: str) -> str:
    """What the command prints, as a process of its own."""
    done = subprocess.run([sys.executable, "-m", "visionattn", *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def colours(path: str | Path) -> int:
    with Image.open(path) as picture:
        picture.load()
        return len(picture.convert("RGB").getcolors(2**24))


def test_maps_of_a_model_that_comes_along(tmp_path):
    """The README's way to a labelled attention map: no image, no download, no setting."""
    if not timm.get_pretrained_cfg("test_agent_deit.digits"):
        pytest.fail("test_agent_deit.digits does not come along")
    found = json.loads(run("maps", "test_agent_deit.digits", "--sample", "digit-7", "--out", str(tmp_path), "--json"))
    assert found["prediction"].startswith("7 (") and found["weights"] == "pretrained, tag digits"
    assert set(found["pictures"]) == {"overlay", "query", "rollout"}
    assert all(colours(path) > 500 for path in found["pictures"].values())
    assert [e["mechanism"] for e in found["layers"]] == ["AgentAttention"] * 4
    assert not list(tmp_path.glob(".*"))


def test_predict_names_the_digits(tmp_path, capsys):
    from visionattn.cli.images import sample

    for digit in (0, 7):
        sample(f"digit-{digit}").save(tmp_path / f"number{digit}.png")
    (tmp_path / "notes.txt").write_text("no image")
    arguments = ("predict", "test_agent_deit.digits", str(tmp_path), "--out", str(tmp_path / "out"), "--top", "3")
    found = json.loads(run(*arguments, "--json"))
    assert [(e["image"], e["classes"][0]["label"]) for e in found["images"]] == [("number0", "0"), ("number7", "7")]
    for entry in found["images"]:
        chances = [c["probability"] for c in entry["classes"]]
        assert len(chances) == 3 and chances == sorted(chances, reverse=True) and sum(chances) <= 1
    assert colours(found["picture"]) > 50
    assert "number0\n  0." in call(*arguments, capsys=capsys)


def test_maps_of_random_weights_a_checkpoint_and_a_photograph(tmp_path, capsys):
    """A photograph that is not square and turned by its EXIF, layers by name, one drawing; masks have no rollout."""
    import torch

    model = timm.create_model("test_ela", num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "seven.pth")
    photo = Image.effect_noise((60, 90), 80).convert("RGB")
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "noise.jpg", exif=exif)
    (tmp_path / "names.txt").write_text("\n".join(f"kind {i}" for i in range(7)))
    out = str(tmp_path / "out")
    found = json.loads(
        call(
            "maps", "test_ela", str(tmp_path / "noise.jpg"), "--checkpoint", str(tmp_path / "seven.pth"), "--labels",
            str(tmp_path / "names.txt"), "--out", out, "--json", capsys=capsys,
        )
    )  # fmt: skip
    assert found["prediction"].startswith("kind ") and set(found["pictures"]) == {"overlay"}
    assert found["layers"][0]["kind"] == "mask" and found["weights"] == "weights of seven.pth"
    text = call(
        "maps", "test_halo", "--random", "--sample", "flower", "--layers", "-1", "--draw", "query", "--query", "0.1",
        "0.9", "--out", out, capsys=capsys,
    )  # fmt: skip
    assert "stages.3.0.attn" in text and "stages.2" not in text and "random weights" in text
    assert [p.name for p in sorted(Path(out).iterdir())] == ["test_ela-noise-overlay.png", "test_halo-flower-query.png"]
    listed = call("maps", "test_halo", "--random", "--list", "--out", str(tmp_path / "none"), capsys=capsys)
    assert listed.count("HaloAttention") == 5 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["maps", "test_hallo"], "did you mean"),
        (["maps", "test_halo", "nothing.jpg"], "nothing.jpg is not a file"),
        (["maps", "test_halo", "{broken}"], "is not an image that Pillow reads"),
        (["maps", "test_halo", "{broken}", "--sample", "china"], "give one of them"),
        (["maps", "test_halo", "--sample", "chyna"], "argument --sample: invalid choice: 'chyna'"),
        (["maps", "test_halo", "--query", "1", "0"], "give y and x from 0"),
        (["maps", "test_halo", "--layers", "9"], "there is no number 9"),
        (["maps", "test_halo", "--checkpoint", "{broken}"], "broken.png"),
        (["maps", "resnet18", "--random"], "no attention was seen in ResNet"),
        (["predict", "test_halo", "--labels", "{broken}"], "names"),
        (["predict", "test_halo", "{folder}"], "holds no images"),
        (["predict", "test_halo", "--device", "cuda:99"], "--device cuda:99 can't be used"),
        (["predict", "test_halo", "--top", "0"], "show at least one class"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(argv, message, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "folder").mkdir()
    places = {"broken": tmp_path / "broken.png", "folder": tmp_path / "folder"}
    from visionattn.cli.main import main

    status = main([*(word.format(**places) for word in argv), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert status in (1, 2) and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()
