"""The patch of one transformer: what each layer does, and what the current call looks like."""

import time
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from visionattn.ops.local import local_attention
from visionattn.ops.local.patterns import Pattern

from . import dispatch, parallel
from .adapters import Adapter, Site
from .layout import GridError, Layout
from .steps import Steps


@dataclass
class Timing:
    """Calls and seconds of a layer, dense and sparse; filled if the session is asked to measure."""

    calls: dict[str, int] = field(default_factory=lambda: {"sparse": 0, "dense": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"sparse": 0.0, "dense": 0.0})


class Layer:
    """One patched attention: its pattern, and the attention function that its processor calls."""

    def __init__(self, session: "Session", site: Site, pattern: Pattern, backend: str):
        self.session = session
        self.site = site
        self.pattern = pattern
        self.backend = backend
        self.pool_weight: torch.Tensor | None = None  # CLEAR's, (f, f), shared by heads and channels
        self.timing = Timing()
        self.reason: str | None = None  # why the last call was dense
        self.covers = False  # whether the pattern covers this call's grid; found outside of compiled graphs
        self.overruled = False  # a hook of diffusers catches PyTorch's own attention, in this call of the transformer
        self.previous: Any = None
        self.member = None  # of diffusers' enum, what the processors ask for
        self.own_member = None  # that calls this layer; see Session._share

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        """Tensors (B, N, H, D), as diffusers' dispatcher passes them."""
        shards = parallel.shards_of(_parallel_config)
        reason = self._why_dense(query.shape[1], key.shape[1], attn_mask, dropout_p, is_causal, shards)
        timed = self.session.timing and not torch.compiler.is_compiling()
        start = _now(query) if timed else 0.0
        if reason is not None:
            out = dispatch.dense(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                enable_gqa=enable_gqa, backend=self.previous, parallel_config=_parallel_config,
            )  # fmt: skip
        elif shards is not None:
            out = parallel.sparse(self, query, key, value, scale, shards)
        else:
            out = self.sparse(query, key, value, scale)
        if not torch.compiler.is_compiling():
            self.session.spread = None if shards is None else str(shards)
            self._note(reason, _now(query) - start if timed else 0.0)
        return out

    def _note(self, reason: str | None, seconds: float = 0.0) -> None:
        self.reason = reason
        kind = "sparse" if reason is None else "dense"
        self.timing.calls[kind] += 1
        self.timing.seconds[kind] += seconds

    def stays_dense(self, length: int, attn_mask: torch.Tensor | None) -> bool:
        """Whether a processor of ours hands this call on to the one that was there."""
        reason = self._why_dense(length, length, attn_mask, 0.0, False, None)
        if not torch.compiler.is_compiling():
            self._note(reason)
        return reason is not None

    def _why_dense(self, queries, keys, attn_mask, dropout_p, is_causal, shards) -> str | None:
        session = self.session
        layout = session.layout
        if session.dense_now:
            return "dense step"
        if layout is None:
            return session.problem or "the grid is not known"
        if self.overruled:
            return "a guider puts something else in attention's place"
        role = layout.role(queries, keys) if shards is None else parallel.role(layout, queries, keys, shards)
        if role is None:
            return f"{queries} queries and {keys} keys are not the grid's attention"
        if is_causal or dropout_p > 0.0:
            return "causal or with dropout"
        if attn_mask is not None and not (layout.padded_text and role == "joint"):
            return "it has a mask that is not the text's padding"
        if self.covers:
            return "the pattern covers the whole grid"
        return None if shards is None else parallel.why_not(self.pattern, shards)

    def sparse(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        """The layer's pattern on a call that :meth:`_why_dense` let through."""
        layout = self.session.layout
        if torch.is_autocast_enabled(q.device.type):  # PyTorch's own attention does so; some norms return float32
            kind = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(kind) for x in (q, k, v))
        role = layout.role(q.shape[1], k.shape[1])
        if role == "grid":
            layout = self.session.alone
        text = layout.text if role == "joint" else 0
        lengths = self.session.text_lengths if text and layout.padded_text else None
        first = layout.text_first
        if layout.extra:  # references become text, which needs them beside it; padding stays at its end
            lengths = None if lengths is None else lengths + layout.extra
            q, k, v = (_gather(x, layout, text) for x in (q, k, v))
            first = True
        always = text + layout.extra
        scale = self.session.scale(q.shape[-1], scale, self, always)
        extra_k = extra_v = None
        if self.pool_weight is not None:
            part = slice(always, None) if first or not always else slice(0, layout.tokens)
            extra_k, extra_v = (pool(x[:, part], layout.grid, self.pool_weight) for x in (k, v))
        out = local_attention(
            q, k, v, layout.grid, self.pattern, text=always, text_first=first, text_lengths=lengths,
            extra_k=extra_k, extra_v=extra_v, scale=scale, backend=self.backend,
        )  # fmt: skip
        return _scatter(out, layout, text) if layout.extra else out


def _gather(x: torch.Tensor, layout: Layout, text: int) -> torch.Tensor:
    """[text | grid | extra] or [grid | extra | text] as [extra | text | grid]."""
    start = text if layout.text_first else 0
    grid, extra = (
        x[:, start : start + layout.tokens],
        x[:, start + layout.tokens : start + layout.tokens + layout.extra],
    )
    words = x[:, :text] if layout.text_first else x[:, layout.tokens + layout.extra :]
    return torch.cat([extra, words, grid], dim=1)


def _scatter(x: torch.Tensor, layout: Layout, text: int) -> torch.Tensor:
    extra, words, grid = x.split([layout.extra, text, layout.tokens], dim=1)
    return torch.cat([words, grid, extra] if layout.text_first else [grid, extra, words], dim=1)


def pool(x: torch.Tensor, grid: tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
    """CLEAR's pooled keys or values: (B, h * w, H, D) to (B, (h / f) * (w / f), H, D) by an (f, f) weighting."""
    f = weight.shape[0]
    h, w = grid
    blocks = x.unflatten(1, (h // f, f, w // f, f))
    return torch.einsum("bifjghd,fg->bijhd", blocks, weight.to(x.dtype)).flatten(1, 2)


def _now(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


class Session:
    """A patched transformer. Nothing of it is in the module's state dict, and a copy of the module carries none of it.

    Args:
        transformer: the network; a compiled one (``torch.compile``) is patched inside, its hook runs outside.
        steps: which steps stay dense; one object for all transformers of a pipeline.
        timing: measure each call; a GPU waits for it.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        steps: Steps,
        timing: bool = False,
        proportional: int | None = None,
    ):
        self.outer = transformer
        self.module = getattr(transformer, "_orig_mod", transformer)
        self.adapter = adapter
        self.steps = steps
        self.timing = timing
        self.proportional = proportional
        self.layers: dict[str, Layer] = {}
        self.layout: Layout | None = None
        self.alone: Layout | None = None  # the grid without text and extra tokens
        self.text_lengths: torch.Tensor | None = None
        self.problem: str | None = None
        self.spread: str | None = None  # how the last call's tokens lay over processes
        self.dense_now = False
        self._grids: dict[int, tuple[Any, Any]] = {}
        self._hook = None
        self.installed = False
        self.compiled = False

    def install(self, layers: list[Layer]) -> None:
        """Puts the layers' functions into their processors; all or none."""
        for hook in list(self.outer._forward_pre_hooks.values()):
            if isinstance(hook, _Hook) and hook.session is None:
                hook.clean(self.outer)  # a copy of a patched network, not called yet: later it would undo this patch
        done = []
        try:
            for layer in layers:
                layer.site.install(layer)
                done.append(layer)
        except Exception:
            for layer in done:
                layer.site.restore(layer)
            raise
        self.layers = {layer.site.name: layer for layer in layers}
        self._hook = self.outer.register_forward_pre_hook(_Hook(self), with_kwargs=True, prepend=True)
        self.installed = True

    def remove(self) -> None:
        """Restores every processor; the transformer is what it was before."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        self.installed = False
        for layer in self.layers.values():
            layer.site.restore(layer)

    def scale(self, dim: int, scale: float | None, layer: Layer, always: int) -> float | None:
        """CLEAR's proportional attention: the entropy of the training length kept at another one (1.3)."""
        if self.proportional is None:
            return scale
        import math

        keys = self.layout.tokens + always
        if layer.pool_weight is not None:
            keys *= 10
        return math.sqrt(math.log(keys, self.proportional) / dim)

    def before_call(self, args: tuple, kwargs: dict) -> None:
        """Finds this call's grid and step, before the transformer runs."""
        for layer in self.layers.values():
            layer.site.keep(layer)
            layer.overruled = _skips_scores(layer.site.module)
        self._share()
        call = self.adapter.bind(self.module, args, kwargs)
        try:
            self.layout, self.text_lengths = self.adapter.layout(self.module, call, self._grid_cache)
            self.alone = Layout(self.layout.grid)
            self.problem = None
        except GridError as e:
            self.layout, self.text_lengths, self.problem = None, None, str(e)
        if self.layout is not None:
            for layer in self.layers.values():
                layer.pattern.check(self.layout.grid)
                layer.covers = layer.pattern.dense(self.layout.grid)
        self.dense_now = self.steps.dense(call.get("timestep"))

    def _share(self) -> None:
        """Compiled blocks: equal layers have one function, and so one graph; else each layer its own, and counts.

        A graph is tied to the function that it was made with, and torch.compile makes eight of a kind of block at most.
        """
        compiled = self.module is not self.outer or any(m._compiled_call_impl for m in self.module.modules())
        leaders: dict[tuple, Layer] = {}
        for layer in self.layers.values():
            if layer.own_member is None:
                continue
            kind = (layer.pattern, layer.backend, layer.previous, id(layer.pool_weight), layer.overruled)
            leader = leaders.setdefault(kind if compiled else (id(layer),), layer)
            layer.site.share(layer, leader.own_member)
        if compiled and not self.compiled and len(leaders) > torch._dynamo.config.recompile_limit:
            warnings.warn(
                f"{len(leaders)} kinds of layers (pooling weights are each layer's own) are as many graphs: set "
                f"torch._dynamo.config.recompile_limit = {len(leaders)} or more",
                stacklevel=2,
            )
        self.compiled = compiled

    def _grid_cache(self, ids: torch.Tensor, make: Any) -> Any:
        """``make(ids)`` once per distinct tensor: reading ids makes a GPU wait."""
        known = self._grids.get(id(ids))
        if known is not None and known[0]() is ids:
            return known[1]
        value = make(ids)
        if len(self._grids) > 64:
            self._grids.clear()
        self._grids[id(ids)] = (weakref.ref(ids), value)
        return value


def _skips_scores(module: nn.Module) -> bool:
    """Whether diffusers' perturbed-attention guidance is hooked to an attention."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(getattr(h, "skip_attention_scores", False) for h in registry.hooks.values())


class _Hook:
    """The transformer's forward pre-hook. In a copy of the transformer (``copy.deepcopy``) it undoes the patch."""

    def __init__(self, session: Session | None):
        self.session = session

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.session is None:
            self.clean(module)
        elif module is self.session.outer or module is self.session.module:
            self.session.before_call(args, kwargs)

    def __deepcopy__(self, memo: dict) -> "_Hook":
        return _Hook(None)

    def __reduce__(self) -> tuple:
        return _Hook, (None,)

    def clean(self, module: nn.Module) -> None:
        for child in module.modules():
            processor = getattr(child, "processor", None)
            if dispatch.is_ours(getattr(processor, "_attention_backend", None)):
                del processor._attention_backend  # the class's None is behind it
            if hasattr(processor, "visionattn_original"):
                child.set_processor(processor.visionattn_original)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is self:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
