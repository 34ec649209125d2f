"""What ``predict`` and ``maps`` share: a model with weights, images from files or samples, names of classes."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .table import positive

SAMPLES = ("china", "flower", *(f"digit-{i}" for i in range(10)))


def add_arguments(p: argparse.ArgumentParser, many: bool) -> None:
    p.add_argument("model", help="a name that timm.create_model takes, with or without a tag")
    p.add_argument("images", nargs="*" if many else "?", type=Path, metavar="IMAGE", help="a picture, or a folder")
    p.add_argument(
        "--sample", choices=SAMPLES, metavar="NAME", help="an image that comes along: china, flower, digit-7"
    )
    weights = p.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for the model")
    weights.add_argument("--random", action="store_true", help="random weights, also where others are known")
    p.add_argument("--num-classes", type=int, help="of the checkpoint; read from the file by default")
    p.add_argument("--img-size", type=positive, help="pixels of a side; the model's own by default")
    p.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one a line")
    p.add_argument("--device", default="cpu", help="cpu by default; cuda, cuda:1, mps")
    p.add_argument("--out", type=Path, default=Path("pictures"), metavar="FOLDER", help="where pictures go")
    p.add_argument("--seed", type=int, default=0, help="of random weights")


@dataclass
class Subject:
    """A model ready to look at images."""

    name: str
    model: Any
    weights: str  # in words
    data: dict[str, Any]
    device: Any
    labels: list[str] | None

    @property
    def title(self) -> str:
        return f"{self.name} ({self.weights})"

    def tensor(self, image: Any) -> Any:
        """A PIL image as the model's input (1, C, H, W)."""
        from timm.data import create_transform

        mode = "L" if self.data["input_size"][0] == 1 else "RGB"
        transform = create_transform(**self.data, is_training=False)
        return transform(image.convert(mode)).unsqueeze(0).to(self.device)

    def shown(self, x: Any) -> np.ndarray:
        """What the model was shown, (H, W, 3) in [0, 1]: resized and cropped, without the normalisation."""
        mean, std = (np.asarray(self.data[k])[:, None, None] for k in ("mean", "std"))
        image = (x[0].float().cpu().numpy() * std + mean).clip(0, 1).transpose(1, 2, 0)
        return image.repeat(3, axis=2) if image.shape[2] == 1 else image

    def label(self, index: int) -> str:
        return self.labels[index] if self.labels else f"class {index}"


def subject(args: argparse.Namespace) -> Subject:
    """Builds the model that the arguments ask for.

    Raises:
        ValueError: for names, sizes, files or devices that do not fit.
        RuntimeError: for weights that can't be loaded.
    """
    import timm
    import torch
    from timm.data import resolve_data_config

    from .models import check_name

    name = check_name(args.model)
    torch.manual_seed(args.seed)
    kwargs: dict[str, Any] = {"img_size": args.img_size} if args.img_size else {}
    words = "random weights"
    if args.checkpoint is not None:
        kwargs |= _from_file(args.checkpoint, name, args.num_classes)
        words = f"weights of {args.checkpoint.name}"
    elif args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    elif not args.random and _has_weights(name):
        kwargs["pretrained"] = True
    try:
        model = _create(timm, name, kwargs)
    except Exception as e:
        if not kwargs.get("pretrained"):
            raise
        first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise RuntimeError(f"weights of {name} can't be loaded ({first}): give --checkpoint, or --random") from e
    if kwargs.get("pretrained") and args.checkpoint is None:
        words = f"pretrained, tag {model.pretrained_cfg.get('tag') or 'default'}"
    try:
        device = torch.device(args.device)
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {args.device} can't be used: {str(e).splitlines()[0]}") from e
    data = resolve_data_config({}, model=model)
    if args.img_size:
        data["input_size"] = (data["input_size"][0], args.img_size, args.img_size)
    return Subject(name, model, words, data, device, _labels(args.labels, model))


def _create(timm: Any, name: str, kwargs: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, **kwargs)
    except TypeError:  # a model whose size is not fixed does not take one
        if "img_size" not in kwargs:
            raise
        return timm.create_model(name, **{k: v for k, v in kwargs.items() if k != "img_size"})


def _has_weights(name: str) -> bool:
    import timm

    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and any(getattr(cfg, key, None) for key in ("file", "url", "hf_hub_id", "state_dict"))


def _from_file(path: Path, name: str, classes: int | None) -> dict[str, Any]:
    """Arguments of create_model for a checkpoint; the number of classes is that of the file's classifier."""
    import timm

    from visionattn.models._checkpoint import read_state_dict, unwrap_state_dict

    if not path.is_file():
        raise ValueError(f"{path} is not a file: give the path of a checkpoint")
    cfg = timm.get_pretrained_cfg(name)
    overlay: dict[str, Any] = {"file": str(path)}
    if classes is None and cfg is not None and isinstance(cfg.classifier, str):
        weight = unwrap_state_dict(read_state_dict(path)).get(f"{cfg.classifier}.weight")
        classes = None if weight is None else weight.shape[0]
    result: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    if classes is not None:
        overlay["num_classes"] = result["num_classes"] = classes
    return result


def _labels(path: Path | None, model: Any) -> list[str] | None:
    """Names of the classes: a file's lines, the pretrained cfg's, or ImageNet's where timm knows the set."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    classes = getattr(model, "num_classes", 0)
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} holds no names: give a text file with one a line") from e
        if len(lines) != classes:
            raise ValueError(f"{path} has {len(lines)} names, the model {classes} classes: give one a line")
        return lines
    named = model.pretrained_cfg.get("label_names")
    if named and len(named) == classes:
        return list(named)
    subset = infer_imagenet_subset(model)
    if subset and classes:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i).split(",")[0] for i in range(classes)]
    return None


def read_images(args: argparse.Namespace, found: Subject) -> list[tuple[str, Any]]:
    """(name, PIL image) of what the arguments name; a sample where they name nothing.

    Raises:
        ValueError: for a path that does not exist, holds no image, or one that Pillow can't read.
    """
    given = args.images if isinstance(args.images, list) else [args.images] if args.images else []
    if given and args.sample:
        raise ValueError(f"an image and --sample {args.sample}: give one of them")
    if not given:
        digits = found.labels == [str(i) for i in range(10)]
        name = args.sample or ("digit-3" if digits else "china")
        return [(name, sample(name))]
    return [(path.stem, read_image(path)) for path in _files(given)]


def _files(given: list[Path]) -> list[Path]:
    from timm.data.readers.img_extensions import get_img_extensions

    paths = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in get_img_extensions(as_set=True))
            if not inside:
                raise ValueError(f"{path} holds no images")
            paths += inside
        else:
            paths.append(path)
    return paths


def read_image(path: Path) -> Any:
    """A PIL image, turned as its EXIF says."""
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a picture, a folder of them, or --sample")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as e:  # decoders raise anything
        raise ValueError(
            f"{path} is not an image that Pillow reads: {str(e).splitlines()[0] if str(e) else e!r}"
        ) from e


def sample(name: str) -> Any:
    """A photograph or a digit that scikit-learn carries."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    if name.startswith("digit-"):
        from visionattn.training.data import Digits

        held_out = Digits(train=False)
        return held_out[held_out.labels.index(int(name.removeprefix("digit-")))][0]
    return Image.fromarray(load_sample_image(f"{name}.jpg"))
