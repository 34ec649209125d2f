"""The loop. One :class:`Trainer` holds a run's parts and its position; all it writes goes into its run folder.

Two rules shape it. Nothing in a step waits for the GPU: losses stay on the device and are looked at every
``log_interval`` updates, and before each save. And a checkpoint is only written between optimizer updates, so that no
half-accumulated gradient needs to be stored.
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import dispatch_clip_grad, random_seed, unwrap_model
from torch.nn.parallel import DistributedDataParallel

from visionattn._world import World, whole

from . import build, data, distributed
from .checkpoint import check_weights, random_states, save, set_random_states
from .config import Config, RunError, UserError
from .report import Reporter, check_loggers, clock

AGREE_EVERY = 10  # updates between the ranks' exchanges about a signal to stop


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class Trainer:
    """A run's parts, built and checked from its Config; nothing is written before :meth:`fit`.

    Raises:
        UserError: anything about model, data or options that can't work.
    """

    def __init__(self, cfg: Config, world: World):
        self.cfg, self.world, self.device = cfg, world, world.device
        self.validating = bool(cfg.validate)
        self.stop_requested = False
        self.run: Path | None = None
        self.reporter: Reporter | None = None
        check_loggers(cfg)
        self._build_model_and_data()
        if not self.validating:
            self._build_training()
        random_seed(cfg.seed, world.rank)

    # ---- parts

    def _build_model_and_data(self) -> None:
        cfg, world = self.cfg, self.world
        name = cfg.validate or cfg.model
        about = check_weights(Path(cfg.checkpoint)) if cfg.checkpoint else {}
        build.check_model_name(name)
        chans = cfg.in_chans or about.get("in_chans") or build.default_chans(name)
        if chans not in (1, 3) and cfg.dataset != "synthetic":
            raise UserError(f"in_chans={chans}: images are read as grey (1) or RGB (3).")
        mode = "L" if chans == 1 else "RGB"
        train_set, val_set, classes = data.open_datasets(cfg, mode, self.validating)
        random_seed(cfg.seed, 0)  # every rank starts from the same weights
        self.model = build.build_model(cfg, name, classes, about)
        self.data = build.data_config(cfg, self.model, about, self.validating)
        self.classes = classes or self.model.num_classes
        layout = {"memory_format": torch.channels_last} if cfg.channels_last else {}
        self.model.to(self.device, **layout)
        build.check_forward(name, self.model, self.data, self.classes)
        self.autocast = lambda: contextlib.nullcontext()
        if cfg.amp != "none":
            dtype = torch.bfloat16 if cfg.amp == "bf16" else torch.float16
            self.autocast = lambda: torch.autocast(self.device.type, dtype)
        where = (cfg, self.data, mode, world.rank, world.size, self.device)
        self.val_loader = None if val_set is None else data.eval_loader(val_set, *where)
        if not self.validating:
            self.loader = data.SyntheticLoader(cfg, self.data, self.classes, world.size, self.device) \
                if train_set is None else data.TrainLoader(train_set, *where)  # fmt: skip

    def _build_training(self) -> None:
        cfg = self.cfg
        if cfg.grad_checkpointing:
            with build.refused(f"model={cfg.model!r} has no gradient checkpointing"):
                self.model.set_grad_checkpointing(True)
        self.model = distributed.sync_batchnorm(self.model, cfg)
        self.task = build.build_task(cfg, self.model, self.device)
        self.task.to(self.device)
        if cfg.ema:
            self.task.setup_ema(decay=cfg.ema_decay, use_warmup=cfg.ema_warmup, foreach=not cfg.fsdp)
        if cfg.fsdp:
            for module in self._modules():
                distributed.shard(module, self.world)
        # the optimizer needs sharded parameters, but the model's own parameter names
        self.optimizer = build.build_optimizer(cfg, unwrap_model(self.task.trainable_module))
        if cfg.compile and cfg.fsdp:
            self.task.trainable_module.compile(mode=cfg.compile_mode or None)
        elif cfg.compile:
            self.task.compile(mode=cfg.compile_mode or None)
        if self.world.size > 1 and not cfg.fsdp:
            distributed.wrap_ddp(self.task, cfg, self.world)
        self.aux_modules = build.auxiliary_modules(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.amp == "fp16")
        self.updates_per_epoch = math.ceil(len(self.loader) / cfg.grad_accum)
        self.schedule, self.epochs = build.build_schedule(cfg, self.optimizer, self.updates_per_epoch)
        self.mixup = self.erase = None
        if cfg.mixup or cfg.cutmix:
            self.mixup = Mixup(
                cfg.mixup, cfg.cutmix, prob=cfg.mixup_prob, switch_prob=cfg.mixup_switch_prob, mode=cfg.mixup_mode,
                label_smoothing=cfg.smoothing, num_classes=self.classes,
            )  # fmt: skip
        if cfg.random_erasing:
            self.erase = RandomErasing(cfg.random_erasing, mode=cfg.erasing_mode, device=self.device)
        self.epoch = self.batch = self.step = 0  # the position: batches of the epoch, updates of the run
        self.losses: list[tuple[int, torch.Tensor]] = []  # since the last look, still on the device
        self.sums = [0.0, 0]  # loss and batches of the epoch so far
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": -1}
        self.saved_step: int | None = None

    def _modules(self) -> list[torch.nn.Module]:
        """The trained module and its average, unwrapped."""
        modules = [self.task.trainable_module]
        if self.task.has_ema():
            modules.append(self.task.get_trainable_module(ema=True))
        return [unwrap_model(m) for m in modules]

    # ---- the run

    def fit(self, run: Path | None) -> None:
        """Train to the end, into ``run`` (None on ranks that write nothing). Raises Stopped, RunError, UserError."""
        self.run = run
        self.reporter = Reporter(self.cfg, run) if run else None
        try:
            while self.epoch < self.epochs:
                start = time.monotonic()
                self.train_epoch()
                self._finish_epoch(start)
        finally:
            if self.reporter:
                self.reporter.close()

    def train_epoch(self) -> None:
        cfg, total = self.cfg, len(self.loader)
        self.task.train()
        self.optimizer.zero_grad()
        if self.mixup:
            self.mixup.mixup_enabled = not cfg.mixup_off_epoch or self.epoch < cfg.mixup_off_epoch
        self._clock = (time.monotonic(), self.batch)
        self._epoch_start = self.batch
        if self.batch >= total:  # resumed between the last update and the evaluation
            return
        for x, y in self.loader.epoch(self.epoch, self.batch):
            tail = total % cfg.grad_accum
            group = tail if self.batch >= total - tail else cfg.grad_accum
            boundary = self.batch + 1 == total or (self.batch + 1) % cfg.grad_accum == 0
            self._batch(x, y, group, boundary)
            self.batch += 1
            if boundary:
                self._after_update()
        self.batch = total  # streams may end a little short

    def _batch(self, x: torch.Tensor, y: torch.Tensor, group: int, boundary: bool) -> None:
        """Forward and backward of one batch out of ``group``; at a boundary also the update."""
        if self.cfg.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.erase:
            x = self.erase(x)
        if self.mixup:
            x, y = self.mixup(x, y)
        with self._synced(boundary):
            with self.autocast():
                loss = self.task(x, y)["loss"]
                for extra in [m.pop_aux_loss() for m in self.aux_modules]:
                    loss = loss if extra is None else loss + self.cfg.aux_weight * extra
            second_order = getattr(self.optimizer, "is_second_order", False)
            self.scaler.scale(loss / group if group > 1 else loss).backward(create_graph=second_order)
        self.losses.append((self.step + 1, loss.detach()))
        if boundary:
            self._update()

    def _synced(self, boundary: bool) -> Any:
        """Ranks exchange gradients in the last batch of an update only."""
        if self.cfg.fsdp:
            self.task.trainable_module.set_requires_gradient_sync(boundary)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if boundary else self.task.no_sync()

    def _update(self) -> None:
        cfg = self.cfg
        if cfg.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            # adaptive clipping leaves the classifier alone, as its paper does
            params = list(self.task.get_clip_parameters(exclude_head=cfg.clip_mode == "agc"))
            dispatch_clip_grad(params, cfg.clip_grad, mode=cfg.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.task.update_ema(step=self.step)
        self.schedule.step_update(self.step)

    def _after_update(self) -> None:
        cfg = self.cfg
        if self.step % cfg.log_interval == 0:
            self._progress(self._look())
        if self._must_stop():
            self.save()
            raise Stopped
        if cfg.save_interval and self.step % cfg.save_interval == 0:
            self.save()

    def _must_stop(self) -> bool:
        if self.step == self.cfg.stop_step:
            return True
        if self.world.size == 1:
            return self.stop_requested
        return self.step % AGREE_EVERY == 0 and self.world.agree(self.stop_requested)

    def _look(self) -> float:
        """Mean loss since the last look. The only wait for the device in the loop. Raises RunError if not finite."""
        if not self.losses:
            return math.nan
        steps, losses = zip(*self.losses, strict=True)
        self.losses = []
        values = torch.stack(losses).double().cpu()
        if self.world.size > 1:  # one rank's nan is everyone's: it is in all weights by now
            torch.distributed.all_reduce(values)
            values /= self.world.size
        for step, value in zip(steps, values.tolist(), strict=True):
            if not math.isfinite(value):
                self._not_finite(f"the loss is {value} at update {step}")
            self.sums[0] += value
            self.sums[1] += 1
        return values.mean().item()

    def _not_finite(self, what: str) -> None:
        kept = f"{self.run or 'the run folder'} keeps the checkpoint of update {self.saved_step}"
        if self.saved_step is None:
            kept = "no checkpoint had been written yet"
        raise RunError(f"{what} (epoch {self.epoch}): stopped; {kept}. Try a lower --lr, --clip-grad 1, or --amp bf16 "
                       "instead of fp16.")  # fmt: skip

    def _check_weights(self) -> None:
        """No save of weights that a last, overflowing update has spoilt. Raises RunError."""
        tensors = [t for m in self._modules() for t in m.state_dict().values() if t.is_floating_point()]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        finite = torch.stack([t.isfinite().all() for t in local]).all().item()
        if self.world.agree(not finite):
            self._not_finite(f"the weights are not finite after update {self.step}")

    def _progress(self, loss: float) -> None:
        now = time.monotonic()
        since, batch = self._clock
        rate = (self.batch - batch) * self.cfg.batch_size * self.world.size / max(now - since, 1e-9)
        self._clock = (now, self.batch)
        if self.world.first:
            left = (self.epochs - self.epoch) * len(self.loader) - self.batch
            eta = left * self.cfg.batch_size * self.world.size / max(rate, 1e-9)
            print(f"epoch {self.epoch}  batch {self.batch}/{len(self.loader)}  update {self.step}  loss {loss:.4f}  "
                  f"lr {self._lr():.3g}  {rate:.0f} images/s  {clock(eta)} left", flush=True)  # fmt: skip

    def _lr(self) -> float:
        return max(g["lr"] for g in self.optimizer.param_groups)

    def _finish_epoch(self, start: float) -> None:
        """Evaluate, add the epoch's row, save, report."""
        self._look()
        seconds = time.monotonic() - start
        images = (self.batch - self._epoch_start) * self.cfg.batch_size * self.world.size
        row: dict[str, Any] = {"epoch": self.epoch, "train_loss": self.sums[0] / max(self.sums[1], 1)}
        last = self.epoch + 1 == self.epochs
        if self.val_loader is not None:
            evaluate = last or (self.epoch + 1) % self.cfg.eval_interval == 0
            row |= self._evaluate_all() if evaluate else {}
        row |= {"lr": self._lr(), "images_per_second": round(images / max(seconds, 1e-9), 1)}
        row["seconds"] = round(time.monotonic() - start, 2)
        self.history = [r for r in self.history if r["epoch"] < self.epoch] + [row]
        top1 = row.get("ema_top1", row.get("eval_top1"))
        best = top1 is not None and top1 > self.best["top1"]
        if best:
            self.best = {"top1": top1, "epoch": self.epoch}
        self._report_corrupt()
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, [0.0, 0]
        self.save(best)
        if self.reporter:
            self.reporter.epoch(self.history, last)
            self._print_epoch(row)
        if not last and self.world.agree(self.stop_requested):
            raise Stopped

    def _print_epoch(self, row: dict[str, Any]) -> None:
        text = f"epoch {row['epoch']} done: train loss {row['train_loss']:.4f}"
        for kind in ("eval", "ema"):
            if f"{kind}_top1" in row:
                text += f"  {kind} loss {row[f'{kind}_loss']:.4f} top1 {row[f'{kind}_top1']:.2f}"
        if self.best["epoch"] >= 0:
            text += f"  (best {self.best['top1']:.2f} at epoch {self.best['epoch']})"
        print(f"{text}  {row['images_per_second']:.0f} images/s", flush=True)

    def _report_corrupt(self) -> None:
        """Unreadable images of all ranks; too many end the run. Raises RunError."""
        for loader in (self.loader, self.val_loader):
            samples = getattr(loader, "samples", None) or getattr(loader, "dataset", None)
            if not isinstance(samples, data.Samples):
                continue
            flags = samples.corrupt.clone()
            if self.world.size > 1:
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
                samples.corrupt.copy_(flags)
            count = int(flags.sum())
            if count > data.MAX_CORRUPT * len(samples):
                raise RunError(data.corrupt_message(samples))
            if count and self.world.first and count != getattr(samples, "told", 0):
                samples.told = count
                print("warning: " + data.corrupt_message(samples), flush=True)

    # ---- evaluation

    def _evaluate_all(self) -> dict[str, float]:
        distributed.share_batchnorm(self._modules(), self.cfg, self.world)
        result = {}
        for kind, ema in (("eval", False), ("ema", True)):
            if ema and not self.task.has_ema():
                continue
            model = self.task.get_eval_model(ema=ema)
            model = model.module if isinstance(model, DistributedDataParallel) else model  # no collectives
            result |= {f"{kind}_{k}": v for k, v in self.evaluate(model).items()}
        return result

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """{'loss', 'top1', 'top5'} (per cent) over the evaluation set, all ranks together. Raises Stopped."""
        model.eval()
        result = ClassificationEvaluator(self.device, max_samples=evaluation_sample_limit(self.val_loader))
        for x, y in self.val_loader:
            if self.cfg.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with self.autocast():
                output = model(x)
            result.update(output, y)
            if self.stop_requested and self.world.size == 1 and not self.validating:
                self.save()  # the position is the end of the epoch: a resume evaluates again
                raise Stopped
        return dict(result.compute(distributed=self.world.size > 1))

    # ---- checkpoints

    def about(self) -> dict[str, Any]:
        """What the weights file says about itself: enough to evaluate it, and where it comes from."""
        return {"model": self.cfg.model, "num_classes": self.classes, "in_chans": self.data["input_size"][0],
                "model_kwargs": self.cfg.model_kwargs, "moh_active": self.cfg.moh_active, "data": self.data,
                "epoch": self.epoch, "step": self.step,
                "best": self.best, "ema": self.task.has_ema(), "timm": timm.__version__,
                "torch": str(torch.__version__)}  # fmt: skip

    def state(self) -> dict[str, Any]:
        """All that a resume needs, whole tensors on the CPU. A collective where there are several ranks."""
        modules = self._modules()
        return {
            "model": whole(modules[0].state_dict()),
            "ema": whole(modules[1].state_dict()) if self.task.has_ema() else None,
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step, "batches": len(self.loader),
                         "images": self.batch * self.cfg.batch_size * self.world.size},
            "sums": self.sums, "history": self.history, "best": self.best,
            "rng": self.world.gather(random_states()), "about": self.about(),
        }  # fmt: skip

    def save(self, best: bool = False) -> None:
        """Write ``last`` (and ``best``) into the run folder. Raises RunError rather than save what is not finite."""
        self._look()
        self._check_weights()
        if self.cfg.dist_bn == "reduce":
            distributed.share_batchnorm(self._modules(), self.cfg, self.world)
        state = self.state()
        if self.run:
            # a feature distillation's projection is for resuming only
            weights = state["ema"] or state["model"]
            prefix = "student." if self.cfg.teacher and self.cfg.distill == "feature" else ""
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            save(self.run, state, weights, state["about"], best)
        self.saved_step = self.step

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a saved state stopped. Raises UserError if it belongs to another model or optimizer."""
        modules = self._modules()
        with build.refused("the checkpoint does not fit this model and optimizer"):
            distributed.load_module(modules[0], state["model"])
            if len(modules) > 1:
                distributed.load_module(modules[1], state["ema"] or state["model"])
            distributed.load_optimizer(self.optimizer, state["optimizer"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        position = state["position"]
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        images = self.cfg.batch_size * self.world.size
        if position["images"] != self.batch * images or position["batches"] != len(self.loader):
            self._translate(position, images)
        self.sums, self.history, self.best = state["sums"], state["history"], state["best"]
        self.saved_step = self.step
        self.schedule.step_update(self.step)
        if self.world.rank < len(state["rng"]):
            set_random_states(state["rng"][self.world.rank])

    def _translate(self, position: dict[str, int], images: int) -> None:
        """The position of a run with another batch or world size: the same images seen, rounded down to an update."""
        total = len(self.loader)
        at_end = position["batch"] >= position["batches"]
        self.batch = total if at_end else min(position["images"] // images, total)
        if self.batch < total:
            self.batch -= self.batch % self.cfg.grad_accum
        self.step = self.epoch * self.updates_per_epoch + math.ceil(self.batch / self.cfg.grad_accum)
        if self.world.first:
            print("note: batch size or number of ranks changed: the run goes on, but not bit for bit.", flush=True)
