"""The loop. One :class:`Distiller` holds a run's parts and its position; all that it writes goes into its run folder.

Losses stay on the device and are looked at every ``log_interval`` updates and before each save, so that a step does not
wait for the GPU. State is written between updates only.
"""

import contextlib
import csv
import io
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from visionattn._files import atomic_write
from visionattn._world import World, like, whole
from visionattn.ops.local.patterns import Disk

from . import parallel
from .cache import Cache
from .config import FREE, Config, RunError, UserError, make_folder
from .flow import Flow, order
from .pair import Pair, file_name, load_transformer, write_clear

LOSSES = ("loss", "flow", "output", "attention")
AGREE_EVERY = 10  # updates between the ranks' exchanges about a signal to stop


class Distiller:
    """CLEAR's distillation of one FLUX.1 transformer (Liu, Tan, Wang; arXiv 2412.16112).

    Loss = ``flow_weight`` MSE(student, noise - x0) + ``output_weight`` MSE(student, teacher) + ``attention_weight``
    mean over ``loss_layers`` of MSE(attention output of the student, of the teacher).

    Args:
        cfg: the run's options.
        world: this process among its peers; by default alone.
        transformer: the teacher, instead of loading ``cfg.model``'s.

    Raises:
        UserError: anything about model, cache or options that can't work.
    """

    def __init__(self, cfg: Config, world: World | None = None, transformer: nn.Module | None = None):
        self.cfg, self.world = cfg, world or parallel.start(cfg)
        self.device, self.dtype = self.world.device, getattr(torch, cfg.dtype)
        self.cache = Cache(cfg.cache)
        teacher = load_transformer(cfg) if transformer is None else transformer.to(self.dtype)
        self._check_cache(teacher.config)
        self.pair = Pair(teacher, cfg)
        self._place()
        self.flow = Flow(teacher.config, self.cache.scaling, self.cache.shift, cfg.guidance, cfg.seed, self.device,
                         self.dtype)  # fmt: skip
        self.optimizer = self._optimizer()
        self.step = self.seen = 0  # updates done, and samples of the run consumed by them
        self.saved_step: int | None = None
        self.history: list[dict[str, float]] = []
        self.stop_requested = False
        self._losses: list[torch.Tensor] = []
        self._groups: list[list[nn.Parameter]] = [g["params"] for g in self.optimizer.param_groups]

    def _check_cache(self, config: Any) -> None:
        """Samples are the transformer's, and the pattern leaves something out on their grid. Raises UserError."""
        sample, cfg = self.cache.sample(0), self.cfg
        found = (
            4 * sample["mean"].shape[0],
            sample["prompt_embeds"].shape[-1],
            sample["pooled_prompt_embeds"].shape[-1],
        )
        wanted = (config.in_channels, config.joint_attention_dim, config.pooled_projection_dim)
        if found != wanted:
            raise UserError(f"cache={cfg.cache} is not for this transformer: packed channels, text and pooled text of "
                            f"{found}, it takes {wanted}.")  # fmt: skip
        pattern, grid = Disk(cfg.radius, cfg.downsample), tuple(n // 2 for n in sample["mean"].shape[1:])
        try:
            pattern.check(grid)
        except ValueError as e:
            raise UserError(f"{e}: a grid position is two latents.") from None
        if pattern.dense(grid):
            raise UserError(f"radius={cfg.radius} covers the cache's whole grid of {grid}: take a smaller one.")

    def _place(self) -> None:
        if not self.cfg.fsdp:
            self.pair.to(self.device)
            return
        parallel.shard(self.pair.student, list(self.pair.linears.values()), self.world, self.dtype)
        parallel.shard(self.pair.teacher, [], self.world, self.dtype)
        self.pair.pooling_to(self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        cfg = self.cfg
        trained = self.pair.trained()
        groups = [
            {"params": [p for n, p in trained.items() if n.endswith("spatial_weight") is pooling]}
            for pooling in (False, True)
        ]
        groups = [g for g in groups if g["params"]]  # sharded and whole tensors do not share a group
        if cfg.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)
        if cfg.fsdp:
            raise UserError("optimizer=prodigy measures one distance over all weights, which is not done over shards: "
                            "take adamw with fsdp=true.")  # fmt: skip
        try:
            from prodigyopt import Prodigy
        except ImportError:
            raise UserError("optimizer=prodigy needs a package: pip install prodigyopt, or take adamw.") from None
        return Prodigy(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)

    def autocast(self) -> Any:
        """Of every forward pass; float32 runs as it is."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    # ---- the loss

    def losses(self, call: dict[str, Any], target: torch.Tensor) -> dict[str, torch.Tensor]:
        """The three losses of a batch and their weighted sum ``loss``; scalars in float32.

        Args:
            call: the transformer's arguments (:meth:`Flow.batch`).
            target: noise - x0, (B, h * w, C).
        """
        cfg, pair = self.cfg, self.pair
        with pair.capturing() as (teacher, student), self.autocast():
            with torch.no_grad():
                expected = pair.teacher(**call, return_dict=False)[0]
            found = pair.student(**call, return_dict=False)[0]
        result = {"flow": F.mse_loss(found.float(), target), "output": F.mse_loss(found.float(), expected.float())}
        distances = [F.mse_loss(student.outputs[n].float(), teacher.outputs[n].float()) for n in student.names]
        result["attention"] = torch.stack(distances).mean() if distances else found.new_zeros((), dtype=torch.float32)
        teacher.outputs, student.outputs = {}, {}
        weights = {"flow": cfg.flow_weight, "output": cfg.output_weight, "attention": cfg.attention_weight}
        result["loss"] = sum(w * result[k] for k, w in weights.items() if w)
        return result

    # ---- the run

    def fit(self, run: Path | None, say: Callable[[str], None] = print, sampler: Any = None) -> str:
        """Trains until ``cfg.steps``, or until it is asked to stop; saves into ``run`` (None: writes nothing).

        Returns:
            ``'done'`` or ``'stopped'``.

        Raises:
            RunError: for a loss that is not finite; the last checkpoint stays.
        """
        cfg, world = self.cfg, self.world
        self._clock = (time.monotonic(), self.step)
        if sampler and self.step == 0:
            sampler(self)
        places = order(cfg.seed, len(self.cache), self.seen, world.rank, world.size, cfg.batch_size)
        left = (cfg.steps - self.step) * cfg.grad_accum
        groups: list[list[tuple[int, int]]] = []  # read ahead, in order

        def numbers() -> Any:
            for _ in range(left):
                groups.append(next(places))
                yield [number for _, number in groups[-1]]

        micro = 0
        for samples in self.cache.batches(numbers()):
            boundary = (micro + 1) % cfg.grad_accum == 0
            self._backward(samples, [place for place, _ in groups.pop(0)], boundary)
            micro += 1
            if not boundary:
                continue
            self._update()
            if self._after_update(run, say, sampler):
                return "stopped"
        if self.saved_step != self.step:
            self.save(run)
        return "done"

    def _backward(self, samples: list[dict], places: list[int], boundary: bool) -> None:
        call, target = self.flow.batch(samples, places)
        if self.cfg.fsdp:
            self.pair.student.set_requires_gradient_sync(boundary)
        result = self.losses(call, target)
        if self.step == 0 and self.pair.left_dense():
            name, reason = next(iter(self.pair.left_dense().items()))
            raise UserError(f"radius={self.cfg.radius}: {name} stays dense ({reason}): nothing to distil.")
        (result["loss"] / self.cfg.grad_accum).backward()
        self._losses.append(torch.stack([result[k].detach().float() for k in LOSSES]))

    def _update(self) -> None:
        cfg, world = self.cfg, self.world
        if world.size > 1:
            for p in self.pair.pooling.values():
                torch.distributed.all_reduce(p.grad)
                p.grad /= world.size
        if cfg.clip_grad:
            parallel.clip_grad(self._groups, cfg.clip_grad)
        share = min(1.0, (self.step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
        if cfg.decay_steps:
            share *= min(1.0, (cfg.steps - self.step) / (cfg.decay_steps + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seen += cfg.batch_size * cfg.grad_accum * world.size

    def _after_update(self, run: Path | None, say: Callable[[str], None], sampler: Any) -> bool:
        """Progress, pictures and checkpoint where they are due. Returns whether to stop."""
        cfg = self.cfg
        if self.step % cfg.log_interval == 0 or self.step == cfg.steps:
            self._progress(say)
        stop = self.step == cfg.stop_step or self._asked_to_stop()
        if sampler and cfg.sample_interval and self.step % cfg.sample_interval == 0 and not stop:
            sampler(self)
        if stop or self.step % cfg.save_interval == 0 or self.step == cfg.steps:
            self.save(run)
        return stop and self.step < cfg.steps

    def _asked_to_stop(self) -> bool:
        if self.world.size == 1:
            return self.stop_requested
        return self.step % AGREE_EVERY == 0 and self.world.agree(self.stop_requested)

    def _look(self) -> None:
        """Adds the mean losses since the last look to the history. Raises RunError if one is not finite."""
        if not self._losses:
            return
        values = self.world.mean(torch.stack(self._losses).mean(0))
        self._losses = []
        row = {"step": self.step, **dict(zip(LOSSES, values.tolist(), strict=True))}
        if not math.isfinite(row["loss"]):
            self._not_finite(f"the loss is {row['loss']} before update {self.step}")
        self.history.append(row)

    def _not_finite(self, what: str) -> NoReturn:
        kept = "no checkpoint had been written yet"
        if self.saved_step is not None:
            kept = f"the checkpoint of update {self.saved_step} stays"
        raise RunError(f"{what}: stopped, {kept}. Try a lower lr=.")

    def _check_weights(self) -> None:
        """No save of weights that a last, overflowing update has spoilt. Raises RunError."""
        local = [getattr(p, "to_local", lambda p=p: p)() for p in self.pair.trained().values()]
        finite = all(bool(p.isfinite().all()) for p in local)
        if self.world.agree(not finite):
            self._not_finite(f"the weights are not finite after update {self.step}")

    def _progress(self, say: Callable[[str], None]) -> None:
        self._look()
        now, (since, before) = time.monotonic(), self._clock
        rate = (self.step - before) / max(now - since, 1e-9)
        self._clock = (now, self.step)
        if self.world.first and self.history:
            row = self.history[-1]
            parts = "  ".join(f"{k} {row[k]:.4g}" for k in LOSSES)
            minutes = (self.cfg.steps - self.step) / max(rate, 1e-9) / 60
            say(f"update {self.step}/{self.cfg.steps}  {parts}  {rate:.2f} updates/s  {minutes:.0f} min left")

    # ---- checkpoints

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, in float32 on the CPU of the first rank. A collective where there are several ranks."""
        return whole(self.pair.trained(), self.world.first)

    def state(self) -> dict[str, Any]:
        """All that a resume needs: plain data, and whole tensors (on the first rank)."""
        settings = {k: v for k, v in vars(self.cfg).items() if k not in FREE}
        return {
            "trained": self.weights(), "optimizer": whole(self.optimizer.state_dict(), self.world.first),
            "step": self.step, "seen": self.seen, "history": self.history, "settings": settings,
        }  # fmt: skip

    def save(self, run: Path | None) -> None:
        """Writes ``state.pt``, ``clear_local_*.safetensors`` and ``history.csv`` into ``run``."""
        self._look()
        self._check_weights()
        state = self.state()
        if run is not None and self.world.first:
            make_folder(run, "output")
            atomic_write(run / "state.pt", lambda f: torch.save(state, f))
            about = {"step": str(self.step), "model": str(self.cfg.model)}
            write_clear(run / file_name(self.cfg), state["trained"], self.dtype, about)
            _write_history(run / "history.csv", self.history)
        self.saved_step = self.step

    def load(self, path: Path) -> None:
        """Goes on where a saved state stopped, on as many ranks as there are now. Raises UserError."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, settings = state["trained"], state["settings"]
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as e:
            raise UserError(f"{path} can't be read ({type(e).__name__}): pass --restart to begin anew.") from None
        changed = [k for k, v in settings.items() if getattr(self.cfg, k, None) != v]
        if changed:
            was = ", ".join(f"{k}={settings[k]!r}" for k in changed)
            raise UserError(f"{path.parent} holds a run with {was}: give another output=, or --restart.")
        trained = self.pair.trained()
        if {k: v.shape for k, v in trained.items()} != {k: v.shape for k, v in saved.items()}:
            raise UserError(f"{path.parent} holds a run of another transformer: give another output=, or --restart.")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(like(saved[name], p))
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        moments = {i: {k: like(v, parameters[i]) for k, v in s.items()} for i, s in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.step, self.seen, self.history = state["step"], state["seen"], state["history"]
        self.saved_step = self.step


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *LOSSES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write(path, text.getvalue())
