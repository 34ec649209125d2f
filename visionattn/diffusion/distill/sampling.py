"""Sample pictures on the way: the teacher's row, and the student's under it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionattn._files import atomic_write

from .cache import Cache
from .config import Config, UserError, make_folder
from .flow import pack, unpack


@torch.no_grad()
def generate(
    transformer: nn.Module,
    scheduler: Any,
    prompts: dict[str, torch.Tensor],
    shape: tuple[int, int, int],
    steps: int,
    guidance: float = 3.5,
    seed: int = 0,
    scale_factor: int = 8,
) -> torch.Tensor:
    """Latents (B, C, h, w) that FLUX.1's pipeline denoises for prompt embeddings; the same noise for the same seed.

    Args:
        transformer, scheduler: of the pipeline; its encoders are not needed.
        prompts: ``encoder_hidden_states`` (B, T, D) and ``pooled_projections`` (B, P).
        shape: (C, h, w) of one picture's latents.
        steps: of denoising.
        scale_factor: pixels to one latent, as the pipeline reckons.
    """
    from diffusers import FluxPipeline

    pipe = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    pipe.vae_scale_factor = scale_factor
    pipe.set_progress_bar_config(disable=True)
    embeds, pooled = prompts["encoder_hidden_states"], prompts["pooled_projections"]
    noise = torch.randn(len(embeds), *shape, generator=torch.Generator().manual_seed(seed))
    _, h, w = shape
    out = pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=pack(noise).to(embeds.device), output_type="latent",
        height=h * scale_factor, width=w * scale_factor, num_inference_steps=steps, guidance_scale=guidance,
    ).images  # fmt: skip
    return unpack(out.float(), (h // 2, w // 2))


class Decoder:
    """Latents to pictures by the pipeline's VAE; a cache whose latents are pixels (``"pixels": true``) needs none."""

    def __init__(self, cfg: Config, cache: Cache, device: torch.device):
        self.cfg, self.cache, self.device = cfg, cache, device
        self.vae: Any = None

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) as denoised to (B, 3, H, W) in [0, 1] on the CPU. Raises UserError where no VAE loads."""
        x = latents / self.cache.scaling + self.cache.shift
        if not self.cache.about.get("pixels"):
            self.vae = self.vae or self._load()
            x = torch.cat([self.vae.decode(one[None].to(self.vae.dtype)).sample for one in x])
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return (x.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _load(self) -> Any:
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(self.cfg.model, subfolder="vae", dtype=getattr(torch, self.cfg.dtype))
        except (OSError, ValueError, RuntimeError) as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"model={self.cfg.model}: no VAE for sample pictures ({reason}); or sample_interval=0."
            ) from None
        return vae.to(self.device)


def load_scheduler(cfg: Config) -> Any:
    """The pipeline's scheduler; FLUX.1's class with its own defaults where the folder has none."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    try:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(cfg.model, subfolder="scheduler")
    except (OSError, ValueError):
        return FlowMatchEulerDiscreteScheduler()


class Sampler:
    """Writes ``samples/<update>.png`` into the run folder: the teacher's pictures above, the student's below.

    Every rank generates (shards need all of them), the first one decodes and writes.
    """

    def __init__(self, cfg: Config, cache: Cache, device: torch.device, folder: Path | None):
        self.cfg, self.cache = cfg, cache
        self.folder = None if folder is None else folder / "samples"
        self.scheduler = load_scheduler(cfg)
        self.decoder = Decoder(cfg, cache, device)
        self.teacher: torch.Tensor | None = None

    def __call__(self, distiller: Any) -> None:
        """Generates for the first ``samples`` prompts of the cache, with the noise of the run's seed."""
        samples = [self.cache.sample(i) for i in range(min(self.cfg.samples, len(self.cache)))]
        prompts = distiller.flow.prompts(samples)
        factor = int(self.cache.about.get("scale_factor", 8))
        shape = tuple(samples[0]["mean"].shape)

        def pictures(transformer: nn.Module) -> torch.Tensor:
            with distiller.autocast():
                return generate(transformer, self.scheduler, prompts, shape, self.cfg.sample_steps, self.cfg.guidance,
                                self.cfg.seed, factor)  # fmt: skip

        if self.teacher is None:
            self.teacher = pictures(distiller.pair.teacher)
        student = pictures(distiller.pair.student)
        if self.folder is not None:
            rows = torch.stack([self.decoder(self.teacher), self.decoder(student)])
            write_grid(make_folder(self.folder, "output") / f"{distiller.step:06d}.png", rows)


def write_grid(path: Path, rows: torch.Tensor) -> None:
    """Pictures (R, B, 3, H, W) in [0, 1] as one PNG of R rows, two white pixels between them."""
    from PIL import Image

    padded = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
    r, b, _, h, w = padded.shape
    sheet = padded.permute(0, 3, 1, 4, 2).reshape(r * h, b * w, 3)
    image = Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())
    atomic_write(path, lambda f: image.save(f, format="png"))
