"""Mixture-of-head attention as a layer (MoH, ICML 2025, arXiv 2410.11842).

:class:`HeadRouter` is what every attention with routed heads shares, also TransNeXt's (``layers/transnext.py``);
:class:`MoHAttention` is the layer on plain softmax attention, as in MoH-DiT.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import nn

from visionattn.ops._triton import cannot_run, in_auto
from visionattn.ops.moh import load_balance_loss, moh_attention, scaled_softmax, straight_through_gates, top_k_gates

from .cast import autocast_dtype, lowered
from .eval_cache import EvalCache
from .mixer import Mixer
from .registry import register_module

AUX_COEFFICIENT = 0.01  # beta of the paper's equation 8: weight of the load-balance loss


def split_heads(num_heads: int, active: float = 0.75, shared: int | None = None) -> tuple[int, int]:
    """(shared heads, top-k of the others) so that ``active`` of all heads are computed for a token.

    By default half of all heads are shared, as where the paper continues the training of dense models, or all active
    ones where they are fewer; one head stays routed where any can.

    Raises:
        ValueError: for a share outside (0, 1], or more shared heads than active ones.
    """
    if not 0.0 < active <= 1.0:
        raise ValueError(f"active={active}: give the share of active heads, above 0 and at most 1")
    heads = max(1, round(num_heads * active))
    if shared is None:
        shared = num_heads if heads == num_heads else min(num_heads // 2, heads - 1)
    if not 0 <= shared <= heads:
        raise ValueError(f"shared={shared}: {heads} of {num_heads} heads are active, share between 0 and {heads}")
    if shared == heads and heads < num_heads:
        raise ValueError(f"shared={shared} leaves no head to choose among {num_heads}: share at most {heads - 1}")
    return shared, heads - shared


class HeadRouter(EvalCache, Mixer):
    """The routers of an attention layer (``wg``, ``wg_0``, ``wg_1``), its gates, and its load-balance loss.

    A training forward keeps the layer's load-balance term until :meth:`pop_aux_loss` takes it (or the next training
    forward replaces it). Nothing is kept outside the module, in eval mode, or when gradient checkpointing runs the
    forward a second time inside backward; copies and pickles of the module leave it out.
    """

    aux_weight: float

    def _init_router(
        self, dim: int, num_heads: int, shared_head: int | None, routed_head: int | None, router: str, dd: dict
    ) -> None:
        name = type(self).__name__
        self.routed = shared_head is not None or routed_head is not None
        shared, top_k = shared_head or 0, routed_head or 0
        if router not in ("linear", "query"):
            raise ValueError(f"{name}: router={router!r} is unknown: use 'linear' or 'query'")
        if self.routed and (shared < 0 or top_k < 0 or shared + top_k > num_heads):
            raise ValueError(
                f"{name}: shared_head={shared}, routed_head={top_k}: together at most num_heads={num_heads}"
            )
        if self.routed and top_k == 0 and shared != num_heads:
            raise ValueError(
                f"{name}: shared_head={shared}, routed_head=0: share all num_heads={num_heads}, or route some"
            )
        self.shared_head, self.routed_head, self.pool = shared, top_k, num_heads - shared
        self.active = (shared + top_k) / num_heads if self.routed else 1.0
        self.from_queries = router == "query"
        linear = self.routed and router == "linear"

        def gate(rows: int, wanted: bool) -> nn.Module:
            return nn.Linear(dim, rows, bias=False, **dd) if linear and wanted else nn.Identity()

        self.wg = gate(self.pool, top_k > 0)
        self.wg_0 = gate(2, top_k > 0 and shared > 0)
        self.wg_1 = gate(shared, shared > 1)
        self.aux_weight = AUX_COEFFICIENT
        self._aux_loss = None

    def gates(self, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Gates (B, N, heads), in at least float32, of the tokens x (B, N, C) with their queries q (B, N, heads, D)."""
        if not torch.jit.is_scripting():
            fused = self._fused_gates(x)
            if fused is not None:
                return fused
        if self.routed_head == 0:
            if self.shared_head == 1 or self.from_queries:
                return torch.ones(x.shape[0], x.shape[1], self.shared_head, device=x.device, dtype=x.dtype)
            return scaled_softmax(self.wg_1(x))
        if self.from_queries:
            scores = torch.linalg.vector_norm(q[:, :, self.shared_head :], dim=-1)
            if self.pool > 1:
                scores = scores / torch.std(scores, dim=-1, keepdim=True).clamp(min=1e-6)
            gates, probs, selected = straight_through_gates(scores, self.routed_head)
        else:
            gates, probs, selected = top_k_gates(self.wg(x), self.routed_head)
        if self.training and not torch.jit.is_scripting():
            self._keep_aux_loss(probs, selected)
        if self.shared_head == 0:
            return gates
        if self.from_queries:
            shared = torch.ones(x.shape[0], x.shape[1], self.shared_head, device=x.device, dtype=gates.dtype)
            return torch.cat([shared, gates], dim=-1)
        kinds = scaled_softmax(self.wg_0(x))
        shared = kinds[..., :1]
        if self.shared_head > 1:
            shared = shared * scaled_softmax(self.wg_1(x))
        return torch.cat([shared, kinds[..., 1:] * gates], dim=-1)

    @torch.jit.unused
    def _fused_gates(self, x: torch.Tensor) -> torch.Tensor | None:
        """:meth:`gates` by one kernel; None where it is not to be taken."""
        if not x.is_cuda or self.from_queries or torch.compiler.is_compiling() or not in_auto("head_gates"):
            return None
        routers = [m for m in (self.wg, self.wg_0, self.wg_1) if type(m) is not nn.Identity]
        if not routers or any(type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks for m in routers):
            return None
        if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        if cannot_run(str(x.device), x.dtype) is not None:
            return None
        from visionattn.ops.moh.gates_triton import HeadGates, forward

        weights = tuple(m.weight for m in routers)
        weight = self.cached(("routers", autocast_dtype(x)), weights, lambda: lowered(torch.cat(weights)))
        logits = F.linear(x, weight)
        heads = self.pool if self.routed_head > 0 else 0, self.shared_head, self.routed_head
        if not self.training:
            if torch.is_grad_enabled() and logits.requires_grad:
                return HeadGates.apply(logits, *heads)[0]
            return forward(logits, *heads)[0]
        gates, loss = HeadGates.apply(logits, *heads)
        if loss is not None:
            self._leave_aux_loss(loss)
        return gates

    @torch.jit.unused
    def _keep_aux_loss(self, probs: torch.Tensor, selected: torch.Tensor) -> None:
        self._leave_aux_loss(load_balance_loss(probs, selected))

    @torch.jit.unused
    def _leave_aux_loss(self, loss: torch.Tensor) -> None:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # not inside a backward
            self._aux_loss = loss

    @torch.jit.ignore
    def pop_load_balance(self) -> torch.Tensor | None:
        """The load-balance term E * sum(P f) of the last training forward, once; None where there is none."""
        loss, self._aux_loss = self._aux_loss, None
        return loss

    @torch.jit.ignore
    def pop_aux_loss(self) -> torch.Tensor | None:
        """:meth:`pop_load_balance` times ``aux_weight``: what a trainer adds to its loss, summed over modules."""
        loss = self.pop_load_balance()
        return None if loss is None else self.aux_weight * loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_aux_loss": None}


def set_aux_weights(model: nn.Module, coefficient: float = AUX_COEFFICIENT) -> nn.Module:
    """Gives every routing layer of ``model`` its share of ``coefficient`` * mean over them (the published loss)."""
    layers = [m for m in model.modules() if isinstance(m, HeadRouter) and m.routed and m.routed_head > 0]
    for layer in layers:
        layer.aux_weight = coefficient / len(layers)
    return model


def pop_aux_loss(model: nn.Module) -> torch.Tensor | None:
    """Sum of what the modules of ``model`` that have a ``pop_aux_loss`` method give; None where none has one."""
    losses = [m.pop_aux_loss() for m in model.modules() if hasattr(m, "pop_aux_loss")]
    losses = [loss for loss in losses if loss is not None]
    return torch.stack(losses).sum() if losses else None


@register_notrace_module
@register_module("moh", "mixer")
class MoHAttention(HeadRouter):
    """Multi-head self-attention in which every token uses the shared heads and its own top-k of the others.

    With ``input_resolution`` it is TransNeXt's attention instead (:class:`CosineAttention`, or with ``sr_ratio``
    :class:`AggregatedAttention`), whose arguments these are.

    Args:
        dim: C of the tokens (B, N, C).
        num_heads: all heads, shared and routed.
        shared_head: heads that every token uses, the first ones; None, with ``routed_head`` None too, for half of
            the heads shared and a quarter routed (75 % active).
        routed_head: k, how many of the other heads a token uses (not their number).
        moh: False for plain attention, without routers.
        router: ``'linear'``: learned routers, as trained from scratch. ``'query'``: no parameters, the norms of a
            token's queries decide and gates are 1; where dense models start from (:func:`visionattn.to_moh`).
        qkv_bias, proj_bias, attn_drop, proj_drop: of the projections and dropouts.
        qk_norm, scale_norm, norm_layer: norms of q and k per head, and before the output projection.
        head_dim: channels of a head, ``dim // num_heads`` by default; heads may be wider than ``dim`` together.
        backend: of :func:`visionattn.ops.moh.moh_attention`.

    Raises:
        ValueError: for numbers of heads that do not fit.
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        if cls is MoHAttention and kwargs.get("input_resolution") is not None:
            from .transnext import AggregatedAttention, CosineAttention

            return (AggregatedAttention if "sr_ratio" in kwargs else CosineAttention)(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        shared_head: int | None = None,
        routed_head: int | None = None,
        head_dim: int | None = None,
        moh: bool = True,
        router: str = "linear",
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        backend: str = "auto",
        depth: int = 0,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if head_dim is None and dim % num_heads != 0:
            raise ValueError(f"MoHAttention: num_heads={num_heads} does not divide dim={dim}: give head_dim too")
        if not moh:
            shared_head = routed_head = None
        elif shared_head is None and routed_head is None:
            shared_head, routed_head = split_heads(num_heads)
        norm = nn.LayerNorm if norm_layer is None else norm_layer
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        self.backend = backend
        inner = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **dd)
        self.q_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.norm = norm(inner, **dd) if scale_norm else nn.Identity()
        self.proj = nn.Linear(inner, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._init_router(dim, num_heads, shared_head, routed_head, router, dd)

    def forward(
        self,
        x: torch.Tensor,
        grid: tuple[int, int] | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        assert not is_causal, "MoHAttention: is_causal is not supported, give an attn_mask"
        B, N, _ = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q, k = self.q_norm(q), self.k_norm(k)
        gates: torch.Tensor | None = self.gates(x, q) if self.routed else None
        bias = attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, device=x.device, dtype=q.dtype).masked_fill(~bias, float("-inf"))
        if bias is not None:
            bias = bias.expand(B, self.num_heads, N, N)
        dropout = self.attn_drop if self.training else 0.0
        out = self.attend(q, k, v, gates, bias, dropout)
        return self.proj_drop(self.proj(self.norm(out.flatten(2))))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: torch.Tensor | None,
        bias: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        """(B, N, heads, D) from projected tokens and gates; :func:`visionattn.sparsify` replaces it on an instance."""
        return moh_attention(q, k, v, gates, self.scale, bias, dropout, self.backend, self.active)
