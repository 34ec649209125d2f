"""CLEAR's distillation end to end on a small FLUX transformer that is trained here, on pictures that are made here.

    python benchmarks/distill_demo.py --seconds 240                  # --size full: one GPU
    python benchmarks/distill_demo.py --size cpu --seconds 600       # 8 x 8 tokens on one core

Stages: a small classifier of the zoo (its features measure the Frechet distance), the dense teacher (a
``FluxTransformer2DModel`` on pixels, 32 x 32 tokens at 64 px), the cache, the distillation
(``python -m visionattn.diffusion.distill``'s own classes), and the table: dense teacher, disk without training,
distilled. Each stage is kept in ``--work`` and skipped when it is there; a stopped one goes on. Teacher and student
train as long as their share of ``--seconds`` lasts, with learning rates that fall accordingly.
"""

import argparse
import copy
import csv
import dataclasses
import functools
import io
import math
import platform
import re
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import timm
import torch
import torch.nn.functional as F

import visionattn  # noqa: F401  (registers the zoo)
from visionattn._files import atomic_write
from visionattn.diffusion import Disk, load_clear, sparsify
from visionattn.diffusion.distill import Distiller, Sampler, generate, make, write_header, write_sample
from visionattn.diffusion.distill.flow import Flow, pack
from visionattn.diffusion.distill.pair import file_name
from visionattn.diffusion.distill.sampling import write_grid

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("disc", "square", "diamond", "ring", "cross")
CLASSIFIER = "test_ela"
TEXT_DIM = 32
HELD_OUT = 1_000_000  # seeds of pictures from here on are not trained on


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the demonstration is; ``tokens`` is the side of the grid, half the side of the pictures."""

    tokens: int
    heads: int
    head_dim: int
    double: int
    single: int
    pictures: int
    cached: int  # of them, for the distillation
    teacher_batch: int
    teacher_steps: int  # at most, as far as the time allows
    distil_batch: int
    distil_steps: int  # likewise
    radii: tuple[int, ...]
    evaluated: int  # pictures for the loss to the teacher
    generated: int  # pictures for the Frechet distance
    sample_steps: int
    lr: float = 1e-3
    distil_lr: float = 1e-3
    flow_weight: float = 1.0  # published: 1, 0.5, 0.5. Above 0 a student also leaves a young teacher for the pictures
    output_weight: float = 0.5
    attention_weight: float = 0.5
    downsample: int | None = None
    warmup: int = 50  # updates of the distillation
    name: str = ""

    @property
    def pixels(self) -> int:
        return 2 * self.tokens

    @property
    def text(self) -> int:
        """Text tokens: the share that FLUX.1 has at 1024 px, 512 beside 4,096."""
        return self.tokens**2 // 8


# without the flow-matching loss: it would pull the student off a young teacher
RECIPE = dict(flow_weight=0.0, output_weight=1.0, attention_weight=0.2)
SIZES = {
    # radius 8 of 32 tokens is CLEAR's 16 of 64 at 1024 px, 4 is its 8
    "full": Size(32, 4, 64, 2, 6, 16000, 4000, 48, 6000, 48, 6000, (8, 4), 1024, 1024, 20, distil_lr=1e-3, **RECIPE),
    "cpu": Size(8, 2, 32, 1, 5, 4000, 1000, 16, 3000, 16, 1500, (2,), 256, 256, 12, lr=2e-3, distil_lr=3e-3, **RECIPE),
    "smoke": Size(8, 1, 32, 1, 2, 32, 32, 4, 3, 4, 3, (3, 2), 4, 8, 2),
}


# ---- pictures: a shape and its twin, mirrored at the centre, in one colour on a two-coloured slope


def pictures(first: int, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 3, size, size) pictures of consecutive seeds, in [-1, 1], and their classes."""
    parts = [_drawn(range(i, min(i + 500, first + count)), size) for i in range(first, first + count, 500)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _drawn(seeds: range, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        draws.append((rng.integers(len(SHAPES)), *rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.2, 0.34),
                      *rng.uniform(-1, 1, 9)))  # fmt: skip
    numbers = torch.tensor(np.array(draws), dtype=torch.float32)[:, :, None, None]
    label, angle, at, radius = numbers[:, :4].unbind(1)
    first, second, colour = numbers[:, 4:].unflatten(1, (3, 3)).unbind(1)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    slope = (0.5 + 0.35 * (x * angle.cos() + y * angle.sin())).clamp(0, 1)[:, None]
    image = first * slope + second * (1 - slope)
    cx, cy = 0.52 * at.cos(), 0.52 * at.sin()  # the twin makes far tokens matter
    label = label.long()
    distance = torch.minimum(_distance(label, x - cx, y - cy, radius), _distance(label, x + cx, y + cy, radius))
    cover = (0.5 - distance * size / 4).clamp(0, 1)[:, None]
    return image * (1 - cover) + colour * cover, label.flatten()


def _distance(label: torch.Tensor, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance to the shapes, negative inside."""
    ax, ay = x.abs(), y.abs()
    disc = (x**2 + y**2).sqrt()
    each = (
        disc - r,
        torch.maximum(ax, ay) - 0.85 * r,
        (ax + ay) / 1.414 - 0.85 * r,
        (disc - 0.8 * r).abs() - 0.25 * r,
        torch.minimum(torch.maximum(ax - r, ay - 0.3 * r), torch.maximum(ay - r, ax - 0.3 * r)),
    )
    return torch.stack(each).gather(0, label.expand_as(disc)[None])[0]


def prompt(label: int, text: int) -> dict[str, torch.Tensor]:
    """The "prompt embeddings" of a class, ``text`` tokens: fixed noise."""
    generator = torch.Generator().manual_seed(label)
    embeds = torch.randn(text, TEXT_DIM, generator=generator)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": torch.randn(TEXT_DIM, generator=generator)}


# ---- stages


def train_classifier(
    size: Size, work: Path, images: torch.Tensor, labels: torch.Tensor, device: torch.device
) -> torch.nn.Module:
    """A small zoo network that knows the shapes; its pooled features are what the distance is measured in."""
    torch.manual_seed(0)
    net = timm.create_model(CLASSIFIER, num_classes=len(SHAPES)).to(device)
    file = work / "classifier.pt"
    if file.is_file():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    images, labels = images.to(device), labels.to(device)
    epochs = {0: 1, 1: 6}.get(size.pictures // 1000, 3)
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
    atomic_write(file, lambda f: torch.save(state, f))


def build_cache(size: Size, folder: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Pixels as latents: a cache without a VAE."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache.json").is_file():

        def write(i: int) -> None:
            label = labels[i].item()
            write_sample(folder, i, {"mean": images[i].clone(), **prompt(label, size.text)}, prompt=SHAPES[label])

        with ThreadPoolExecutor(16) as pool:  # a file waits for the disk
            list(pool.map(write, range(len(images))))
        write_header(folder, len(images), scaling=1.0, shift=0.0, pixels=True, scale_factor=1)


def new_transformer(size: Size) -> torch.nn.Module:
    d = size.head_dim
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=12, num_layers=size.double, num_single_layers=size.single, attention_head_dim=d,
        num_attention_heads=size.heads, joint_attention_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(d // 4, d * 3 // 8, d * 3 // 8), guidance_embeds=False,
    )  # fmt: skip


def train_teacher(
    size: Size, work: Path, images: torch.Tensor, labels: torch.Tensor, device: torch.device, seconds: float
) -> None:
    """Flow matching; the average of the weights is what is kept, as ``work/model/transformer``.

    The learning rate falls with the steps or with the time, whichever ends first.
    """
    if (work / "model" / "transformer" / "config.json").is_file():
        return
    torch.manual_seed(1)
    model = new_transformer(size).to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=device.type == "cuda"
    )
    parts = {"model": model, "average": average, "optimizer": optimizer}
    file, step, spent = work / "teacher.pt", 0, 0.0
    if file.is_file():
        state = torch.load(file, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, spent = state["step"], state["spent"]
    flow = Flow(model.config, 1.0, 0.0, 0.0, 1, device, torch.float32)
    clean = pack(images).to(device)
    embeds, pooled = (
        torch.stack(t).to(device) for t in zip(*(prompt(i, size.text).values() for i in range(5)), strict=True)
    )
    labels = labels.to(device)
    begin, losses, done = time.monotonic() - spent, [], 0.0
    while done < 1:
        done = max((step + 1) / size.teacher_steps, (time.monotonic() - begin) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = size.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, done)))
        draw = torch.Generator(device).manual_seed(step)
        rows = torch.randint(len(clean), (size.teacher_batch,), device=device, generator=draw)
        t = torch.rand(len(rows), device=device, generator=draw)
        noise = torch.randn(clean[rows].shape, device=device, generator=draw)
        x = (1 - t[:, None, None]) * clean[rows] + t[:, None, None] * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model(
                x, timestep=t, encoder_hidden_states=embeds[labels[rows]], pooled_projections=pooled[labels[rows]],
                **flow.ids((size.tokens, size.tokens), size.text), return_dict=False,
            )[0]  # fmt: skip
        loss = F.mse_loss(out.float(), noise - clean[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = max(1 / (step + 1), 10 / max(step + 1, 500))  # of the last tenth of the steps, roughly
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
        step += 1
        losses.append(loss.detach())
        if step % 100 == 0 or done >= 1:
            mean, spent = torch.stack(losses).mean().item(), time.monotonic() - begin
            print(f"teacher {step} of at most {size.teacher_steps}  loss {mean:.4f}  {spent:.0f} s", flush=True)
            losses = []
            if step % 500 == 0:
                _save({**{n: p.state_dict() for n, p in parts.items()}, "step": step, "spent": spent}, file)
    average.save_pretrained(work / "model" / "transformer")


def distil(size: Size, radius: int, work: Path, device: torch.device, until: float) -> tuple[Path, int]:
    """The package's own run, to end about ``until`` (monotonic); returns the file in CLEAR's layout and the updates."""
    run, plan = work / f"run-{radius}", work / f"updates-{radius}.txt"

    def config(steps: int):
        return make(dict(
            model=str(work / "model"), cache=str(work / "cache"), output=str(run), radius=radius,
            downsample=size.downsample, batch_size=size.distil_batch, steps=steps, lr=size.distil_lr,
            flow_weight=size.flow_weight, output_weight=size.output_weight, attention_weight=size.attention_weight,
            warmup_steps=min(size.warmup, steps), decay_steps=steps // 2, device=str(device),
            gradient_checkpointing=False, dtype="bfloat16" if device.type == "cuda" else "float32",
            log_interval=max(1, steps // 40), save_interval=max(1, steps // 4),
            sample_interval=max(1, steps // 5), samples=5, sample_steps=size.sample_steps,
        ))  # fmt: skip

    if not plan.is_file():  # as many updates as there is time for
        each = math.inf
        for attempt in range(3):  # the first compiles, and one may meet another program's work
            trial = Distiller(config(10))
            begin = time.monotonic()
            trial.fit(None, lambda line: None)
            if device.type == "cuda":
                torch.cuda.synchronize()
            each = min(each, (time.monotonic() - begin) / 10) if attempt else math.inf
        steps = int(0.92 * (until - time.monotonic()) / each)  # the rest is for the looks on the way
        plan.write_text(str(max(3, min(size.distil_steps, steps))))
        print(f"an update takes {1000 * each:.0f} ms: {plan.read_text()} of them", flush=True)
    cfg = config(int(plan.read_text()))
    if (run / "state.pt").is_file() and torch.load(run / "state.pt", weights_only=True)["step"] == cfg.steps:
        return run / file_name(cfg), cfg.steps
    distiller = Distiller(cfg)
    if (run / "state.pt").is_file():
        distiller.load(run / "state.pt")
    watch = Watch(Sampler(cfg, distiller.cache, device, run), size, device)
    distiller.fit(run, lambda line: print(line, flush=True), watch)
    return run / file_name(cfg), cfg.steps


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


@functools.cache
def held_out(size: Size, device: torch.device) -> list[tuple[dict, torch.Tensor]]:
    """Noised pictures that nothing was trained on, with fixed noise and times, as batches of (arguments, target)."""
    flow = Flow(types.SimpleNamespace(guidance_embeds=False), 1.0, 0.0, 0.0, 2, device, torch.float32)
    images, labels = pictures(HELD_OUT, size.evaluated, size.pixels)
    batches = []
    for places in torch.arange(size.evaluated).split(size.teacher_batch):
        samples = [{"mean": images[i], "std": None, **prompt(labels[i].item(), size.text)} for i in places.tolist()]
        batches.append(flow.batch(samples, places.tolist()))
    return batches


@torch.no_grad()
def predictions(model: torch.nn.Module, size: Size, device: torch.device, batches: int | None = None) -> torch.Tensor:
    """The model's outputs on the first batches of the held-out pictures, in float32."""
    return torch.cat([model(**call, return_dict=False)[0].float() for call, _ in held_out(size, device)[:batches]])


def sample(model: torch.nn.Module, size: Size, device: torch.device) -> torch.Tensor:
    """``size.generated`` pictures, classes in turn, the same noise for every model."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    images = []
    for first in range(0, size.generated, 4 * size.teacher_batch):
        labels = [i % len(SHAPES) for i in range(first, min(first + 4 * size.teacher_batch, size.generated))]
        rows = [prompt(label, size.text) for label in labels]
        prompts = {
            "encoder_hidden_states": torch.stack([r["prompt_embeds"] for r in rows]).to(device),
            "pooled_projections": torch.stack([r["pooled_prompt_embeds"] for r in rows]).to(device),
        }
        shape = (3, size.pixels, size.pixels)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made = generate(model, scheduler, prompts, shape, size.sample_steps, seed=first, scale_factor=1)
        images.append(made.float().cpu())
    return torch.cat(images).clamp(-1, 1)


class Watch:
    """Sample pictures of the run, and how much of the loss to the teacher is recovered on some held-out pictures."""

    def __init__(self, sampler: Sampler, size: Size, device: torch.device):
        self.sampler, self.size, self.device = sampler, size, device
        self.before: float | None = None

    def __call__(self, distiller: Distiller) -> None:
        self.sampler(distiller)
        with distiller.autocast():
            teacher, student = (
                predictions(m, self.size, self.device, 4) for m in (distiller.pair.teacher, distiller.pair.student)
            )
        loss = F.mse_loss(student, teacher).item()
        self.before = loss if distiller.step == 0 else self.before  # none in a run that is gone on with
        share = "" if self.before is None else f", recovered {100 * (1 - loss / self.before):.1f} %"
        print(f"update {distiller.step}: held-out loss to the teacher {loss:.5f}{share}", flush=True)


class Table:
    """One row a model; the gap is what an untrained disk opens, and "recovered" the share that training closes.

    Written after each row, with the pictures.
    """

    KEYS = ("loss_to_teacher", "flow_loss", "frechet_to_teacher", "frechet_to_pictures")

    def __init__(self, size: Size, work: Path, out: Path, net: torch.nn.Module, device: torch.device):
        self.size, self.net, self.device = size, net, device
        transformer = work / "model" / "transformer"
        self.model = diffusers.FluxTransformer2DModel.from_pretrained(transformer).to(device).eval()
        self.real = features(net, pictures(2 * HELD_OUT, size.generated, size.pixels)[0], device)
        self.rows: list[dict] = []
        self.sheets: list[torch.Tensor] = []
        label = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        version = torch.__version__.partition("+")[0]
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
        self.stem = out / f"distill_demo-{size.name}-{slug}-torch{version}"
        self.about = {**dataclasses.asdict(size), "classifier": CLASSIFIER, "device": label,
                      "machine": platform.machine(), "torch": version, "diffusers": diffusers.__version__}  # fmt: skip
        self.about["radii"] = " ".join(map(str, size.radii))
        self.add("dense teacher", None, None)

    def untrained(self, radius: int) -> None:
        """The row that opens the gap of a radius."""
        pattern = Disk(radius, self.size.downsample)
        self.add(f"{self.name(radius)}, not trained", radius, lambda: sparsify(self.model, pattern))

    def distilled(self, radius: int, file: Path, updates: int) -> None:
        """The row of the weights in ``file``, after the untrained one."""
        self.add(f"{self.name(radius)}, distilled", radius, lambda: load_clear(self.model, file), updates)

    def name(self, radius: int) -> str:
        f = self.size.downsample
        return f"disk {radius}" + (f" and pooled {f} x {f}" if f else "")

    def add(self, label: str, radius: int | None, patch: Callable[[], Any] | None, updates: int = 0) -> None:
        size, device = self.size, self.device
        begin, handle = time.monotonic(), patch() if patch else None
        found = predictions(self.model, size, device)
        target = torch.cat([t for _, t in held_out(size, device)])
        images = sample(self.model, size, device)
        own = features(self.net, images, device)
        if handle:
            assert all(r["sparse"] and not r["dense"] for r in handle.report().rows)
            handle.remove()
        if not self.rows:
            self.teacher, self.dense = found, own
        row = {
            "model": label, "radius": radius, "updates": updates,
            "loss_to_teacher": F.mse_loss(found, self.teacher).item(), "flow_loss": F.mse_loss(found, target).item(),
            "frechet_to_teacher": frechet(own, self.dense), "frechet_to_pictures": frechet(own, self.real),
        }  # fmt: skip
        self.rows.append(row)
        self.sheets.append(images[:10] / 2 + 0.5)
        self.seconds = time.monotonic() - begin  # the last row's, with its kernels compiled
        print(f"{label}: {row}  {self.seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        gaps = {row["radius"]: row for row in reversed(self.rows[1:])}  # the untrained row is a radius' first
        for key in self.KEYS:
            for row in self.rows[1:]:
                low, high = self.rows[0][key], gaps[row["radius"]][key]
                row[f"recovered_{key}"] = (high - row[key]) / (high - low)
            self.rows[0][f"recovered_{key}"] = 1.0
        text = io.StringIO()
        writer = csv.DictWriter(text, [*self.rows[-1], *self.about], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            numbers = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in {**row, **self.about}.items()}
            writer.writerow(numbers)
        atomic_write(Path(f"{self.stem}.csv"), text.getvalue())
        write_grid(Path(f"{self.stem}.png"), torch.stack(self.sheets).clamp(0, 1))

    def show(self) -> None:
        print("| | updates | loss to the teacher | recovered | Frechet distance to it | recovered | to made pictures |")
        print("|---|---|---|---|---|---|---|")
        for r in self.rows:
            loss, distance = (100 * r[f"recovered_{k}"] for k in ("loss_to_teacher", "frechet_to_teacher"))
            print(f"| {r['model']} | {r['updates']} | {r['loss_to_teacher']:.5f} | {loss:.1f} % | "
                  f"{r['frechet_to_teacher']:.3f} | {distance:.1f} % | {r['frechet_to_pictures']:.3f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument(
        "--work", type=Path, default=None, help="folder of the stages (default: runs/distill_demo-SIZE)"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="about, for everything on one GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("flow-weight", "output-weight", "attention-weight", "distil-lr", "lr"):
        parser.add_argument(f"--{name}", type=float, help="instead of the size's own")
    parser.add_argument("--radii", type=int, nargs="+", help="one distillation each; default: the size's own")
    for name in ("downsample", "teacher-batch", "distil-batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the size's own")
    parser.add_argument("--teacher-share", type=float, default=0.28, help="of --seconds, for the dense teacher")
    parser.add_argument(
        "--sdpa", choices=["flash", "efficient"], default="flash", help="PyTorch's attention on a GPU: if one fails"
    )
    args = parser.parse_args()
    size, device = dataclasses.replace(SIZES[args.size], name=args.size), torch.device(args.device)
    work = args.work or Path("runs") / f"distill_demo-{args.size}"
    work.mkdir(parents=True, exist_ok=True)
    for name in (
        "flow_weight", "output_weight", "attention_weight", "distil_lr", "lr", "downsample", "teacher_batch",
        "distil_batch",
    ):  # fmt: skip
        if getattr(args, name) is not None:
            size = dataclasses.replace(size, **{name: getattr(args, name)})
    torch.set_float32_matmul_precision("high")
    # torch 2.11's cuDNN attention fails in some backward passes (docs/gpu-tests.md), and the teacher's failed too
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(args.sdpa == "flash")
    begin = time.monotonic()
    images, labels = pictures(0, size.pictures, size.pixels)
    net = train_classifier(size, work, images, labels, device)
    build_cache(size, work / "cache", images[: size.cached], labels[: size.cached])
    print(f"pictures, classifier and cache: {time.monotonic() - begin:.0f} s", flush=True)
    train_teacher(size, work, images, labels, device, args.teacher_share * args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(size, work, args.out, net, device)
    radii = list(args.radii or size.radii)
    for radius in radii:
        table.untrained(radius)
    end = begin + 0.95 * args.seconds - table.seconds * len(radii)
    for i, radius in enumerate(radii):
        share = max((end - time.monotonic()) / (len(radii) - i), 0.15 * args.seconds)
        file, updates = distil(size, radius, work, device, time.monotonic() + share)
        table.distilled(radius, file, updates)
    table.show()
    print(f"written to {table.stem}.csv and .png; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
