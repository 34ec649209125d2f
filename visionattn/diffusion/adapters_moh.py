"""The adapter of DiT and MoH-DiT (:func:`visionattn.create_dit`), alone or where diffusers' pipelines hold them.

Their attention has no processor: the patch stands in for ``MoHAttention.attend``, on the instance. Gates are computed
as ever and weigh the heads of the sparse result, so a head that a token leaves out is still computed.
"""

import copy
import types
from typing import Any

import torch
from torch import nn

from .adapters import Adapter, Site, _need, _patches, register_adapter
from .layout import Layout


def _attends(module: nn.Module) -> bool:
    """Whether it is a ``MoHAttention``: known by what the patch uses, since this room imports of ours ops alone."""
    return callable(getattr(type(module), "attend", None)) and hasattr(module, "scale")


class Attend:
    """In place of a ``MoHAttention``'s ``attend``; a copy of the module gets its class's own back."""

    def __init__(self, layer: Any, module: nn.Module):
        self.layer = layer
        self.module = module
        self.original = module.attend

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: torch.Tensor | None,
        bias: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        if dropout > 0.0 or self.layer.stays_dense(q.shape[1], bias):
            return self.original(q, k, v, gates, bias, dropout)
        out = self.layer.sparse(q, k, v, self.module.scale)
        return out if gates is None else out * gates.unsqueeze(-1).to(out.dtype)

    def __deepcopy__(self, memo: dict) -> types.MethodType:
        return types.MethodType(type(self.module).attend, copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple:
        return getattr, (self.module, "attend")  # at that time the class's: the new module has no state yet


class AttendSite(Site):
    """A ``MoHAttention`` whose ``attend`` is replaced."""

    def install(self, layer: Any) -> None:
        if isinstance(self.module.attend, Attend):
            raise ValueError(f"{self.name} is patched already: remove the other handle first")
        self.module.attend = Attend(layer, self.module)

    def keep(self, layer: Any) -> None:
        pass  # nobody else sets it

    def restore(self, layer: Any) -> None:
        if isinstance(self.module.attend, Attend) and self.module.attend.layer is layer:
            del self.module.attend  # the class's is behind it


@register_adapter
class MoHDiT(Adapter):
    """(MoH-)DiT of this package, in diffusers' wrapping or bare: image tokens alone; latents (B, C, height, width)."""

    models = ("MoHDiTTransformer2DModel", "DiT")

    def sites(self, transformer: nn.Module) -> list[Site]:
        sites = [AttendSite(name, module) for name, module in transformer.named_modules() if _attends(module)]
        if not sites:
            raise ValueError(
                f"this {type(transformer).__name__} is not visionattn's: write an adapter of its own for it with "
                "visionattn.diffusion.register_adapter"
            )
        return sites

    def bind(self, transformer: nn.Module, args: tuple, kwargs: dict) -> dict:
        call = super().bind(transformer, args, kwargs)
        return call if "x" not in call else {**call, "hidden_states": call["x"], "timestep": call.get("t")}

    def layout(self, transformer: nn.Module, call: dict, cache: Any) -> tuple[Layout, None]:
        size = getattr(transformer, "dit", transformer).patch_size
        return Layout(_patches(_need(call, "hidden_states"), (size, size))), None
