"""The simulator against published arithmetic, brute force, and the measured tables of this repository."""

import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from visionattn.cli.main import main
from visionattn.cli.patterns import parse_pattern
from visionattn.ops.local import Cross, Disk, Neighborhood, planner
from visionattn.ops.local.call import make_call
from visionattn.ops.local.counts import visits
from visionattn.ops.local.measured import compare_with
from visionattn.ops.local.rates import kernel_of
from visionattn.ops.local.simulate import NETWORKS, RATES, TILES, Network, mixed_gain, simulate
from visionattn.plots.patterns import tile_visits, visits_figure

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# FLUX.1-dev, 512 text tokens: px, TFLOP of the linear layers, of a dense layer, gain of a step without attention
DENSE = [
    (1024, 59.5, 0.261, 1.25), (1536, 125.6, 1.163, 1.53), (2048, 218.2, 3.508, 1.92), (3072, 482.6, 17.17, 3.03),
    (4096, 852.7, 53.60, 4.58), (6144, 1910, 269, 9.03), (8192, 3391, 847.7, 15.25),
]  # fmt: skip
# CLEAR: px, radius, (TFLOP of a layer, gain of a step) of the pattern, of TILES[2] less one, of 128 tokens in a row
CLEAR = {
    (1024, 8): "0.0635 1.18 .079 1.16 .086 1.16 .099 1.14 .094 1.15 .135 1.11 .109 1.13",
    (1024, 16): "0.0866 1.15 .113 1.13 .123 1.12 .123 1.12 .135 1.11 .135 1.11 .150 1.09",
    (1024, 32): "0.1541 1.09 .188 1.06 .198 1.05 .201 1.05 .209 1.04 .213 1.04 .213 1.04",
    (2048, 8): ".246 1.80 .316 1.77 .348 1.76 .413 1.73 .391 1.74 .599 1.66 .585 1.66",
    (2048, 16): ".353 1.75 .485 1.70 .537 1.68 .537 1.68 .599 1.66 .599 1.66 .960 1.53",
    (2048, 32): ".724 1.61 .954 1.53 1.03 1.51 1.06 1.50 1.11 1.49 1.14 1.48 1.63 1.34",
    (4096, 8): ".979 4.30 1.27 4.22 1.41 4.19 1.70 4.12 1.60 4.14 2.53 3.92 3.88 3.64",
    (4096, 16): "1.433 4.18 2.02 4.04 2.25 3.98 2.25 3.98 2.53 3.92 2.53 3.92 7.03 3.12",
    (4096, 32): "3.142 3.79 4.29 3.56 4.66 3.49 4.82 3.47 5.08 3.42 5.24 3.39 13.0 2.45",
    (8192, 8): "3.915 14.31 5.12 14.04 5.71 13.91 6.90 13.66 6.50 13.75 10.4 12.98 18.7 11.61",
    (8192, 16): "5.789 13.90 8.26 13.39 9.24 13.20 9.24 13.20 10.4 12.98 10.4 12.98 34.8 9.62",
    (8192, 32): "13.08 12.50 18.1 11.69 19.8 11.44 20.5 11.34 21.7 11.18 22.4 11.08 66.2 7.22",
}
# GNA: px, window: the pattern, then q8x16/k8x16 and q16x16/k8x8 at strides 1, 16 and 32
GNA = {
    (2048, 32): ".416 1.73 .546 1.68 .599 1.66 .493 1.70 .416 1.73 .416 1.73 .416 1.73",
    (2048, 48): ".673 1.63 .935 1.54 .887 1.56 .673 1.63 .673 1.63 .751 1.60 .673 1.63",
    (2048, 64): "1.034 1.51 1.20 1.46 1.25 1.44 1.14 1.48 1.034 1.51 1.034 1.51 1.034 1.51",
    (2048, 80): "1.498 1.38 1.75 1.32 1.70 1.33 1.498 1.38 1.498 1.38 1.63 1.34 1.498 1.38",
    (4096, 32): "1.652 4.13 2.27 3.98 2.53 3.92 2.01 4.04 1.652 4.13 1.652 4.13 1.652 4.13",
    (4096, 48): "2.683 3.89 4.08 3.60 3.82 3.65 2.683 3.89 2.683 3.89 3.15 3.79 2.683 3.89",
    (4096, 64): "4.126 3.59 5.11 3.42 5.48 3.35 4.74 3.48 4.126 3.59 4.126 3.59 4.126 3.59",
    (4096, 80): "5.982 3.27 7.85 3.01 7.50 3.05 5.982 3.27 5.982 3.27 6.75 3.16 5.982 3.27",
    (4096, 96): "8.250 2.95 9.45 2.81 9.88 2.76 9.02 2.86 8.250 2.95 8.250 2.95 8.250 2.95",
    (4096, 128): "14.02 2.37 15.3 2.27 15.7 2.23 14.8 2.30 14.02 2.37 14.02 2.37 14.02 2.37",
    (8192, 32): "6.600 13.73 9.28 13.19 10.4 12.98 8.15 13.41 6.600 13.73 6.600 13.73 6.600 13.73",
    (8192, 48): "10.72 12.92 17.0 11.86 15.9 12.04 10.72 12.92 10.72 12.92 12.9 12.53 10.72 12.92",
    (8192, 80): "23.92 10.88 33.2 9.79 31.5 9.97 23.92 10.88 23.92 10.88 27.5 10.43 23.92 10.88",
    (8192, 128): "56.08 7.85 63.7 7.36 66.4 7.20 61.0 7.53 56.08 7.85 56.08 7.85 56.08 7.85",
    (1024, 32): ".106 1.13 .127 1.11 .135 1.11 .119 1.12 .106 1.13 .106 1.13 .106 1.13",
}
GNA_TILES = [((8, 16), (8, 16)), ((16, 16), (8, 8))]


def grid_of(px):
    return (px // 16, px // 16)


def pairs_of(text):
    """(printed number, half a unit of its last digit) for each word."""
    return [(float(w), 0.5001 * 10 ** -len(w.partition(".")[2])) for w in text.split()]


def check(found, printed):
    expected = pairs_of(printed)
    assert len(found) == len(expected)
    for i, (x, (y, half)) in enumerate(zip(found, expected, strict=True)):
        assert abs(x - y) <= half, (i, x, y)


@pytest.mark.parametrize("px, linear, layer, bound", DENSE)
def test_dense(px, linear, layer, bound):
    found = simulate(grid_of(px), Disk(1), tiles=[((8, 8), (8, 8))], raster=None)
    assert NETWORKS["flux.1"].linear_flop((px // 16) ** 2) / 1e12 == pytest.approx(linear, rel=1e-3)
    assert found.dense_tflop == pytest.approx(layer, rel=2e-3)
    assert found.bound == pytest.approx(bound, abs=0.006)


@pytest.mark.parametrize("px, radius", CLEAR)
def test_clear(px, radius):
    found = simulate(grid_of(px), Disk(radius), tiles=[TILES[2][i] for i in (0, 1, 2, 3, 5)])
    values = [found.ideal_tflop, found.ideal_sol]
    values += [value for row in found.rows for value in (row.tflop, row.sol)]
    check(values, CLEAR[px, radius])


@pytest.mark.parametrize("px, window", GNA)
def test_gna(px, window):
    runs = [simulate(grid_of(px), Neighborhood(window, s), tiles=GNA_TILES, raster=None) for s in (1, 16, 32)]
    values = [runs[0].ideal_tflop, runs[0].ideal_sol]
    values += [value for run in runs for row in run.rows for value in (row.tflop, row.sol)]
    check(values, GNA[px, window])
    for stride in (4, 8):  # strides below the tile buy nothing
        other = simulate(grid_of(px), Neighborhood(window, stride), tiles=GNA_TILES[:1], raster=None)
        assert other.rows[0].tflop == pytest.approx(runs[0].rows[0].tflop, rel=1e-9)


def test_pooled_keys_and_dense_steps():
    gains = [simulate((256, 256), Disk(r, 4), raster=None).ideal_sol for r in (8, 16, 32)]
    check(gains, "3.56 3.48 3.20")
    window = simulate((256, 256), Neighborhood(80, 16), raster=None)
    check([window.with_dense_steps(28, k) for k in (0, 4, 9, 14)], "3.27 2.47 1.89 1.53")
    with pytest.raises(ValueError, match="dense_steps=29 of 28"):
        mixed_gain(28, 29, 2.0)


def test_other_networks():
    flux3 = Network(3072, 24, 128, 1, text=160, linear=26.0)
    found = [simulate(grid_of(px), Disk(16), flux3, raster=None).ideal_sol for px in (1024, 2048, 4096, 8192)]
    assert found == pytest.approx([1.16, 1.74, 4.08, 13.4], rel=5e-3)  # its text length is about 160
    pattern = Neighborhood((18, 24, 24), (16, 8, 8))
    tiles = [((2, 8, 8), (2, 8, 8)), ((4, 4, 8), (4, 4, 8))]
    video = simulate((30, 48, 80), pattern, replace(NETWORKS["hunyuan-video"], text=0), tiles)
    assert video.ideal_sol == pytest.approx(4.6, abs=0.06) and video.bound == pytest.approx(7.3, abs=0.06)
    perfect, other = video.rows
    assert perfect.tflop == pytest.approx(video.ideal_tflop) and perfect.masked == 0
    assert other.tflop / video.ideal_tflop == pytest.approx(1.19, abs=0.006)
    wan = simulate((21, 45, 80), Neighborhood((12, 24, 24)), "wan-14b")
    assert wan.bound == pytest.approx(3.5, abs=0.1) and 0.7 < 1 - 1 / wan.bound < 0.73
    line = simulate((32768,), Neighborhood(2048, 256), replace(flux3, text=0))
    assert line.best.tflop >= line.ideal_tflop > 0


def test_time_model():
    """CLEAR's fitted rates, and a kernel that executes 400 TFLOP/s."""
    tiles = [((8, 16), (8, 16))]
    found = {px: simulate(grid_of(px), Disk(16), tiles=tiles, rates="clear-paper", raster=None) for px in (4096, 8192)}
    assert found[4096].best.speedup == pytest.approx(2.48, abs=0.02)
    assert found[8192].best.speedup == pytest.approx(7.16, abs=0.05)
    compiled = simulate(grid_of(8192), Disk(16), tiles=tiles, rates="clear-paper-compiled", raster=None)
    assert compiled.best.speedup == pytest.approx(10.5, abs=0.1)


@pytest.mark.parametrize(
    "grid, pattern, query, key",
    [
        ((12, 20), Disk(4), (4, 8), (4, 4)),
        ((13, 9), Neighborhood((4, 5), 2), (4, 4), (2, 8)),
        ((5, 6, 7), Neighborhood(3), (2, 2, 4), (1, 4, 4)),
        ((31, 18), Cross(3, 2), (4, 4), (4, 4)),
    ],
)
def test_tile_visits(grid, pattern, query, key):
    """Against the pattern's mask, token by token."""
    mask = pattern.mask(grid).numpy().reshape(*grid, *grid)
    at = tuple(n // 2 for n in grid)
    rows = mask[tuple(slice(a // q * q, a // q * q + q) for a, q in zip(at, query, strict=True))]
    rows = rows.reshape(-1, *grid)
    found = tile_visits(pattern, grid, query, key, at)
    for tile in np.ndindex(found.shape):
        part = rows[(slice(None), *(slice(t * k, t * k + k) for t, k in zip(tile, key, strict=True)))]
        assert found[tile] == (2 if part.all() else 1 if part.any() else 0)
    assert {0, 1} <= set(found.ravel().tolist())


@pytest.mark.parametrize("pattern", [Disk(3.5), Disk(40), Cross(4, 6, (2, 3))], ids=str)
def test_visits_on_a_raster(pattern):
    """Counts without tables or all pairs of tiles, against the mask."""
    grid, own, other = (11, 14), (2, 3), (3, 4)
    mask = pattern.mask(grid).numpy().reshape(*grid, *grid)
    found, full = 0, 0
    for y, x in np.ndindex(-(-grid[0] // own[0]), -(-grid[1] // own[1])):
        rows = mask[y * own[0] : (y + 1) * own[0], x * own[1] : (x + 1) * own[1]]
        for ky, kx in np.ndindex(-(-grid[0] // other[0]), -(-grid[1] // other[1])):
            tile = rows[:, :, ky * other[0] : (ky + 1) * other[0], kx * other[1] : (kx + 1) * other[1]]
            found += bool(tile.any())
            # a cross asks tiles that leave the grid for a mask
            fits = isinstance(pattern, Disk) or tile.shape[2:] == other
            full += bool(tile.all()) and fits
    assert visits(pattern, grid, (1, *own), (1, *other), "aligned") == (found, full)


@pytest.mark.parametrize("radius", [2, 3.5, 30])
def test_visits_of_a_ball(radius):
    """A disk on three axes: counts against the mask, and a simulation."""
    grid, own, other, pattern = (4, 7, 6), (2, 2, 4), (1, 4, 2), Disk(radius)
    mask = pattern.mask(grid).numpy().reshape(*grid, *grid)
    found, full = 0, 0
    for at in np.ndindex(*(-(-n // o) for n, o in zip(grid, own, strict=True))):
        rows = mask[tuple(slice(a * o, a * o + o) for a, o in zip(at, own, strict=True))].reshape(-1, *grid)
        for to in np.ndindex(*(-(-n // o) for n, o in zip(grid, other, strict=True))):
            tile = rows[(slice(None), *(slice(a * o, a * o + o) for a, o in zip(to, other, strict=True)))]
            found, full = found + bool(tile.any()), full + bool(tile.all())
    assert visits(pattern, grid, own, other, "aligned") == (found, full)
    result = simulate(grid, pattern, "hunyuan-video", [(own, other)])
    assert result.rows[0].tflop >= result.ideal_tflop


@pytest.mark.parametrize(("pattern", "side"), [(Disk(16), 512), (Cross(16, 16), 256)], ids=str)
def test_the_planner_is_quick_on_new_grids(pattern, side):
    """It is asked for every new grid; all pairs of tiles of a disk took 50 ms, a cross's table 400."""
    times = []
    for height in range(side - 7, side):
        q = torch.empty((1, 512 + height * side, 24, 128), dtype=torch.bfloat16, device="meta")
        call = make_call(q, q, q, (height, side), pattern, 512)
        begin = time.perf_counter()
        planner.predict(call)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.01, times


def test_measured():
    """The rates come from these files; each row on its own is still a prediction."""
    rows = [c for path in sorted(RESULTS.glob("flux-*.csv")) for c in compare_with(path)]
    rows += [c for path in sorted(RESULTS.glob("local_attention-nvidia*.csv")) for c in compare_with(path)]
    assert len(rows) >= 10
    for c in rows:
        assert 0.85 < c.ratio < 1.15, c
    with pytest.raises(ValueError, match="is no result of"):
        compare_with(next(RESULTS.glob("halo-*.csv")))


# image queries: the rows of benchmarks/local_attention.py that ran with both kernels
KERNELS = {
    "w80-s16": ((256, 256), Neighborhood(80, 16), 0),
    "video": ((30, 48, 80), Neighborhood((18, 24, 24), (2, 8, 8)), 0),
    "hunyuan": ((33, 45, 80), Neighborhood((18, 24, 24), (2, 8, 8)), 0),
    "w80-s1": ((256, 256), Neighborhood(80), 0),
    "w48-s1": ((256, 256), Neighborhood(48), 0),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_of_the_planner(name):
    """It expects the faster of the two kernels, and its measured time."""
    (path,) = RESULTS.glob("local_attention-gluon-*.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["row"] == name and row["what"] == "image queries"]
    measured = {row["note"].partition(":")[0]: float(row["ms"]) for row in rows}
    grid, pattern, text = KERNELS[name]
    x = torch.empty(1, 1, 24, 128, device="meta", dtype=torch.bfloat16).expand(1, math.prod(grid) + text, 24, 128)
    call = make_call(x, x, x, grid, pattern, text)
    kernel = kernel_of(call)
    assert set(measured) == {"gluon", "triton"} and kernel.name == min(measured, key=measured.get)
    assert planner.predict(call)[0]["triton"] == pytest.approx(measured[kernel.name], rel=0.06)


def test_rates_of_kernels():
    """Disks, windows of full tiles and all others take the rates of their own kernels."""
    rates = RATES["h100-eager"]
    disk = rates.full, rates.masked
    assert len({disk, rates.windows, rates.others}) == 3
    for pattern, of in ((Disk(16), disk), (Neighborhood(80, 16), rates.windows), (Neighborhood(32), rates.others)):
        one, two = (
            simulate((256, 256), pattern, tiles=GNA_TILES, rates=r, raster=None).rows[0].ms
            for r in (rates, replace(rates, full=of[0], masked=of[1], windows=None))
        )
        assert one == two


@pytest.mark.parametrize("grid", [(300,), (2, 90), (90, 2)])
def test_picture_of_a_long_grid(grid):
    """Something is to be seen."""
    tile = tuple(min(n, 16) for n in grid)
    figure = visits_figure([("a disk", Disk(9), tile, tile)], grid, "tiles")
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    assert min(box.width, box.height) > 40


def test_command(tmp_path, capsys):
    out = tmp_path / "a.png"
    assert main(["simulate", "window:80:16", "--dense-steps", "9", "--picture", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ideal_sol"] == pytest.approx(3.27, abs=0.01) and len(data["pictures"]) == 2
    assert data["whole_gain"] == pytest.approx(mixed_gain(28, 9, data["best"]["speedup"]))
    assert all(Path(p).stat().st_size > 2000 for p in data["pictures"])
    assert main(["simulate", "disk:16", "--measured", str(next(RESULTS.glob("flux-*.csv")))]) == 0
    assert "predicted ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (["ring:4"], "pattern 'ring:4' is unknown"),
        (["disk:x"], "pattern 'disk:x'"),
        (["window:80", "--size", "1000"], "multiple of 16 px"),
        (["window:4x4x4", "--size", "512"], "3 entries"),
        (["disk:8", "--tiles", "8x8"], "a query tile and a key tile"),
        (["disk:8", "--tiles", "8/8"], "does not fit a grid of 2 axes"),
        (["disk:8", "--network", "flux.9"], "network='flux.9' is unknown"),
        (["disk:8", "--rates", "h900"], "rates='h900' is unknown"),
        (["disk:8", "--text", "-1"], "--text -1"),
        (["window:7.5"], "window=7.5: give whole numbers"),
        (["disk:8", "--picture", "gains.pdf"], "--picture gains.pdf: give a name that ends with .png"),
        (["disk:8", "--measured", str(Path(__file__).parents[2] / "README.md")], "is no result of benchmarks/"),
    ],
)
def test_bad_input(args, message, capsys):
    assert main(["simulate", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_patterns_as_text():
    assert parse_pattern("disk:16:4") == Disk(16, 4)
    assert parse_pattern("disk:3.5") == Disk(3.5)
    assert parse_pattern("window:18x24x24:2x8x8") == Neighborhood((18, 24, 24), (2, 8, 8))
    assert parse_pattern("window:9:1:2") == Neighborhood(9, 1, 2)
    assert parse_pattern("cross:2:3:1x2") == Cross(2, 3, (1, 2))
