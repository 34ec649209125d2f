"""CLEAR's distillation end to end on a small FLUX transformer that is trained here, on pictures that are made here.

    python benchmarks/distill_demo.py                  # --size full: minutes on one GPU
    python benchmarks/distill_demo.py --size cpu       # what fits in some twenty minutes of one core

Stages: a small classifier of the zoo (its features measure the Frechet distance), the dense teacher (a
``FluxTransformer2DModel`` on pixels, 32 x 32 tokens at 64 px), the cache, the distillation
(``python -m visionattn.diffusion.distill``'s own classes), and the table: dense teacher, disk without training,
distilled. Each stage is kept in ``--work`` and skipped when it is there; a stopped one goes on.
"""

import argparse
import csv
import dataclasses
import platform
import re
import time
from pathlib import Path

import diffusers
import numpy as np
import timm
import torch
import torch.nn.functional as F

import visionattn  # noqa: F401  (registers the zoo)
from visionattn.diffusion import Disk, load_clear, sparsify
from visionattn.diffusion.distill import Cache, Distiller, Sampler, generate, make, write_header, write_sample
from visionattn.diffusion.distill.flow import Flow, order
from visionattn.diffusion.distill.pair import file_name
from visionattn.diffusion.distill.sampling import write_grid

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("disc", "square", "diamond", "ring", "cross")
CLASSIFIER = "test_ela"
TEXT, TEXT_DIM = 4, 32
HELD_OUT = 1_000_000  # seeds of pictures from here on are not trained on


@dataclasses.dataclass
class Size:
    """How large the demonstration is; ``tokens`` is the side of the grid, half the side of the pictures."""

    tokens: int
    heads: int
    double: int
    single: int
    pictures: int
    teacher_batch: int
    teacher_steps: int
    distil_batch: int
    distil_steps: int
    radius: int
    evaluated: int  # pictures for the loss to the teacher
    generated: int  # pictures for the Frechet distance
    sample_steps: int
    head_dim: int = 32
    lr: float = 1e-3
    flow_weight: float = 1.0  # published; 0 where a young teacher would be left behind for the pictures
    downsample: int | None = None
    warmup: int = 8  # updates of the distillation

    @property
    def pixels(self) -> int:
        return 2 * self.tokens


SIZES = {
    "full": Size(32, 8, 3, 9, 20000, 64, 12000, 64, 4000, 4, 1024, 4096, 25, warmup=200),
    "cpu": Size(32, 2, 1, 2, 2000, 4, 500, 4, 96, 8, 32, 48, 8, lr=2e-3, flow_weight=0.0),
    "smoke": Size(8, 1, 1, 2, 32, 4, 3, 4, 3, 2, 4, 8, 2),
}


# ---- pictures: a shape and its twin, mirrored at the centre, in one colour on a two-coloured slope


def picture(seed: int, size: int) -> tuple[torch.Tensor, int]:
    """(3, size, size) in [-1, 1], and its class. The twin makes far tokens matter."""
    rng = np.random.default_rng(seed)
    label = int(rng.integers(len(SHAPES)))
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    slope = (0.5 + 0.35 * (x * np.cos(angle) + y * np.sin(angle))).clamp(0, 1)
    first, second, colour = (torch.tensor(rng.uniform(-1, 1, 3), dtype=torch.float32)[:, None, None] for _ in range(3))
    image = first * slope + second * (1 - slope)
    radius, at = rng.uniform(0.2, 0.34), rng.uniform(0, 2 * np.pi)
    cx, cy = (0.52 * f(at) for f in (np.cos, np.sin))
    distance = torch.minimum(_distance(label, x - cx, y - cy, radius), _distance(label, x + cx, y + cy, radius))
    cover = (0.5 - distance * size / 4).clamp(0, 1)
    return image * (1 - cover) + colour * cover, label


def _distance(label: int, x: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """Signed distance to the shape, negative inside."""
    ax, ay = x.abs(), y.abs()
    disc = (x**2 + y**2).sqrt()
    return {
        "disc": disc - r,
        "square": torch.maximum(ax, ay) - 0.85 * r,
        "diamond": (ax + ay) / 1.414 - 0.85 * r,
        "ring": (disc - 0.8 * r).abs() - 0.25 * r,
        "cross": torch.minimum(torch.maximum(ax - r, ay - 0.3 * r), torch.maximum(ay - r, ax - 0.3 * r)),
    }[SHAPES[label]]


def pictures(first: int, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 3, size, size) pictures of consecutive seeds and their classes."""
    images, labels = zip(*(picture(first + i, size) for i in range(count)), strict=True)
    return torch.stack(images), torch.tensor(labels)


def prompt(label: int) -> dict[str, torch.Tensor]:
    """The "prompt embeddings" of a class: fixed noise."""
    generator = torch.Generator().manual_seed(label)
    embeds = torch.randn(TEXT, TEXT_DIM, generator=generator)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": torch.randn(TEXT_DIM, generator=generator)}


# ---- stages


def train_classifier(size: Size, work: Path, device: torch.device) -> torch.nn.Module:
    """A small zoo network that knows the shapes; its pooled features are what the distance is measured in."""
    torch.manual_seed(0)
    net = timm.create_model(CLASSIFIER, num_classes=len(SHAPES)).to(device)
    file = work / "classifier.pt"
    if file.is_file():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    images, labels = (t.to(device) for t in pictures(0, size.pictures, size.pixels))
    epochs = 6 if size.pictures >= 1000 else 1
    batch = min(64, len(images) // 2)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    net.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), device=device)
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    images, labels = pictures(HELD_OUT, 200, size.pixels)
    with torch.no_grad():
        right = (net(images.to(device)).argmax(1).cpu() == labels).float().mean().item()
    print(f"classifier {CLASSIFIER}: {100 * right:.1f} % of held-out pictures", flush=True)
    _save(net.state_dict(), file)
    return net


def _save(state: object, file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.rename(file)


def build_cache(size: Size, folder: Path) -> None:
    """Pixels as latents: a cache without a VAE."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache.json").is_file():
        for i in range(size.pictures):
            image, label = picture(i, size.pixels)
            write_sample(folder, i, {"mean": image, **prompt(label)}, prompt=SHAPES[label])
        write_header(folder, size.pictures, scaling=1.0, shift=0.0, pixels=True, scale_factor=1)


def new_transformer(size: Size) -> torch.nn.Module:
    d = size.head_dim
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=12, num_layers=size.double, num_single_layers=size.single, attention_head_dim=d,
        num_attention_heads=size.heads, joint_attention_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(d // 4, d * 3 // 8, d * 3 // 8), guidance_embeds=False,
    )  # fmt: skip


def train_teacher(size: Size, work: Path, cache: Cache, device: torch.device) -> None:
    """Flow matching; the average of the weights is what is kept, as ``work/model/transformer``."""
    if (work / "model" / "transformer" / "config.json").is_file():
        return
    torch.manual_seed(1)
    model = new_transformer(size).to(device).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(max(0.0, 1 - 10 / size.teacher_steps))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.01)
    warm = max(1, size.teacher_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm) * 0.5 * (1 + np.cos(np.pi * min(1, s / size.teacher_steps)))
    )
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    file, step = work / "teacher.pt", 0
    if file.is_file():
        state = torch.load(file, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step = state["step"]
    flow = Flow(model.config, 1.0, 0.0, 0.0, 1, device, torch.float32)
    places = order(1, len(cache), step * size.teacher_batch, 0, 1, size.teacher_batch)
    groups, begin, losses = [], time.monotonic(), []

    def numbers():
        for _ in range(size.teacher_steps - step):
            groups.append(next(places))
            yield [number for _, number in groups[-1]]

    for samples in cache.batches(numbers()):
        call, target = flow.batch(samples, [place for place, _ in groups.pop(0)])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.mse_loss(model(**call, return_dict=False)[0].float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        step += 1
        losses.append(loss.detach())
        if step % 50 == 0 or step == size.teacher_steps:
            mean = torch.stack(losses).mean().item()
            print(f"teacher {step}/{size.teacher_steps}  loss {mean:.4f}  {time.monotonic() - begin:.0f} s", flush=True)
            losses = []
            _save({**{n: p.state_dict() for n, p in parts.items()}, "step": step}, file)
    average.module.save_pretrained(work / "model" / "transformer")


def distil(size: Size, work: Path, device: torch.device) -> Path:
    """The package's own run; returns the file in CLEAR's layout."""
    cfg = make(dict(
        model=str(work / "model"), cache=str(work / "cache"), output=str(work / "run"), radius=size.radius,
        downsample=size.downsample,
        batch_size=size.distil_batch, steps=size.distil_steps, lr=size.lr / 2, flow_weight=size.flow_weight,
        warmup_steps=size.warmup, device=str(device), gradient_checkpointing=False,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        log_interval=max(1, size.distil_steps // 40), save_interval=max(1, size.distil_steps // 10),
        sample_interval=max(1, size.distil_steps // 3), samples=5, sample_steps=size.sample_steps,
    ))  # fmt: skip
    run = work / "run"
    if (run / "state.pt").is_file() and torch.load(run / "state.pt", weights_only=True)["step"] == cfg.steps:
        return run / file_name(cfg)
    distiller = Distiller(cfg)
    if (run / "state.pt").is_file():
        distiller.load(run / "state.pt")
    run.mkdir(exist_ok=True)
    distiller.fit(run, lambda line: print(line, flush=True), Sampler(cfg, distiller.cache, device, run))
    return run / file_name(cfg)


# ---- the table


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of features (N, D): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64."""
    a, b = a.double(), b.double()
    covariances = [torch.cov(x.T) for x in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return (mean + sum(c.trace() for c in covariances) - 2 * cross).item()


@torch.no_grad()
def features(net: torch.nn.Module, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    parts = images.split(64)
    return torch.cat([net.forward_head(net.forward_features(p.to(device)), pre_logits=True).cpu() for p in parts])


@torch.no_grad()
def predictions(model: torch.nn.Module, size: Size, device: torch.device) -> tuple[torch.Tensor, float]:
    """The model's outputs on held-out noised pictures, and its flow-matching loss there."""
    flow = Flow(model.config, 1.0, 0.0, 0.0, 2, device, torch.float32)
    outputs, losses = [], []
    for first in range(0, size.evaluated, size.teacher_batch):
        samples = []
        for i in range(first, min(first + size.teacher_batch, size.evaluated)):
            image, label = picture(HELD_OUT + i, size.pixels)
            samples.append({"mean": image, "std": None, **prompt(label)})
        call, target = flow.batch(samples, list(range(first, first + len(samples))))
        outputs.append(model(**call, return_dict=False)[0].float())
        losses.append(F.mse_loss(outputs[-1], target, reduction="none").mean((1, 2)))
    return torch.cat(outputs).cpu(), torch.cat(losses).mean().item()


def sample(model: torch.nn.Module, size: Size, device: torch.device) -> torch.Tensor:
    """``size.generated`` pictures, classes in turn, the same noise for every model."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    images = []
    for first in range(0, size.generated, 4 * size.teacher_batch):
        labels = [i % len(SHAPES) for i in range(first, min(first + 4 * size.teacher_batch, size.generated))]
        rows = [prompt(label) for label in labels]
        prompts = {
            "encoder_hidden_states": torch.stack([r["prompt_embeds"] for r in rows]).to(device),
            "pooled_projections": torch.stack([r["pooled_prompt_embeds"] for r in rows]).to(device),
        }
        shape = (3, size.pixels, size.pixels)
        images.append(generate(model, scheduler, prompts, shape, size.sample_steps, seed=first, scale_factor=1).cpu())
    return torch.cat(images).clamp(-1, 1)


def table(size: Size, work: Path, file: Path, net: torch.nn.Module, device: torch.device) -> list[dict]:
    """One row a model; the gap is what the untrained disk opens, and "recovered" the share that training closes."""
    model = diffusers.FluxTransformer2DModel.from_pretrained(work / "model" / "transformer").to(device).eval()
    real = features(net, pictures(2 * HELD_OUT, size.generated, size.pixels)[0], device)
    rows, sheets, teacher, dense = [], [], None, None
    pattern = Disk(size.radius, size.downsample)
    name = f"disk {size.radius}" + (f" and pooled {size.downsample} x {size.downsample}" if size.downsample else "")
    for label, patch in (
        ("dense teacher", None),
        (f"{name}, not trained", lambda: sparsify(model, pattern)),
        (f"{name}, distilled", lambda: load_clear(model, file)),
    ):
        begin, handle = time.monotonic(), patch() if patch else None
        found, loss = predictions(model, size, device)
        images = sample(model, size, device)
        own = features(net, images, device)
        if handle:
            assert all(r["sparse"] and not r["dense"] for r in handle.report().rows)
            handle.remove()
        teacher, dense = (found, own) if teacher is None else (teacher, dense)
        rows.append({
            "model": label, "loss_to_teacher": F.mse_loss(found, teacher).item(), "flow_loss": loss,
            "frechet_to_teacher": frechet(own, dense), "frechet_to_pictures": frechet(own, real),
        })  # fmt: skip
        sheets.append(images[:10] / 2 + 0.5)
        print(f"{label}: {rows[-1]}  {time.monotonic() - begin:.0f} s", flush=True)
    for key in ("loss_to_teacher", "flow_loss", "frechet_to_teacher", "frechet_to_pictures"):
        low, high = rows[0][key], rows[1][key]
        for row in rows:
            row[f"recovered_{key}"] = (high - row[key]) / (high - low)
    write_grid(work / "pictures.png", torch.stack(sheets).clamp(0, 1))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument(
        "--work", type=Path, default=None, help="folder of the stages (default: runs/distill_demo-SIZE)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    size, device = SIZES[args.size], torch.device(args.device)
    work = args.work or Path("runs") / f"distill_demo-{args.size}"
    work.mkdir(parents=True, exist_ok=True)
    net = train_classifier(size, work, device)
    build_cache(size, work / "cache")
    train_teacher(size, work, Cache(str(work / "cache")), device)
    file = distil(size, work, device)
    rows = table(size, work, file, net, device)
    args.out.mkdir(parents=True, exist_ok=True)
    label = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    version = torch.__version__.partition("+")[0]
    stem = f"distill_demo-{args.size}-{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}-torch{version}"
    about = {"size": args.size, **dataclasses.asdict(size), "classifier": CLASSIFIER, "device": label,
             "machine": platform.machine(), "torch": version, "diffusers": diffusers.__version__}  # fmt: skip
    with open(args.out / f"{stem}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in {**r, **about}.items()} for r in rows
        )
    (args.out / f"{stem}.png").write_bytes((work / "pictures.png").read_bytes())
    print("| | loss to the teacher | recovered | Frechet distance to the teacher's | to made pictures | recovered |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['model']} | {r['loss_to_teacher']:.4f} | {100 * r['recovered_loss_to_teacher']:.0f} % | "
              f"{r['frechet_to_teacher']:.3f} | {r['frechet_to_pictures']:.3f} | "
              f"{100 * r['recovered_frechet_to_pictures']:.0f} % |")  # fmt: skip


if __name__ == "__main__":
    main()
