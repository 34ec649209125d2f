"""Data sets, the order of their samples, and the loaders.

Every random draw of an augmentation comes from a seed that is a function of (run seed, epoch, place in the epoch) and
of nothing else. So the images of a step do not depend on the number of workers, nor on whether the run was interrupted
before it, and the sampler's position is one number.
"""

import contextlib
import copy
import itertools
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision import transforms

from .config import Config, UserError, nearest

PREFIXES = ("wds", "hfds", "hfids", "tfds", "torch")
NAMES = ("", "folder", "tar", "digits", "synthetic")
SYNONYMS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval", "evaluation")}
MAX_CORRUPT = 0.01  # share of unreadable images that ends a run


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey: of each class every fifth image is held out.

    Items are (PIL image, label); ``transform`` is left to :class:`Samples`.
    """

    classes = tuple(str(i) for i in range(10))

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits  # a second to import: only where it is used

        images, labels = load_digits(return_X_y=True)
        rank_in_class = np.zeros(len(labels), dtype=int)
        for c in range(10):
            rank_in_class[labels == c] = np.arange((labels == c).sum())
        chosen = (rank_in_class % 5 != 0) if train else (rank_in_class % 5 == 0)
        self.images = (images[chosen].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.labels = labels[chosen].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators at ``seed``; in the training process, as they were afterwards."""
    if seed is None:
        yield
        return
    keep = get_worker_info() is None
    state = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if keep else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's generator as well
    try:
        yield
    finally:
        if state:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])


class Samples(Dataset):
    """A map-style data set as the loaders read it: transform, seeds, and unreadable images replaced and noted.

    Items are asked for by index, or by (index, seed). ``corrupt`` is shared with the worker processes: one flag an
    image, so that an image met in each epoch counts once.
    """

    def __init__(self, dataset: Dataset, mode: str, transform: Any = None):
        self.dataset, self.mode, self.transform = dataset, mode, transform
        self.corrupt = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def _load(self, index: int) -> tuple[Image.Image, Any]:
        if isinstance(self.dataset, timm.data.ImageDataset):  # its own retry would hide what it skipped
            file, target, *_ = self.dataset.reader[index]
            with contextlib.closing(file) if hasattr(file, "close") else contextlib.nullcontext():
                return Image.open(file).convert(self.mode), -1 if target is None else target
        image, target = self.dataset[index]
        return image.convert(self.mode), target

    def _load_or_next(self, index: int) -> tuple[Image.Image, Any]:
        for i in range(len(self)):
            candidate = (index + i) % len(self)
            try:
                return self._load(candidate)
            except Exception:  # decoders raise anything: OSError, SyntaxError, zlib.error ..
                self.corrupt[candidate] = 1
                if self.corrupt.sum() > MAX_CORRUPT * len(self):
                    break
        raise UserError(corrupt_message(self))

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, Any]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, target = self._load_or_next(index)
        with _seeded(seed):
            return self.transform(image), target

    def name(self, index: int) -> str:
        """The file behind an index, where there is one."""
        try:
            return self.dataset.filename(index, absolute=True)
        except Exception:  # data sets without files
            return f"image {index}"


def corrupt_message(samples: Samples) -> str:
    """The line that reports unreadable images: how many, and the first few paths."""
    bad = samples.corrupt.nonzero().flatten().tolist()
    names = ", ".join(samples.name(i) for i in bad[:3]) + (" .." if len(bad) > 3 else "")
    limit = f"at most {MAX_CORRUPT:.0%} may be"
    return f"{len(bad)} of {len(samples)} images can't be read ({limit}; others took their place): {names}"


class EpochSampler(Sampler):
    """The order of an epoch: yields (index, seed) for this rank, from batch ``start`` on.

    All ranks draw the same permutation; place p of it goes to rank p % world_size, so a step over 2 ranks sees the
    images that one rank with twice the batch would see. With ``repeats`` each image stands ``repeats`` times in a row
    (its copies go to different ranks) and the epoch keeps its length.
    """

    def __init__(self, n: int, cfg: Config, rank: int = 0, world_size: int = 1):
        self.n, self.seed, self.repeats, self.batch_size = n, cfg.seed, cfg.aug_repeats, cfg.batch_size
        self.rank, self.world_size = rank, world_size
        self.batches = n // (cfg.batch_size * world_size)
        self.epoch = self.start = 0
        if not self.batches:
            raise UserError(f"batch_size={cfg.batch_size} on {world_size} rank(s) exceeds the {n} training images.")

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.batches - self.start) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(mix_seed(self.seed, self.epoch, -1)))
        order = order.repeat_interleave(self.repeats).tolist()
        first = self.start * self.batch_size * self.world_size + self.rank
        for place in range(first, self.batches * self.batch_size * self.world_size, self.world_size):
            yield order[place], mix_seed(self.seed, self.epoch, place)


def mix_seed(seed: int, epoch: int, place: int) -> int:
    """A 63-bit seed out of three numbers."""
    return (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xBF58476D1CE4E5B9 + (place + 2) * 0x94D049BB133111EB) % (2**63)


class SyntheticLoader:
    """One batch of noise that already lies on the device, again and again: measures the loop, not the disk."""

    def __init__(self, cfg: Config, data: dict[str, Any], classes: int, world: int, device: torch.device):
        g = torch.Generator(device).manual_seed(0)
        self.batches = max(1, cfg.synthetic_images // (cfg.batch_size * world))
        self.x = torch.randn(cfg.batch_size, *data["input_size"], device=device, generator=g)
        self.y = torch.randint(classes, (cfg.batch_size,), device=device, generator=g)
        self.in_place = bool(cfg.mixup or cfg.cutmix or cfg.random_erasing)  # these write into their input

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches ``start`` .. of any epoch."""
        return ((self.x.clone() if self.in_place else self.x, self.y) for _ in range(start, self.batches))


def _split_root(cfg: Config, split: str) -> str:
    """``data_dir`` or the .tar in it that holds the split. Raises UserError where nothing does."""
    root = Path(cfg.data_dir)
    if not root.exists():
        given = f"data_dir={cfg.data_dir}" if cfg.data_dir else "no data_dir"
        raise UserError(f"{given}: no such folder. Give --data-dir the folder that holds the data set.")
    names = SYNONYMS.get(split, (split,))
    for name in names:
        if (root / f"{name}.tar").is_file():
            return str(root / f"{name}.tar")
    if root.is_dir() and not any((root / n).is_dir() for n in names):
        raise UserError(f"data_dir={root} has no folder (nor .tar) of the split '{split}': looked for "
                        f"{', '.join(names)}. Name it with --train-split or --val-split.")  # fmt: skip
    return str(root)


def _check_folder(dataset: Any, split: str) -> None:
    """Every folder without subfolders is a class, and must hold images. Raises UserError."""
    root = Path(dataset.reader.root)
    if not root.is_dir():
        return
    filled = {Path(path).parent for path, _ in dataset.reader.samples}
    for folder in root.rglob("*"):
        if folder.is_dir() and folder not in filled and not any(f.is_dir() for f in folder.iterdir()):
            raise UserError(f"class folder {folder} of the split '{split}' is empty. Put images in it "
                            f"({', '.join(sorted(get_img_extensions()))}), or remove it.")  # fmt: skip


def _open(cfg: Config, split: str, training: bool, mode: str) -> Any:
    if cfg.dataset == "digits":
        return Digits(training)
    prefix = cfg.dataset.split("/")[0].lower() if "/" in cfg.dataset else cfg.dataset
    if prefix not in (NAMES if prefix == cfg.dataset else PREFIXES):
        known = [n for n in NAMES if n] + [p + "/" for p in PREFIXES]
        raise UserError(f"dataset={cfg.dataset!r} is unknown; one of {', '.join(known)}.{nearest(prefix, known)}")
    folder = prefix in NAMES
    root = _split_root(cfg, split) if folder else cfg.data_dir or None
    try:
        dataset = timm.data.create_dataset(
            "" if folder else cfg.dataset, root=root, split=split, class_map=cfg.class_map or None,
            is_training=training, batch_size=cfg.batch_size, seed=cfg.seed, input_img_mode=mode, **cfg.data_kwargs,
        )  # fmt: skip
    except Exception as e:  # whatever the reader behind timm raises: the user named its data
        raise UserError(f"can't open dataset={cfg.dataset!r} split={split!r} in {root}: "
                        f"{type(e).__name__}: {' '.join(str(e).split())}") from None  # fmt: skip
    if folder and hasattr(dataset.reader, "root"):
        _check_folder(dataset, split)
    return dataset


def class_names(dataset: Any) -> Any:
    """The classes a data set knows of (a dict or a sequence), or None."""
    reader = getattr(dataset, "reader", None)
    by_name = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folders, archives
    return by_name or getattr(dataset, "classes", None)


def open_datasets(cfg: Config, mode: str, validate: bool = False) -> tuple[Any, Any, int | None]:
    """(training set, evaluation set, number of classes or None). Raises UserError for anything wrong with them.

    ``mode`` is PIL's: 'L' or 'RGB'. In validation mode the training set is None.
    """
    if cfg.dataset == "synthetic":
        return None, None, cfg.num_classes
    val = _open(cfg, cfg.val_split, False, mode)
    train = None if validate else _open(cfg, cfg.train_split, True, mode)
    classes, val_classes = class_names(train or val), class_names(val)
    if classes != val_classes:
        odd = sorted(set(classes or ()) ^ set(val_classes or ()))
        raise UserError(f"the splits '{cfg.train_split}' and '{cfg.val_split}' have different classes: {odd[:5]} "
                        "stand in one of them only.")  # fmt: skip
    count = len(classes) if classes else None
    if count and cfg.num_classes and cfg.num_classes != count and not cfg.class_map:
        raise UserError(f"num_classes={cfg.num_classes}, but the data set has {count} classes. Leave num_classes out, "
                        "or give --class-map if the images are part of a larger set of classes.")  # fmt: skip
    return train, val, cfg.num_classes or count


def _train_transform(cfg: Config, data: dict[str, Any]) -> Any:
    try:
        crop, augment, final = timm.data.create_transform(
            data["input_size"], is_training=True, use_prefetcher=True, separate=True,
            train_crop_mode=None if cfg.crop_mode == "pad" else cfg.crop_mode, scale=cfg.scale, ratio=cfg.ratio,
            hflip=cfg.hflip, vflip=cfg.vflip, color_jitter=cfg.color_jitter or None,
            auto_augment=cfg.auto_augment or None, interpolation=data["interpolation"], mean=data["mean"],
        )  # fmt: skip
    except (AssertionError, ValueError, IndexError, KeyError) as e:
        raise UserError(f"the training transform refuses its options (auto_augment={cfg.auto_augment!r}, "
                        f"interpolation={data['interpolation']!r}): {type(e).__name__} {e}") from None  # fmt: skip
    if cfg.crop_mode == "pad":  # the CIFAR recipe: all of the image, shifted by up to crop_pad
        size = data["input_size"][-2:]
        crop.transforms[0] = transforms.Compose(
            [transforms.Resize(size), transforms.RandomCrop(size, padding=cfg.crop_pad)]
        )
    return transforms.Compose([crop, augment, final])


def _init_worker(worker_id: int) -> None:
    # A signal to the process group must reach the main process alone: it saves, then ends the workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    np.random.seed(get_worker_info().seed % 2**32)


class _SeededTransform:
    """The transform of a stream: seeded by epoch, reader and count, so that what a resume reads again is the same."""

    def __init__(self, transform: Any, seed: int, rank: int):
        self.transform, self.seed, self.rank = transform, seed, rank
        self.epoch = self.count = 0

    def __call__(self, image: Image.Image) -> Any:
        info = get_worker_info()
        reader = self.rank * 1024 + (info.id if info else 0)
        self.count += 1
        with _seeded(mix_seed(self.seed, self.epoch, self.count * 2**24 + reader)):
            return self.transform(image)


class TrainLoader:
    """Batches of one epoch at a time, from any batch on: ``for x, y in loader.epoch(3, start=10)``."""

    def __init__(self, dataset: Any, cfg: Config, data: dict[str, Any], mode: str, rank: int, world: int, device: Any):
        self.cfg, self.data, self.device, self.samples = cfg, data, device, None
        self.dataset = dataset
        if isinstance(dataset, IterableDataset):
            dataset.transform = _SeededTransform(_train_transform(cfg, data), cfg.seed, rank)
            if hasattr(dataset, "set_loader_cfg"):
                dataset.set_loader_cfg(num_workers=cfg.workers)
            self.batches = len(dataset) // cfg.batch_size
        else:
            self.dataset = self.samples = Samples(dataset, mode, _train_transform(cfg, data))
            self.sampler = EpochSampler(len(dataset), cfg, rank, world)
            self.batches = self.sampler.batches
            self.loader = self._loader(self.dataset, sampler=self.sampler, persistent_workers=cfg.workers > 0)

    def _loader(self, dataset: Any, **kwargs: Any) -> PrefetchLoader:
        loader = DataLoader(
            dataset, batch_size=self.cfg.batch_size, num_workers=self.cfg.workers, drop_last=True,
            collate_fn=fast_collate, pin_memory=self.device.type == "cuda", worker_init_fn=_init_worker,
            generator=torch.Generator(), **kwargs,
        )  # fmt: skip
        # random erasing is the loop's: the prefetcher draws a batch ahead, which no resume could repeat
        return prefetch(loader, self.data, self.device)

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches ``start`` .. of an epoch, normalised, on the device."""
        if self.samples is not None:
            self.sampler.set_epoch(epoch, start)
            yield from self.loader
            return
        # A stream can't be entered in the middle: read and drop. A fresh reader with a seed of the epoch's own reads
        # the same order again. Workers are fresh, seeded by the loader; the loop needs a copy that has not read yet.
        seed = mix_seed(self.cfg.seed, epoch, -1)
        self.dataset.set_epoch(epoch)
        self.dataset.transform.epoch, self.dataset.transform.count = epoch, 0
        dataset = copy.copy(self.dataset)
        dataset.reader = copy.copy(dataset.reader)
        dataset.reader.worker_seed = seed
        loader = self._loader(dataset)
        loader.loader.generator.manual_seed(seed)
        yield from itertools.islice(loader, start, self.batches)


def prefetch(loader: DataLoader, data: dict[str, Any], device: torch.device) -> PrefetchLoader:
    """Copies batches to the device ahead of time on a side stream, and normalises them there."""
    return PrefetchLoader(loader, mean=data["mean"], std=data["std"], channels=data["input_size"][0], device=device)


def eval_loader(dataset: Any, cfg: Config, data: dict[str, Any], mode: str, rank: int, world: int, device: Any) -> Any:
    """The evaluation set in order, with the model's own evaluation transform; ranks take turns."""
    transform = timm.data.create_transform(is_training=False, use_prefetcher=True, **data)
    stream = isinstance(dataset, IterableDataset)
    if stream:
        dataset.transform = transform
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=cfg.workers)
    else:
        dataset = Samples(dataset, mode, transform)
    loader = DataLoader(
        dataset, batch_size=cfg.val_batch_size or cfg.batch_size, num_workers=cfg.workers, collate_fn=fast_collate,
        sampler=None if stream else OrderedDistributedSampler(dataset, world, rank), worker_init_fn=_init_worker,
        pin_memory=device.type == "cuda", persistent_workers=cfg.workers > 0, generator=torch.Generator(),
    )  # fmt: skip
    return prefetch(loader, data, device)
