"""A small detection set from what installed libraries carry: photographs, cut-out objects, handwritten digits.

Nothing is downloaded and nothing is labelled by hand. Photographs of scikit-image and scikit-learn are the backgrounds;
coins, faces, a horse's silhouette (scikit-image) and digits (scikit-learn) are drawn onto them one by one, so every box
and every mask is known to the pixel. Training and validation share neither photographs nor digits, coins or faces; the
horse's outline is one, its coat differs. The result is a folder in COCO's format::

    folder/train/000000.png ...   folder/val/000000.png ...   folder/annotations/train.json, val.json
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["CATEGORIES", "make_demo_set"]

CATEGORIES: tuple[str, ...] = (*"0123456789", "coin", "face", "horse")
SIZES = ((128, 160), (160, 128), (128, 128))  # height, width
SIDES = (22, 62)  # the longer side of an object, pixels
VISIBLE = 0.8  # share of an object that others may not cover
VERSION = 1
WORTH_PROCESSES = 200  # pictures that take longer to draw than processes take to start

Cutout = tuple[np.ndarray, np.ndarray]  # colours (H, W, 3) uint8, mask (H, W) bool


def _skimage() -> Any:
    try:
        import skimage.data
        import skimage.filters
        import skimage.measure
        import skimage.morphology
        import skimage.segmentation
    except ImportError as error:
        raise ImportError(
            "the demo's photographs come with scikit-image, which is missing: pip install -e '.[detection]'"
        ) from error
    return skimage


def _rgb(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


@cache
def photographs(split: str) -> tuple[np.ndarray, ...]:
    """The backgrounds of a split, each (H, W, 3) uint8; none of them shows a human face, a coin or a digit."""
    from sklearn.datasets import load_sample_image

    data = _skimage().data
    if split == "train":
        images = [data.coffee(), data.rocket(), data.grass(), data.brick(), data.hubble_deep_field()]
        images += [data.stereo_motorcycle()[0], data.immunohistochemistry(), load_sample_image("china.jpg")]
    else:
        images = [data.chelsea(), data.gravel(), data.moon(), data.retina()[350:1050, 350:1050]]
        images += [load_sample_image("flower.jpg")]
    return tuple(_rgb(np.asarray(image)) for image in images)


@cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.arange(len(labels)) % 5 == 4
    chosen = chosen if split == "val" else ~chosen
    return images.reshape(-1, 8, 8)[chosen], labels[chosen]


@cache
def _coins(split: str) -> tuple[Cutout, ...]:
    """The coins of scikit-image's picture, cut out along their outlines."""
    sk = _skimage()
    image = sk.data.coins()
    flat = image - sk.filters.gaussian(image, 40, preserve_range=True)  # the picture is darker towards one corner
    solid = sk.morphology.closing(flat > sk.filters.threshold_otsu(flat), np.ones((5, 5), bool))
    regions = sk.measure.regionprops(sk.measure.label(sk.segmentation.clear_border(solid)))
    coins = []
    for region in regions:
        if region.area > 600 and region.solidity > 0.9:
            top, left, bottom, right = region.bbox
            coins.append((_rgb(image[top:bottom, left:right]), region.image_filled))
    chosen = [i for i in range(len(coins)) if (i % 4 == 3) == (split == "val")]
    return tuple(coins[i] for i in chosen)


@cache
def _faces(split: str) -> np.ndarray:
    faces = (_skimage().data.lfw_subset()[:100] * 255).astype(np.uint8)  # the other hundred are no faces
    return faces[80:] if split == "val" else faces[:80]


def _resized(colours: np.ndarray, mask: np.ndarray, side: float, angle: float = 0.0) -> Cutout:
    """Turned by ``angle`` degrees, cropped to the mask, its longer side ``side`` pixels."""
    image, shape = Image.fromarray(colours), Image.fromarray(mask.astype(np.uint8) * 255)
    factor = 2.0 * side / max(image.size)  # turned at a higher resolution than it is drawn
    size = tuple(max(2, round(n * factor)) for n in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    shape = shape.resize(size, Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    box = shape.point(lambda v: 255 * (v > 127)).getbbox()
    image, shape = image.crop(box), shape.crop(box)
    factor = side / max(image.size)
    size = tuple(max(2, round(n * factor)) for n in image.size)
    image, shape = image.resize(size, Image.Resampling.BOX), shape.resize(size, Image.Resampling.BOX)
    return np.asarray(image), np.asarray(shape) > 127


def _tinted(grey: np.ndarray, colour: Iterable[float]) -> np.ndarray:
    return np.clip(grey.astype(np.float64) * np.asarray(list(colour)), 0, 255).astype(np.uint8)


def _draw_digit(rng: np.random.Generator, split: str, side: float) -> tuple[int, Cutout]:
    images, labels = _digits(split)
    index = int(rng.integers(len(labels)))
    ink = Image.fromarray((images[index] * (255 / 16)).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    mask = np.asarray(ink) > 110
    colour = rng.integers(0, 256, 3)
    colour[rng.integers(3)] = rng.choice([0, 255])  # away from grey
    colours = np.broadcast_to(colour.astype(np.uint8), (64, 64, 3)).copy()
    return int(labels[index]), _resized(colours, mask, side, rng.uniform(-12, 12))


def _draw_coin(rng: np.random.Generator, split: str, side: float) -> tuple[int, Cutout]:
    coins = _coins(split)
    colours, mask = coins[int(rng.integers(len(coins)))]
    metals = ((1.1, 1.1, 1.1), (1.25, 1.0, 0.6), (1.15, 0.8, 0.6))
    colours = _tinted(colours, metals[int(rng.integers(3))])
    return CATEGORIES.index("coin"), _resized(colours, mask, side, rng.uniform(0, 360))


def _draw_face(rng: np.random.Generator, split: str, side: float) -> tuple[int, Cutout]:
    faces = _faces(split)
    face = faces[int(rng.integers(len(faces)))]
    if rng.random() < 0.5:
        face = face[:, ::-1]
    y, x = np.mgrid[-1:1:100j, -1:1:100j]
    face = np.asarray(Image.fromarray(np.ascontiguousarray(face)).resize((100, 100), Image.Resampling.BICUBIC))
    tint = (1.0, rng.uniform(0.8, 1.0), rng.uniform(0.7, 1.0))
    colours = _tinted(_rgb(face), tint)
    return CATEGORIES.index("face"), _resized(colours, (x / 0.85) ** 2 + y**2 <= 1, side, rng.uniform(-12, 12))


@cache
def _horse() -> np.ndarray:
    return ~_skimage().data.horse()[::2, ::2]


@cache
def _coats(split: str) -> tuple[np.ndarray, ...]:
    data = _skimage().data
    return (data.grass(), data.brick(), data.camera()) if split == "train" else (data.gravel(), data.camera())


def _draw_horse(rng: np.random.Generator, split: str, side: float) -> tuple[int, Cutout]:
    mask = _horse()
    if rng.random() < 0.5:
        mask = mask[:, ::-1]
    coats = _coats(split)
    coat = coats[int(rng.integers(len(coats)))]
    top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(coat.shape, mask.shape, strict=True))
    coat = _rgb(coat[top : top + mask.shape[0], left : left + mask.shape[1]])
    coat = _tinted(coat * 0.5 + 60, (rng.uniform(0.6, 1.3), rng.uniform(0.5, 1.0), rng.uniform(0.3, 0.9)))
    return CATEGORIES.index("horse"), _resized(coat, mask, max(side, 36.0), rng.uniform(-12, 12))


DRAWERS: tuple[Callable[[np.random.Generator, str, float], tuple[int, Cutout]], ...] = (
    _draw_digit, _draw_digit, _draw_digit, _draw_coin, _draw_face, _draw_horse,
)  # fmt: skip


def _background(rng: np.random.Generator, split: str, height: int, width: int) -> np.ndarray:
    images = photographs(split)
    image = images[int(rng.integers(len(images)))]
    zoom = rng.uniform(1.0, min(image.shape[0] / height, image.shape[1] / width))
    h, w = int(height * zoom), int(width * zoom)
    top, left = int(rng.integers(image.shape[0] - h + 1)), int(rng.integers(image.shape[1] - w + 1))
    crop = Image.fromarray(image[top : top + h, left : left + w]).resize((width, height), Image.Resampling.BILINEAR)
    crop = np.asarray(crop)[:, :: int(rng.choice([-1, 1]))]
    return np.clip(crop * rng.uniform(0.7, 1.1), 0, 255).astype(np.uint8)


def compose(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One picture and its objects.

    Args:
        split: ``'train'`` or ``'val'``.
        index: of the picture; the same (split, index, seed) give the same picture.

    Returns:
        The picture (H, W, 3) uint8, and a (category index, visible mask (H, W) bool) per object.
    """
    rng = np.random.default_rng((seed, index, split == "val"))
    height, width = SIZES[int(rng.integers(len(SIZES)))]
    picture = _background(rng, split, height, width)
    owner = np.full((height, width), -1)  # which object a pixel shows
    labels: list[int] = []
    sizes: list[int] = []
    for _ in range(int(rng.integers(2, 7))):
        side = float(np.exp(rng.uniform(*np.log(SIDES))))
        label, (colours, mask) = DRAWERS[int(rng.integers(len(DRAWERS)))](rng, split, side)
        h, w = mask.shape
        for _ in range(20):
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            region = owner[top : top + h, left : left + w]
            covered = np.bincount(region[mask & (region >= 0)], minlength=len(sizes))
            left_over = np.array([(owner == i).sum() for i in range(len(sizes))], dtype=np.int64) - covered
            if all(left_over >= VISIBLE * np.array(sizes)):
                region[mask] = len(sizes)
                picture[top : top + h, left : left + w][mask] = colours[mask]
                labels.append(label)
                sizes.append(int(mask.sum()))
                break
    return picture, [(label, owner == i) for i, label in enumerate(labels)]


def _annotation(mask: np.ndarray, label: int, image_id: int, number: int) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(
        id=number,
        image_id=image_id,
        category_id=label + 1,
        bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        area=int(mask.sum()),
        segmentation=dict(size=[int(n) for n in rle["size"]], counts=rle["counts"].decode()),
        iscrowd=0,
    )


def _write_picture(folder: Path, split: str, seed: int, index: int) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """Writes one picture; its height and width, and its annotations, which have no numbers yet."""
    picture, objects = compose(split, index, seed)
    Image.fromarray(picture).save(folder / split / f"{index:06d}.png")
    return picture.shape[:2], [_annotation(mask, label, index, 0) for label, mask in objects]


def _write_split(folder: Path, split: str, number: int, info: dict[str, Any], workers: int) -> None:
    (folder / split).mkdir(parents=True)
    write = partial(_write_picture, folder, split, info["seed"])
    if workers > 1 and number >= WORTH_PROCESSES:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            written = list(pool.map(write, range(number), chunksize=16))
    else:
        written = [write(index) for index in range(number)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, ((height, width), objects) in enumerate(written):
        images.append(dict(id=index, file_name=f"{index:06d}.png", height=height, width=width))
        annotations += [dict(annotation, id=len(annotations) + i) for i, annotation in enumerate(objects, 1)]
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CATEGORIES)]
    text = json.dumps(dict(info=info, images=images, annotations=annotations, categories=categories))
    (folder / "annotations" / f"{split}.json").write_text(text)


def make_demo_set(
    folder: str | os.PathLike, train: int = 1200, val: int = 100, seed: int = 0, workers: int = 1
) -> Path:
    """Writes the set, or finds it there already.

    It is made in a temporary folder beside ``folder`` and renamed, so that a killed process leaves nothing half-made
    and several processes may ask for the same set at once.

    Args:
        folder: where it goes.
        train, val: number of pictures of the splits.
        seed: other pictures for another seed.
        workers: processes that draw; more than one ask for a script whose start is guarded by ``__main__``.

    Returns:
        The folder.

    Raises:
        ValueError: for a number below 1, or a ``folder`` that holds something else.
        ImportError: without scikit-image or pycocotools (extra ``detection``).
    """
    folder = Path(folder)
    if train < 1 or val < 1:
        raise ValueError(f"make_demo_set: train={train}, val={val}: give at least one picture each")
    info = dict(description="visionattn's detection demo", version=VERSION, train=train, val=val, seed=seed)
    if _holds(folder, info):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        (made / "annotations").mkdir()
        _write_split(made, "train", train, info, workers)
        _write_split(made, "val", val, info, workers)
        made.chmod(0o755)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not _holds(folder, info):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _holds(folder: Path, info: dict[str, Any]) -> bool:
    """Whether the folder holds the set that ``info`` describes; raises for any other content."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "annotations" / "val.json").read_text())["info"]
    except (OSError, ValueError, KeyError):
        found = None
    if found != info:
        raise ValueError(f"{folder} exists and does not hold this set ({_named(info)}): remove it or name another")
    return True


def _named(info: dict[str, Any]) -> str:
    return f"{info['train']} + {info['val']} pictures, seed {info['seed']}"


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m visionattn.detection.demo_data", description="Writes the set.")
    parser.add_argument("folder", nargs="?", default="data/visionattn_demo")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (%(default)s)")
    args = parser.parse_args()
    try:
        print(make_demo_set(args.folder, args.train, args.val, args.seed, args.workers))
    except (ValueError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
