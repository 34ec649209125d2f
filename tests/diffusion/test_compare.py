"""``visionattn compare`` on a tiny pipeline: metrics, what the folder holds, going on after an end, bad input."""

import csv
import json
import math
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.extras import require_extra

require_extra("diffusers", "diffusion")
skimage_metrics = require_extra("skimage.metrics", "graph")

from visionattn.cli.main import main  # noqa: E402
from visionattn.diffusion import Disk, sparsify  # noqa: E402
from visionattn.diffusion.compare import compare, frames_of, load_frames  # noqa: E402
from visionattn.diffusion.metrics import Metrics  # noqa: E402
from visionattn.diffusion.tiny import tiny_flux  # noqa: E402

CALL = dict(height=64, width=48, num_inference_steps=2, max_sequence_length=16)
PROMPTS = ["a red fox", "a <b>cat</b> & snow, ünïcode"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_flux()


def picture(pipe, prompt, seed):
    return np.asarray(pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **CALL).images[0])


def run(pipe, folder, methods=None, **options):
    methods = methods or {"disk:1": Disk(1), "all": Disk(64)}
    options = {"seeds": (0, 7), "arguments": CALL, "warmup": False, **options}
    return compare(pipe, methods, PROMPTS, folder, **options)


def test_metrics():
    metrics = Metrics()
    rng = np.random.default_rng(0)
    a = rng.integers(0, 240, (40, 32, 3), dtype=np.uint8)
    b = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)
    assert metrics([a], [a], ("psnr", "ssim")) == {"psnr": math.inf, "ssim": 1.0}
    assert metrics([a], [a + 10], ("psnr",))["psnr"] == pytest.approx(20 * math.log10(25.5))
    found = metrics([a, a], [b, a + 10], ("psnr", "ssim"))  # a mean over frames
    expected = [skimage_metrics.peak_signal_noise_ratio(a, x, data_range=255) for x in (b, a + 10)]
    assert found["psnr"] == pytest.approx(np.mean(expected))
    # Wang et al. 2004, eq. 13, in the middle of the picture, by its definition
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(axis, axis) / axis.sum() ** 2
    x, y = (p[15:26, 10:21, 0].astype(float) for p in (a, b))
    mx, my = (window * x).sum(), (window * y).sum()
    sx, sy, sxy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum(), (window * (x - mx) * (y - my)).sum()
    c1, c2 = 2.55**2, 7.65**2
    value = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))
    one = [p[15:26, 10:21, :1].repeat(3, axis=2) for p in (a, b)]
    assert metrics([one[0]], [one[1]], ("ssim",))["ssim"] == pytest.approx(value, abs=1e-6)
    with pytest.raises(ValueError, match="can't be compared"):
        metrics([a], [b[:-1]])


def test_lpips_gets_pictures_from_minus_one_to_one_and_may_fail(monkeypatch):
    """The package fetches weights at its first use, so a stand-in is called here."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, a, b):
            assert a.shape == b.shape == (1, 3, 8, 6) and a.min() == -1.0 and b.max() == 1.0
            return (b - a).mean()[None, None, None, None]

    module = types.ModuleType("lpips")
    module.__spec__ = SimpleNamespace()
    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    a, b = np.zeros((8, 6, 3), np.uint8), np.full((8, 6, 3), 255, np.uint8)
    assert Metrics()([a], [b], ("lpips",)) == {"lpips": 2.0}
    module.LPIPS = lambda **kwargs: exec("raise OSError('no network')")
    metrics = Metrics()
    assert metrics([a], [b], ("lpips",)) == {"lpips": None}
    assert metrics.notes == ["LPIPS is left out: its network can't be loaded (no network)"]


def test_folder_of_a_comparison(pipe, tmp_path):
    dense = {(p, s): picture(pipe, p, s) for p in PROMPTS for s in (0, 7)}
    assert not np.array_equal(dense[PROMPTS[0], 0], dense[PROMPTS[1], 0])
    lines = []
    result = run(pipe, tmp_path, progress=lines.append)
    assert lines[0].startswith("1 of 12: dense, seed 0, 'a red fox'") and len(lines) == 12 and result.missing == 0
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.rows) == 12
    with sparsify(pipe, Disk(1)):
        sparse = {key: picture(pipe, *key) for key in dense}
    for row in result.rows:
        key = row["prompt"], row["seed"]
        (saved,) = load_frames(tmp_path, row)
        if row["method"] == "disk:1":
            assert np.array_equal(saved, sparse[key])
            expected = skimage_metrics.peak_signal_noise_ratio(dense[key], sparse[key])
            assert row["psnr"] == pytest.approx(expected) and 0 < row["ssim"] < 1
        else:
            assert np.array_equal(saved, dense[key])
    assert {(r["psnr"], r["ssim"]) for r in rows if r["method"] == "all"} == {("inf", "1")}
    assert {r["psnr"] for r in rows if r["method"] == "dense"} == {""}
    assert all(float(r["seconds"]) > 0 for r in rows)

    page = result.page.read_text(encoding="utf-8")
    assert "a &lt;b&gt;cat&lt;/b&gt; &amp; snow, ünïcode" in page and "<b>cat" not in page
    assert (
        page.count("<img ") == 12
        and "pictures are missing" not in page
        and "of the pairs skipped on 4 x 3 tokens" in page
    )
    for link in page.split("<img src='")[1:]:
        assert (tmp_path / link.split("'")[0]).is_file()
    with Image.open(next(tmp_path.glob("pictures/a-red-fox-*-seed7/_side-by-side.png"))) as image:
        panels = np.asarray(image)
    at = 2 * (160 + 8)  # the third panel, below its label
    assert np.array_equal(panels[16 : 16 + 64, at : at + 48], dense[PROMPTS[0], 7])
    gap = np.abs(sparse[PROMPTS[0], 7].astype(int) - dense[PROMPTS[0], 7]).clip(0, 63) * 4
    below = panels[16 + 64 + 4 + 16 :, 168 : 168 + 48].astype(int)
    assert np.array_equal(below[gap < 252], gap[gap < 252])
    assert not list(tmp_path.rglob("*.tmp"))


class Interrupted:
    """Calls of a pipeline, counted; the one numbered ``at`` is Ctrl-C."""

    def __init__(self, monkeypatch, pipe, at=None):
        self.calls = 0
        original = type(pipe).__call__

        def call(this, prompt=None, generator=None, **kwargs):
            self.calls += 1
            if self.calls == at:
                raise KeyboardInterrupt
            return original(this, prompt=prompt, generator=generator, **kwargs)

        monkeypatch.setattr(type(pipe), "__call__", call)


def test_goes_on_after_an_interruption(pipe, tmp_path, monkeypatch):
    whole = run(pipe, tmp_path / "whole")
    folder = tmp_path / "folder"
    before = picture(pipe, PROMPTS[0], 0)
    with monkeypatch.context() as m:
        Interrupted(m, pipe, at=6)  # under the first pattern
        with pytest.raises(KeyboardInterrupt):
            run(pipe, folder)
    assert np.array_equal(picture(pipe, PROMPTS[0], 0), before)  # the patch is off
    page = (folder / "index.html").read_text()
    assert "7 pictures are missing" in page and page.count("<img ") == 5
    lost = next(folder.glob("pictures/*/disk-1.png"))
    lost.unlink()  # a picture that is gone is made again
    leftovers = [folder / ".results.csv.123.tmp", lost.with_name(".all.png.123.tmp"), folder / ".mine.tmp"]
    for path in leftovers:
        path.touch()

    lines = []
    with monkeypatch.context() as m:
        counted = Interrupted(m, pipe)
        run(pipe, folder, progress=lines.append)
        assert counted.calls == 8 and lines[0] == "4 pictures are there already"
        assert [path.exists() for path in leftovers] == [False, False, True]
        run(pipe, folder)
        assert counted.calls == 8
        more = run(pipe, folder, {"disk:2": Disk(2)}, seeds=[0])
        assert counted.calls == 10 and more.methods == ["disk:1", "all", "disk:2"]

    def facts(result):
        return sorted((r["prompt"], r["seed"], r["method"], f"{r['psnr'] or 0:.4g}") for r in result.rows)

    assert facts(whole) == [f for f in facts(more) if f[2] != "disk:2"]


def test_metrics_that_were_missing_are_filled_in(pipe, tmp_path):
    first = run(pipe, tmp_path, {"disk:1": Disk(1)}, seeds=[0])
    text = (tmp_path / "results.csv").read_text()
    values = [f"{row['ssim']:.6g}" for row in first.rows if row["ssim"]]
    for value in values:
        text = text.replace(value, "")
    (tmp_path / "results.csv").write_text(text)
    second = run(pipe, tmp_path, {"disk:1": Disk(1)}, seeds=[0])
    assert [f"{row['ssim']:.6g}" for row in second.rows if row["ssim"]] == values != []


def test_refusals(pipe, tmp_path):
    run(pipe, tmp_path, {"disk:1": Disk(1)}, seeds=[0])
    with pytest.raises(ValueError, match=r"holds another comparison \(height 64 there, 32 here\): give another"):
        run(pipe, tmp_path, arguments={**CALL, "height": 32})
    with sparsify(pipe, Disk(1)), pytest.raises(ValueError, match=r"disk:1: .*patched already"):
        run(pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()

    with pytest.raises(ValueError, match=r"pooled: downsample=5 does not divide the grid \(4, 3\)"):
        run(pipe, tmp_path / "odd", {"pooled": Disk(1, 5)}, warmup=True)
    assert not list((tmp_path / "odd").rglob("*.png"))  # it failed before the dense pictures
    run(pipe, tmp_path / "odd", {"disk:1": Disk(1)}, seeds=[0], arguments={**CALL, "height": 32})  # nothing to mix with

    with pytest.raises(ValueError, match="pooled: downsample=5"):  # the warm-up goes beyond the dense steps
        run(pipe, tmp_path / "odder", {"pooled": lambda p: sparsify(p, Disk(1, 5), dense_steps=2)}, warmup=True,
            arguments={**CALL, "num_inference_steps": 4})  # fmt: skip
    assert not list((tmp_path / "odder").rglob("*.png"))
    with pytest.raises(ValueError, match=r"method 'disk 1': the folder has 'disk:1', whose files have the same names"):
        run(pipe, tmp_path, {"disk 1": Disk(1)}, seeds=[0])

    def reenter(line):
        with pytest.raises(ValueError, match="is in use by another process"):
            run(tiny_flux(), tmp_path)

    run(pipe, tmp_path, {"disk:2": Disk(2)}, seeds=[0], progress=reenter)
    with pytest.raises(ValueError, match="seeds has 3 twice"):
        run(pipe, tmp_path, seeds=[3, 3])
    with pytest.raises(ValueError, match="takes no prompt: compare is for pipelines that are prompted"):
        run(torch.nn.Linear(1, 1), tmp_path)
    (tmp_path / "results.csv").write_text("prompt,seed\nfox,zero\n")
    with pytest.raises(ValueError, match=r"results.csv, line 2, is not a row of a comparison"):
        run(pipe, tmp_path)


def test_videos_and_arrays():
    video = np.zeros((1, 5, 8, 6, 3), np.float32)
    video[0, 2] = 1.0
    frames = frames_of(SimpleNamespace(frames=video))
    assert len(frames) == 5 and frames[2].min() == 255 and frames[1].max() == 0
    (image,) = frames_of(SimpleNamespace(images=torch.ones(2, 3, 8, 6)))
    assert image.shape == (8, 6, 3) and image.dtype == np.uint8 and image.min() == 255
    with pytest.raises(ValueError, match="without images or frames"):
        frames_of(SimpleNamespace(other=1))
    with pytest.raises(ValueError, match=r"arrays of shape \(8, 6\)"):
        frames_of(SimpleNamespace(images=np.zeros((1, 8, 6))))


def test_a_video_is_a_picture_a_frame(tmp_path, pipe):
    class Film(type(pipe)):  # three pictures of one call
        def __call__(self, prompt, generator, **kwargs):
            images = [super(Film, self).__call__(prompt, generator=generator, **kwargs).images[0] for _ in range(3)]
            return SimpleNamespace(frames=[images])

    film = Film(**pipe.components)
    result = run(film, tmp_path, {"disk:1": Disk(1)}, seeds=[0])
    again = run(film, tmp_path, {"disk:1": Disk(1)}, seeds=[0])
    assert [r["frames"] for r in again.rows] == [3] * 4 and again.rows[2]["psnr"] == pytest.approx(
        result.rows[2]["psnr"], rel=1e-5
    )
    assert len(list(tmp_path.glob("pictures/a-red-fox-*/disk-1-000?.png"))) == 3
    assert "disk-1-0001.png" in result.page.read_text()


def test_command(pipe, tmp_path, capsys):
    """From a folder that save_pretrained wrote, and the tiny one: the same pictures."""
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("# two\n\na red fox\n a cat \n")
    common = ["compare", "disk:1", "fast", "--height", "64", "--width", "48", "--steps", "2", "--no-warmup"]
    common += ["--set", "max_sequence_length=32", "--prompts", str(tmp_path / "prompts.txt"), "--dense-steps", "1"]
    first = [*common, "--pipeline", str(tmp_path / "pipe"), "--device", "cpu", "--out", str(tmp_path / "a")]
    assert main(first) == 0
    out, err = capsys.readouterr()
    assert "disk:1 dense_steps=1  2 " in out and "SSIM" in out and "6 of 6: fast dense_steps=1, seed 0, 'a cat'" in err
    assert main([*common, "--tiny", "--out", str(tmp_path / "b"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["rows"]) == 6 and data["summary"][1]["psnr"] < 100
    for row in data["rows"]:
        (one,), (other,) = (load_frames(tmp_path / folder, row) for folder in "ab")
        assert np.abs(one.astype(int) - other).max() <= 1  # weights that lie elsewhere in memory round differently
    report = (tmp_path / "b" / "reports" / "fast-dense-steps-1.txt").read_text()
    assert "dense steps of the last generation: 1" in report and "preset: CLEAR" in report


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no pipeline: give --pipeline NAME, or --tiny"),
        (["disk"], "pattern 'disk' is unknown: write disk:RADIUS"),
        (["disk:x"], "pattern 'disk:x'"),
        (["clear:none.safetensors"], "clear:none.safetensors: none.safetensors is not a file"),
        (["disk:1", "disk:1"], "a pattern is given twice"),
        (["agent_sd"], "agent_sd: "),
        (["--steps", "0"], "--steps 0: give a positive number"),
        (["--prompts", "none.txt"], "--prompts none.txt is not a file"),
        (["--set", "guidance"], "--set 'guidance': write NAME=VALUE"),
        (["--set", "prompt=x"], "prompt is set by the comparison itself"),
        (["--set", "frames=3"], "FluxPipeline takes no frames: it takes prompt, "),
        (["--device", "nonsense"], "--device nonsense can't be used"),
        (["--offload", "model"], "--offload model needs an accelerator"),
        (["--pipeline", "./none"], "--pipeline ./none can't be loaded as a diffusers pipeline: "),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline = [] if not arguments or "--pipeline" in arguments else ["--tiny"]
    assert main(["compare", *arguments, *pipeline]) == 2
    err = capsys.readouterr().err
    assert err.startswith("visionattn compare: error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "compare").exists()
