"""Teacher and student: one transformer dense and frozen, its copy with CLEAR's disk and trainable projections."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionattn._files import atomic_write
from visionattn.ops.local.patterns import Disk

from ..adapters import adapter_of
from ..patch import _choose, sparsify
from .config import Config, UserError

PROJECTIONS = ("to_q", "to_k", "to_v")


def load_transformer(cfg: Config) -> nn.Module:
    """The pipeline's transformer, frozen, in ``cfg.dtype``. Raises UserError."""
    from diffusers import FluxTransformer2DModel

    try:
        model = FluxTransformer2DModel.from_pretrained(
            cfg.model, subfolder="transformer", dtype=getattr(torch, cfg.dtype)
        )
    except (OSError, ValueError, RuntimeError, TypeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"model={cfg.model}: no FLUX.1 transformer can be loaded ({reason}).") from None
    return model.requires_grad_(False)


class Capture:
    """Outputs of chosen attentions, inside of ``with capture:``; recomputed forwards outside of it are not noticed.

    An output is the attention module's: the text's and the image's in one tensor (B, text + h * w, C).
    """

    def __init__(self, transformer: nn.Module, names: list[str]):
        self.names = names
        self.outputs: dict[str, torch.Tensor] = {}
        self.active = False
        for name in names:
            transformer.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.active:
                self.outputs[name] = torch.cat(output[::-1], dim=1) if isinstance(output, tuple) else output

        return hook

    def __enter__(self) -> "Capture":
        self.outputs, self.active = {}, True
        return self

    def __exit__(self, *exc: Any) -> None:
        self.active = False


class Pair:
    """A frozen teacher and the student that is its copy.

    The student shares every frozen parameter with the teacher (they are the same tensors until FSDP shards them) and
    owns, in float32, the q, k and v projections of its local attentions, their output projection where they have one
    (double-stream blocks; the text's ``add_*`` projections stay frozen), and one f x f weighting a layer where keys are
    pooled, 1 / f^2 at the start (CLEAR, arXiv 2412.16112).

    Args:
        teacher: a FluxTransformer2DModel; becomes frozen.
        cfg: ``radius``, ``downsample``, ``layers``, ``loss_layers``, ``gradient_checkpointing``.

    Raises:
        UserError: for layers that do not exist.
    """

    def __init__(self, teacher: nn.Module, cfg: Config):
        self.teacher = teacher.requires_grad_(False)
        names = self._names(cfg.layers)
        trained = {f"{n}.{p}" for n in names for p in self._projections(teacher.get_submodule(n))}
        frozen = [p for n, p in teacher.named_parameters() if n.rpartition(".")[0] not in trained]
        self.student = copy.deepcopy(teacher, {id(p): p for p in frozen})
        self.pattern = Disk(cfg.radius, cfg.downsample)
        chosen = set(names)
        self.handle = sparsify(self.student, self.pattern, layers=lambda name: name in chosen)
        self.linears = {n: self.student.get_submodule(n) for n in sorted(trained)}
        for linear in self.linears.values():
            linear.to(torch.float32).requires_grad_(True)
        self.pooling: dict[str, nn.Parameter] = {}
        if cfg.downsample:
            f = cfg.downsample
            for name, layer in self.handle.sessions[0].layers.items():
                weight = torch.full((f, f), 1.0 / f**2, device=next(teacher.parameters()).device)
                self.pooling[name] = layer.pool_weight = nn.Parameter(weight)
        if cfg.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        compared = self._compared(cfg.loss_layers) if cfg.attention_weight else []
        self.captures = (Capture(self.teacher, compared), Capture(self.student, compared))

    @staticmethod
    def _projections(attn: nn.Module) -> list[str]:
        return [*PROJECTIONS, "to_out.0"] if getattr(attn, "to_out", None) is not None else list(PROJECTIONS)

    def _names(self, layers: list[str]) -> list[str]:
        sites = adapter_of(self.teacher).sites(self.teacher)
        if not layers:
            return [s.name for s in sites]
        try:
            return [s.name for s in _choose(sites, [int(n) if n.isdigit() else n for n in layers])]
        except ValueError as e:
            raise UserError(f"{e}.") from None

    def _compared(self, layers: list[str]) -> list[str]:
        if layers:
            return self._names(layers)
        singles = [n for n in self._names([]) if n.startswith("single_")]
        names = singles[1::4] or singles[-1:]  # FLUX.1: 1, 5, .. 37
        if not names:
            raise UserError("the transformer has no single-stream blocks: name loss_layers=, or attention_weight=0.")
        return names

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by parameter name; pooling weights under the layer's ``processor.spatial_weight``."""
        found = {f"{n}.{k}": p for n, linear in self.linears.items() for k, p in linear.named_parameters()}
        return found | {f"{n}.processor.spatial_weight": p for n, p in self.pooling.items()}

    def to(self, device: torch.device) -> None:
        """Moves both; what they share stays shared."""
        for module in (self.teacher, self.student):
            for holder in module.modules():
                for name, buffer in holder.named_buffers(recurse=False):
                    setattr(holder, name, buffer.to(device))
            for p in module.parameters():
                p.data = p.data.to(device)
        self.pooling_to(device)

    def pooling_to(self, device: torch.device) -> None:
        """Moves the pooling weights alone (FSDP moves the rest)."""
        for p in self.pooling.values():
            p.data = p.data.to(device)

    def left_dense(self) -> dict[str, str]:
        """Attentions of the student whose last call was dense, and why."""
        return {n: layer.reason for n, layer in self.handle.sessions[0].layers.items() if layer.reason is not None}

    @contextlib.contextmanager
    def capturing(self) -> Iterator[tuple[Capture, Capture]]:
        """Both captures, active inside of the block."""
        with self.captures[0] as teacher, self.captures[1] as student:
            yield teacher, student


def file_name(cfg: Config) -> str:
    """The name that tells :func:`visionattn.diffusion.load_clear` radius and pooling, as CLEAR's own files do."""
    return f"clear_local_{cfg.radius}" + (f"_down_{cfg.downsample}" if cfg.downsample else "") + ".safetensors"


def write_clear(path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype, about: dict[str, str]) -> None:
    """Trained weights in CLEAR's key layout: projections by name, pooling weights as (1, 1, 1, f, 1, f, 1)."""
    from safetensors.torch import save

    def shaped(name: str, value: torch.Tensor) -> torch.Tensor:
        value = value.to(dtype)
        return value[None, None, None, :, None, :, None] if name.endswith("spatial_weight") else value

    blob = save({k: shaped(k, v).contiguous() for k, v in state.items()}, {"format": "pt", **about})
    atomic_write(path, blob)
