"""The cache: VAE statistics and prompt embeddings of pictures, computed once, so that training needs neither network.

A folder of ``cache.json`` (what all samples share) and one ``<number>.safetensors`` a picture:

- ``mean``, ``std`` (C, h, w): the VAE's posterior, as the VAE gives it (unscaled); ``std`` may be left out;
- ``prompt_embeds`` (T, D) and ``pooled_prompt_embeds`` (P,): the text encoders' outputs.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from visionattn._files import atomic_write

from .config import Config, RunError, UserError, make_folder

FORMAT = 1
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_items(source: str) -> list[tuple[Path, str]]:
    """(picture, prompt) pairs of a folder or a list.

    A folder holds pictures with a ``.txt`` (the prompt) or ``.json`` (its ``prompt``) of the same name beside them. A
    ``.jsonl`` list has objects, a ``.csv`` list columns, called ``image`` and ``prompt``; its paths are relative to it.

    Raises:
        UserError: for what is not there, or a picture without a prompt.
    """
    path = Path(source)
    if path.is_dir():
        items = [(p, _prompt_beside(p)) for p in sorted(path.rglob("*")) if p.suffix.lower() in PICTURES]
    elif path.is_file() and path.suffix in (".jsonl", ".csv"):
        items = [(path.parent / image, prompt) for image, prompt in _rows(path)]
    else:
        raise UserError(f"images={source!r} is neither a folder of pictures nor a .jsonl or .csv list.")
    if not items:
        raise UserError(f"images={source} holds no pictures ({', '.join(PICTURES)}).")
    lacking = [p for p, _ in items if not p.is_file()]
    if lacking:
        raise UserError(f"{len(lacking)} of {len(items)} pictures in {source} do not exist, {lacking[0]} for one.")
    return items


def _prompt_beside(picture: Path) -> str:
    text, data = picture.with_suffix(".txt"), picture.with_suffix(".json")
    try:
        if text.is_file():
            return text.read_text(encoding="utf-8").strip()
        if data.is_file():
            return str(json.loads(data.read_text(encoding="utf-8"))["prompt"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"the prompt beside {picture} can't be read: text in UTF-8, or JSON with 'prompt'.") from None
    raise UserError(f"{picture} has no prompt: write it to {text.name} beside it.")


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as f:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(f))
            else:
                rows = [json.loads(line) for line in f if line.strip()]
        return [(str(row["image"]), str(row["prompt"])) for row in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is no list of image and prompt ({type(e).__name__}: {e}).") from None


def write_header(folder: Path, count: int, **about: Any) -> None:
    """``cache.json``: the number of samples, and what they share.

    Args:
        folder: of the cache.
        count: samples that the cache is to have.
        about: at least ``scaling`` and ``shift`` of the latents: (latent - shift) * scaling is what is denoised.
    """
    text = json.dumps({"format": FORMAT, "count": count, **about}, indent=2) + "\n"
    atomic_write(folder / "cache.json", text)


def write_sample(folder: Path, number: int, tensors: dict[str, torch.Tensor], **about: str) -> None:
    """One sample's file, whole or not at all."""
    from safetensors.torch import save

    blob = save({k: v.contiguous() for k, v in tensors.items()}, {k: str(v) for k, v in about.items()})
    atomic_write(_file(folder, number), blob)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _is_done(file: Path, about: dict[str, str]) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            return (f.metadata() or {}) == about
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def build(cfg: Config, rank: int = 0, size: int = 1) -> int:
    """Fills ``cfg.cache`` from ``cfg.images`` with the encoders of the pipeline ``cfg.model``; goes on after a stop.

    Pictures are cropped around the centre to the aspect of ``height`` x ``width`` and resized. Several processes
    (torchrun) share the pictures.

    Returns:
        The number of samples that this process wrote.

    Raises:
        UserError: for pictures, prompts or a pipeline that can't be read.
    """
    items = read_items(cfg.images)
    folder = make_folder(cfg.cache, "cache")
    pipe = _encoders(cfg)
    step = pipe.vae_scale_factor * 2
    if cfg.height % step or cfg.width % step:
        raise UserError(f"{cfg.height} x {cfg.width} pixels: give multiples of {step}.")
    header = {"model": str(cfg.model), "height": cfg.height, "width": cfg.width, "scale_factor": pipe.vae_scale_factor,
              "scaling": pipe.vae.config.scaling_factor, "shift": pipe.vae.config.shift_factor or 0.0,
              "max_sequence_length": cfg.max_sequence_length}  # fmt: skip
    if rank == 0:
        write_header(folder, len(items), **header)
    written = 0
    for number in range(rank, len(items), size):
        picture, prompt = items[number]
        about = {"image": picture.name, "prompt": prompt, **{k: str(v) for k, v in header.items()}}
        if _is_done(_file(folder, number), about):
            continue
        write_sample(folder, number, _encode(pipe, picture, prompt, cfg), **about)
        written += 1
        if rank == 0 and (written % 50 == 0 or number + size >= len(items)):
            print(f"cached {number + 1} of {len(items)} pictures", flush=True)
    return written


def _encoders(cfg: Config) -> Any:
    """The pipeline without its transformer."""
    from diffusers import FluxPipeline

    device = cfg.device
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        pipe = FluxPipeline.from_pretrained(cfg.model, transformer=None, dtype=getattr(torch, cfg.dtype))
        return pipe.to(device)
    except (OSError, ValueError, RuntimeError, TypeError) as e:
        raise UserError(f"model={cfg.model}: no FLUX.1 pipeline can be loaded ({_line(e)}).") from None


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]


def _encode(pipe: Any, picture: Path, prompt: str, cfg: Config) -> dict[str, torch.Tensor]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(picture) as image:
            image = ImageOps.fit(image.convert("RGB"), (cfg.width, cfg.height), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError, ValueError) as e:
        raise UserError(f"{picture} can't be read as a picture ({_line(e)}).") from None
    pixels = pipe.image_processor.preprocess(image, cfg.height, cfg.width).to(pipe.vae.device, pipe.vae.dtype)
    posterior = pipe.vae.encode(pixels).latent_dist
    embeds, pooled, _ = pipe.encode_prompt(
        prompt, None, device=pipe.vae.device, max_sequence_length=cfg.max_sequence_length
    )
    tensors = {"mean": posterior.mean[0], "std": posterior.std[0], "prompt_embeds": embeds[0]}
    return {k: v.cpu() for k, v in {**tensors, "pooled_prompt_embeds": pooled[0]}.items()}


class Cache:
    """A whole cache, read sample by sample.

    Raises:
        UserError: for a folder that is none, or one that :func:`build` has not finished.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        try:
            self.about = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
            self.count = int(self.about["count"])
            self.scaling, self.shift = float(self.about["scaling"]), float(self.about["shift"])
        except FileNotFoundError:
            raise UserError(f"cache={folder} has no cache.json: fill it with --build-cache.") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.folder / 'cache.json'} is damaged: run --build-cache again.") from None
        there = sum(_file(self.folder, i).is_file() for i in range(self.count))
        if there < self.count or not self.count:
            raise UserError(f"cache={folder} holds {there} of {self.count} samples: run --build-cache to its end.")

    def __len__(self) -> int:
        return self.count

    def sample(self, number: int) -> dict[str, torch.Tensor]:
        """Sample ``number``: latents' mean and std (C, h, w), prompt embeddings. Raises RunError for a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = _file(self.folder, number)
        try:
            sample = load_file(file)
            return {k: sample[k] for k in ("mean", "prompt_embeds", "pooled_prompt_embeds")} | {
                "std": sample.get("std")
            }
        except (OSError, SafetensorError, KeyError) as e:
            raise RunError(f"{file} is damaged ({type(e).__name__}): delete it and run --build-cache again.") from None

    def batches(self, groups: Iterator[list[int]]) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Samples of each group of numbers, the next group read while this one is worked on."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for group in groups:
                coming = pool.submit(lambda g=group: [self.sample(i) for i in g])
                if ahead is not None:
                    yield ahead.result()
                ahead = coming
            if ahead is not None:
                yield ahead.result()
