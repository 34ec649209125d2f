"""Layers that do once what autocast does on every call.

Small networks wait for launches, and under autocast two launches of five cast a weight or a bias. Here, in eval mode
and where no gradient is wanted, these keep the low precision copy; and layer norms write the low precision that the
projection behind them reads. Otherwise (without autocast, in TorchScript and in compiled programs; of the copies also
in training) they are PyTorch's and timm's own layers, with the same parameters.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, fast_layer_norm, register_notrace_module
from torch import nn

from visionattn.ops._triton import cannot_run, in_auto


def scaled(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (C, ...) and bias with factors of their C channels."""
    if scale is None:
        return weight, bias
    scale = scale.flatten()
    weight = weight * scale.reshape([-1] + [1] * (weight.ndim - 1))
    return weight, bias * scale if bias is not None else None


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Autocast's dtype on the device of ``x``; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def lowered(x: torch.Tensor) -> torch.Tensor:
    """``x`` in autocast's dtype: one cast, and one copy for backward, for all projections that read it."""
    dtype = autocast_dtype(x) if x.dtype == torch.float32 else None
    return x if dtype is None else x.to(dtype)


def wants_grad(x: torch.Tensor | None) -> bool:
    return x is not None and x.requires_grad


class KeepsCast(nn.Module):
    """Keeps ``weight`` and ``bias`` in autocast's dtype.

    The copy is made anew when a parameter was replaced or changed in place (tensors count their changes), and dropped
    by ``train()``, ``eval()``, ``to()`` and ``load_state_dict()``. Only a write into the memory behind ``.data``
    escapes: call ``eval()`` after one. Copies of the module and pickles leave it out.
    """

    __jit_ignored_attributes__ = ["_kept"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept: tuple | None = None

    @torch.jit.unused
    def cast(self, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``weight`` and ``bias``, in autocast's dtype where copies are kept.

        ``scale``: factors of the output channels that go onto both.
        """
        if torch.compiler.is_compiling():
            return scaled(self.weight, self.bias, scale)
        kept = self._kept
        if kept is not None:  # the whole of most calls, so nothing is looked at twice and no attribute is searched for
            kind, dtype, pointer, weight, bias, factors, versions, low = kept
            own = self._parameters
            trained = wants_grad(weight) or wants_grad(bias) or wants_grad(scale)
            if (
                own.get("weight") is weight
                and own.get("bias") is bias
                and scale is factors
                and weight._version == versions[0]
                and (bias is None or bias._version == versions[1])
                and (scale is None or scale._version == versions[2])
                and weight.data_ptr() == pointer
                and torch.is_autocast_enabled(kind)
                and torch.get_autocast_dtype(kind) is dtype
                and not (trained and torch.is_grad_enabled())
            ):
                return low
        return self._fresh_cast(scale)

    @torch.jit.unused
    def _fresh_cast(self, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.weight, self.bias
        kind = weight.device.type
        if (
            self.training
            or kind == "meta"
            or not torch.is_autocast_enabled(kind)
            or (torch.is_grad_enabled() and any(map(wants_grad, (weight, bias, scale))))
        ):
            return scaled(weight, bias, scale)
        dtype = torch.get_autocast_dtype(kind)
        given = (weight, bias, scale)
        # subclasses (quantised, sharded, of a transform) have rules of their own
        if any(t is not None and (type(t) is not nn.Parameter or t.is_inference()) for t in given):
            return scaled(weight, bias, scale)
        if weight.dtype != torch.float32 or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return scaled(weight, bias, scale)  # what a graph computes holds values only once it is replayed
        with torch.inference_mode(False), torch.no_grad():
            low = tuple(None if t is None else t.to(dtype) for t in scaled(weight, bias, scale))
        if weight.is_cuda:
            torch.cuda.current_stream(weight.device).synchronize()  # once: other streams may read it from now on
        versions = tuple(0 if t is None else t._version for t in given)
        self._kept = (kind, dtype, weight.data_ptr(), *given, versions, low)
        return low

    def train(self, mode: bool = True):
        self._kept = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._kept = None
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}


@register_notrace_module
class Linear(KeepsCast, nn.Linear):
    """``torch.nn.Linear``; see :class:`KeepsCast`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        weight, bias = self.cast()
        return F.linear(x, weight, bias)


@register_notrace_module
class Conv2d(KeepsCast, nn.Conv2d):
    """``torch.nn.Conv2d``; see :class:`KeepsCast`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        weight, bias = self.cast()
        return self._conv_forward(x, weight, bias)


@register_notrace_module
class PatchConv2d(Conv2d):
    """A convolution whose kernel is its stride, padding 0, of images: one copy and one matrix product.

    cuDNN's kernel for three channels took 12 % of a small network's time on an H100. A rest that the patches don't
    cover is left out, as a convolution does.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if not torch.jit.is_scripting():
            weight, bias = self.cast()
            x = lowered(x)
        if x.dim() != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            return self._conv_forward(x, weight, bias)  # says what is wrong
        B, C, H, W = x.shape
        p, q = self.kernel_size
        h, w = H // p, W // q
        x = x[:, :, : h * p, : w * q].reshape(B, C, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(B, h, w, C * p * q)
        return F.linear(x, weight.flatten(1), bias).permute(0, 3, 1, 2)


@register_notrace_module
class GroupedLinear(KeepsCast, nn.Conv1d):
    """A grouped ``torch.nn.Conv1d`` of kernel size 1 on (B, C, 1), as one batched product; see :class:`KeepsCast`.

    cuDNN runs such a convolution in several launches, and its gradient in many.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, device=None, dtype=None):
        super().__init__(in_channels, out_channels, 1, groups=groups, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if not torch.jit.is_scripting():
            weight, bias = self.cast()
        B, G = x.shape[0], self.groups
        assert bias is not None
        weight = weight.reshape(G, self.out_channels // G, self.in_channels // G)
        x = x.reshape(B, G, self.in_channels // G).transpose(0, 1)
        x = torch.baddbmm(bias.reshape(G, 1, self.out_channels // G), x, weight.transpose(1, 2))
        return x.transpose(0, 1).reshape(B, self.out_channels, 1)


class Mlp(nn.Module):
    """Linear, GELU, linear, under timm's names."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.fc1 = Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_features, in_features, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class _Norm(LayerNorm):
    """timm's layer norm, and in autocast's dtype, by one kernel (two with its gradient).

    Args:
        operator: key of :data:`visionattn.ops._triton.IN_AUTO` that decides for ``'auto'``.
    """

    def __init__(self, *args, operator: str = "norm", **kwargs):
        super().__init__(*args, **kwargs)
        self.operator = operator

    def _plain(self, x: torch.Tensor) -> torch.Tensor:  # TorchScript knows no super()
        if self._fast_norm:
            return fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    @torch.jit.unused
    def fused(self, x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The sum and its norm in autocast's dtype; None where the kernel is not to be taken."""
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling() or not in_auto(self.operator):
            return None
        if not x.is_cuda or not torch.is_autocast_enabled("cuda"):
            return None
        others = (x,) if y is None else (x, y)
        if bias is None or self._fast_norm or any(type(t) is not torch.Tensor or not t.is_contiguous() for t in others):
            return None
        if type(weight) is not nn.Parameter or x.numel() == 0 or (y is not None and y.shape != x.shape):
            return None
        if any(cannot_run("cuda", t.dtype) is not None for t in (*others, weight)):
            return None
        if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap and its like have no memory to read
            return None
        from visionattn.ops.norm_triton import AddNorm, add_norm

        arguments = (x, y, weight, bias, self.eps, torch.get_autocast_dtype("cuda"))
        if torch.is_grad_enabled() and any(map(wants_grad, (x, y, weight, bias))):
            return AddNorm.apply(*arguments)
        return add_norm(*arguments)


@register_notrace_module
class PreNorm(_Norm):
    """Layer norm in front of a projection."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            fused = self.fused(x, None)
            if fused is not None:
                return fused[1]
        return self._plain(x)


@register_notrace_module
class ResidualNorm(_Norm):
    """``(x + y, layer norm of it)``."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_scripting():
            fused = self.fused(x, y)
            if fused is not None:
                return fused
        x = x + y
        return x, self._plain(x)
