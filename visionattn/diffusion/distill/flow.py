"""FLUX.1's flow matching: packed latents, noise of a numbered sample, the transformer's arguments.

Everything random about a sample follows from the seed and its number in the run alone. So a resumed run, and one on
another number of ranks, sees the same samples, noise and timesteps.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .config import UserError


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, 2 h, 2 w) latents as (B, h * w, 4 C) tokens of 2 x 2 positions, FLUX.1's order."""
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // 2, 2, w // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of :func:`pack` for a ``grid`` of (h, w) tokens."""
    b, _, c = tokens.shape
    h, w = grid
    x = tokens.reshape(b, h, w, c // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def image_ids(grid: tuple[int, int]) -> torch.Tensor:
    """Position ids (h * w, 3) of a grid: 0, row, column."""
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, cols], dim=-1).reshape(-1, 3).float()


def _words(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def order(seed: int, count: int, first: int, rank: int, size: int, batch: int) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (place in the run, sample number), from place ``first`` on.

    Ranks take consecutive batches, so ``size`` ranks see in one batch what one rank sees in ``size`` batches.
    """
    epoch, permutation = -1, None
    while True:
        group = []
        for place in range(first + rank * batch, first + (rank + 1) * batch):
            if place // count != epoch:
                epoch = place // count
                generator = torch.Generator().manual_seed(_words(seed, 0, epoch))
                permutation = torch.randperm(count, generator=generator).tolist()
            group.append((place, permutation[place % count]))
        yield group
        first += size * batch


class Flow:
    """Batches for one transformer: noised tokens, the arguments of a call, the target.

    Args:
        config: the transformer's.
        scaling, shift: of the latents: (latent - shift) * scaling is what is denoised.
        guidance: told to transformers that are guidance-distilled.
        seed: of noise and timesteps.
        device: of the batches; tokens are float32.
        dtype: of the prompts' embeddings.
    """

    def __init__(self, config: Any, scaling: float, shift: float, guidance: float, seed: int, device, dtype):
        self.scaling, self.shift = scaling, shift
        self.guidance = guidance if config.guidance_embeds else None
        self.seed, self.device, self.dtype = seed, device, dtype
        self._ids: dict[tuple, torch.Tensor] = {}

    def ids(self, grid: tuple[int, int], text: int) -> dict[str, torch.Tensor]:
        """Position ids; the same tensors for every call with this grid, which is what the patch looks them up by."""
        key = (grid, text)
        if key not in self._ids:
            self._ids[key] = (image_ids(grid).to(self.device), torch.zeros(text, 3, device=self.device))
        img_ids, txt_ids = self._ids[key]
        return {"img_ids": img_ids, "txt_ids": txt_ids}

    def latent(self, sample: dict[str, torch.Tensor], place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x0, noise, t) of the sample at ``place`` of the run: two (C, h, w), and a uniform time in [0, 1)."""
        generator = torch.Generator().manual_seed(_words(self.seed, 1, place))
        time = torch.rand((), generator=generator)
        mean = sample["mean"].float()
        noise = torch.randn(mean.shape, generator=generator)
        if sample["std"] is not None:
            mean = mean + sample["std"].float() * torch.randn(mean.shape, generator=generator)
        return (mean - self.shift) * self.scaling, noise, time

    def batch(self, samples: list[dict[str, torch.Tensor]], places: list[int]) -> tuple[dict[str, Any], torch.Tensor]:
        """Arguments of the transformer for x_t = (1 - t) x0 + t noise, and the target noise - x0 (B, h * w, 4 C)."""
        shapes = {(s["mean"].shape, s["prompt_embeds"].shape) for s in samples}
        (_, height, width), _ = next(iter(shapes))
        if len(shapes) > 1 or height % 2 or width % 2:
            raise UserError(f"cached latents of {height} x {width} do not pack: all samples have one even size.")
        parts = [self.latent(s, p) for s, p in zip(samples, places, strict=True)]
        clean, noise, time = (torch.stack(p) for p in zip(*parts, strict=True))
        grid = (height // 2, width // 2)
        clean, noise, time = (x.to(self.device) for x in (pack(clean), pack(noise), time))
        t = time[:, None, None]
        call = {"hidden_states": (1.0 - t) * clean + t * noise, "timestep": time, **self.prompts(samples)}
        call |= self.ids(grid, call["encoder_hidden_states"].shape[1])
        if self.guidance is not None:
            call["guidance"] = torch.full_like(time, self.guidance)
        return call, noise - clean

    def prompts(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The samples' prompt embeddings as the transformer's arguments."""
        names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
        return {k: torch.stack([s[v] for s in samples]).to(self.device, self.dtype) for k, v in names.items()}
