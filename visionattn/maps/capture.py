"""Runs a model once, and explains its attention layers as they are called."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .registry import Call, Placement, Product, explainer_of, placer_of, shadow
from .result import AttentionMap, AttentionMaps, Explanation, sizes
from .softmax import explain_softmax

_CHUNK = 2**25  # weights held at a time where heads are averaged

Layers = str | int | type | Callable[[str], bool] | Iterable
Queries = Sequence[int] | Sequence[tuple[float, float]]


def attention_maps(
    model: nn.Module,
    x: Any,
    layers: Layers | None = None,
    *,
    heads: str | None = None,
    queries: Queries | None = None,
    dtype: torch.dtype = torch.float32,
    values: bool = True,
    limit_mib: float = 4096,
    each: Callable[[AttentionMap], Any] | None = None,
) -> AttentionMaps:
    """The map from query to key of every attention layer of a model, whatever kernels compute it.

    The model runs once, in eval mode and without gradients. Layers of the zoo are explained by their formula, from the
    input that they got; any other module (timm's, diffusers') by the softmax that it runs: calls of fused attention are
    seen, and their weights are recomputed. Nothing of the model is changed: hooks and modes are restored, also after an
    error. What a mechanism's map is, and what applying it gives, stands in docs/maps.md.

    Args:
        model: any module, for example of ``timm.create_model``.
        x: its input (B, C, H, W); a tuple of positional or a dict of keyword arguments for models that take more.
        layers: names or patterns of modules (``'blocks.*.attn'``), numbers in the order of the calls (-1 the last),
            classes, a function of names, or a list of these; None for all.
        heads: None for a map a head, ``'mean'`` for their mean, weighted by the gates where heads are routed. The
            values are not kept then.
        queries: rows to compute: indices in a layer's own sequence (prefix tokens included), or places (y, x) of the
            image, each in [0, 1), that mean the token there in every layer. None for all rows.
        dtype: what maps are computed in. float64 repeats the layer's formula, not its rounding.
        values: keep each layer's values, which :meth:`AttentionMap.apply` needs.
        limit_mib: refuse maps that are larger than this together (MiB), or each of them where ``each`` is given.
        each: called with each map as it is made, while the next ones are not there yet; what it returns is returned in
            the map's place. So the memory of one map is enough.

    Returns:
        :class:`AttentionMaps`: a list of :class:`AttentionMap` in the order of the calls; names are indices too. Its
        ``missed`` names modules that ran a softmax whose product with values was not recognised: no map is theirs.

    Raises:
        ValueError: where no attention is found, no layer matches, queries are not there, or maps exceed the limit.
        TypeError: for a model that is compiled to TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("attention_maps: a TorchScript module can't be looked into: pass the module it was made of")
    if heads not in (None, "mean"):
        raise ValueError(f"heads={heads!r} is unknown: use None (each head) or 'mean'")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not a floating type: use torch.float32 or torch.float64")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    chosen = _selection(layers)
    numbers = [entry for entry in chosen if isinstance(entry, int)]
    if numbers:
        seen = _Recorder(model, x, dtype, None).run()
        chosen = [entry for entry in chosen if not isinstance(entry, int)] + [_by_number(seen, i) for i in numbers]
    settings = _Settings(heads, queries, values, limit_mib * 2**20, each)
    recorder = _Recorder(model, x, dtype, settings, None if layers is None else lambda *a: _matches(chosen, *a))
    found = recorder.run()
    found.missed = recorder.missed
    if not found:
        if not recorder.names:
            raise ValueError(f"attention_maps: no attention was seen in {type(model).__name__}")
        raise ValueError(f"layers={layers!r} matches none of {', '.join(recorder.names)}")
    return found


def map_layers(model: nn.Module, x: Any) -> dict[str, str]:
    """Names and classes of the layers that :func:`attention_maps` explains, in the order of their calls."""
    return dict(_Recorder(model, x, torch.float32, None).run())


def _selection(layers: Layers | None) -> list:
    if layers is None:
        return []
    one = isinstance(layers, str | int | type) or callable(layers)
    return [layers] if one else list(layers)


def _by_number(seen: list[tuple[str, str]], i: int) -> str:
    if not -len(seen) <= i < len(seen):
        raise ValueError(f"layers: there is no number {i}: {len(seen)} layers were seen, 0 to {len(seen) - 1}")
    return seen[i][0]


def _matches(chosen: list, name: str, module: nn.Module) -> bool:
    for entry in chosen:
        if isinstance(entry, type):
            hit = isinstance(module, entry)
        elif isinstance(entry, str):
            hit = fnmatch.fnmatchcase(name, entry) or type(module).__name__ == entry
        else:
            hit = entry(name)
        if hit:
            return True
    return False


@dataclass
class _Settings:
    heads: str | None
    queries: Queries | None
    values: bool
    limit: float
    each: Callable | None


@dataclass
class _Frame:
    """A module that is running."""

    name: str
    module: nn.Module
    placement: Placement | None
    explained: bool  # it, or a module around it, has an explainer of its own
    products: list[Product] = field(default_factory=list)


@dataclass
class _Weights:
    """What a softmax gave, and whether values were seen to be multiplied by it."""

    tensor: torch.Tensor
    used: bool = False


class _Recorder(TorchFunctionMode):
    """Sees modules begin and end, and attention products between."""

    def __init__(self, model: nn.Module, x: Any, dtype: torch.dtype, settings: _Settings | None, wanted=None):
        super().__init__()
        self.model, self.dtype, self.settings, self.wanted = model, dtype, settings, wanted
        self.args, self.kwargs = (x, {}) if isinstance(x, tuple) else ((), x) if isinstance(x, dict) else ((x,), {})
        inputs = [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, torch.Tensor)]
        images = [t for t in inputs if t.ndim == 4]
        self.image = tuple(images[0].shape[2:]) if images else None
        self.batch = next((t.shape[0] for t in (*images, *inputs) if t.ndim > 0), None)
        counts = (getattr(m, "num_prefix_tokens", None) for m in model.modules())  # a wrapper doesn't pass it on
        self.prefix = next((n for n in counts if isinstance(n, int)), 0)
        self.stack: list[_Frame] = []
        self.weights: dict[int, _Weights] = {}
        self.paused = False
        self.names: list[str] = []
        self.kept = 0
        self.missed: list[str] = []
        self.results: list = [] if settings is None else AttentionMaps()

    def run(self) -> list:
        """Maps; (name, class) pairs without settings."""
        modes = [(m, m.training) for m in self.model.modules()]
        hooks = []
        try:
            for name, module in self.model.named_modules():
                hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                hooks.append(module.register_forward_hook(self._after(), with_kwargs=True))
            self.model.eval()
            with torch.no_grad(), self:
                self.model(*self.args, **self.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes:
                module.training = training
            self.stack, self.weights = [], {}
        return self.results

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.paused and self.stack:
            name = getattr(func, "__name__", "")
            if name == "scaled_dot_product_attention":
                self._fused(*args, **kwargs)
            elif self.stack[-1].explained:
                pass
            elif name == "softmax" and isinstance(out, torch.Tensor) and out.ndim >= 3:
                axis = args[1] if len(args) > 1 else kwargs.get("dim")
                if axis in (-1, out.ndim - 1):
                    self.weights[out.data_ptr()] = _Weights(out)
            elif name in ("matmul", "bmm") and len(args) > 1:
                self._product(args[0], args[1])
        return out

    def _fused(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        self.stack[-1].products.append(Product(value, query, key, attn_mask, scale, is_causal))

    def _product(self, weights: torch.Tensor, values: torch.Tensor) -> None:
        known = self.weights.get(weights.data_ptr())
        if known is not None and known.tensor.numel() == weights.numel() and weights.ndim == values.ndim >= 3:
            known.used = True
            self.stack[-1].products.append(Product(values, weights=weights))

    def _before(self, name: str):
        def hook(module, args, kwargs):
            if self.paused:
                return
            inherited = self.stack[-1] if self.stack else None
            placement = inherited.placement if inherited else None
            placer = placer_of(module)
            if placer is not None:
                placement = placer(module, args[0])
            explained = explainer_of(module) is not None or bool(inherited and inherited.explained)
            self.stack.append(_Frame(name, module, placement, explained))

        return hook

    def _after(self):
        def hook(module, args, kwargs, output):
            if not self.paused:
                self._end(self.stack.pop(), args, kwargs, output)

        return hook  # no bound method: a copy of the module would copy what it is bound to

    def _end(self, frame: _Frame, args: tuple, kwargs: dict, output: Any) -> None:
        module = frame.module
        if next(module.children(), None) is not None or not self.stack:  # a softmax may be a module of its own
            if not frame.explained and not all(w.used for w in self.weights.values()):
                self.missed.append(frame.name)
            self.weights = {}
        explain = explainer_of(module)
        if explain is None and (frame.explained or not frame.products):
            return
        self.paused = True
        try:
            device = next((t.device.type for t in args if isinstance(t, torch.Tensor)), "cpu")
            with torch.autocast(device, enabled=False):
                call = Call(
                    module, args, kwargs, output, frame.products, frame.placement, self.image, self.batch,
                    self.prefix, self.dtype,
                )  # fmt: skip
                if explain is None:
                    for product in frame.products:
                        self._take(frame, lambda product=product: explain_softmax(product, call))
                else:
                    self._take(frame, lambda: explain(shadow(module, self.dtype), call))
        finally:
            self.paused = False

    def _take(self, frame: _Frame, explain: Callable[[], Explanation | None]) -> None:
        if self.settings is not None and self.wanted is not None and not self.wanted(frame.name, frame.module):
            self.names.append(frame.name)
            return
        explanation = explain()
        if explanation is None:
            return
        name = frame.name
        self.names.append(name)
        calls = self.names.count(name)
        name = name if calls == 1 else f"{name}:{calls}"
        if self.settings is None:
            self.results.append((name, type(frame.module).__name__))
            return
        result, size = assemble(explanation, name, type(frame.module).__name__, self.settings, self.kept)
        self.kept += size if self.settings.each is None else 0
        self.results.append(result if self.settings.each is None else self.settings.each(result))


def assemble(e: Explanation, layer: str, mechanism: str, s: _Settings, kept: int) -> tuple[AttentionMap, int]:
    """The map of an explanation, and its bytes."""
    if e.mask is not None:
        mask = e.mask.mean(dim=1, keepdim=True) if s.heads and e.mask.ndim == 4 else e.mask
        size = _check_size(layer, tuple(mask.shape), mask.element_size(), s, kept)
        keep = s.values and not s.heads
        parts = dict(values=e.values, added=e.added) if keep else {}
        return AttentionMap(layer, mechanism, e.kind, mask, **parts), size
    device = e.values.device
    rows = None if s.queries is None else resolve(s.queries, e.queries, layer).to(device)
    count = sizes(e.queries) if rows is None else len(rows)
    shape = (e.batch, 1 if s.heads else e.heads, count, sizes(e.keys))
    size = _check_size(layer, shape, e.values.element_size() * (2 if e.learned else 1), s, kept)
    index = torch.arange(count, device=device) if rows is None else rows
    gates = None if e.gates is None else e.gates[:, :, index]
    fields = dict(
        map=_gather(e.rows, index, e, gates, s.heads), queries=e.queries, keys=e.keys, rows=rows,
        learned=None if e.learned is None else _gather(e.learned, index, e, gates, s.heads), edges=e.edges,
    )  # fmt: skip
    if not s.heads:
        factors = {n: t[:, :, index] if n == "spread" else t for n, t in e.factors.items()}
        fields |= dict(values=e.values if s.values else None, gates=gates, factors=factors)
        fields |= {n: {k: t[:, index] for k, t in getattr(e, n).items()} for n in ("added", "multiplied")}
    return AttentionMap(layer, mechanism, e.kind, **fields), size


def _check_size(layer: str, shape: tuple[int, ...], element: int, s: _Settings, kept: int) -> int:
    """Bytes of a map; a ValueError where it would bring what is kept over the limit."""
    size = math.prod(shape) * element
    if kept + size > s.limit:
        raise ValueError(
            f"{layer}: a map of {' x '.join(map(str, shape))} would bring the maps to {(kept + size) / 2**20:,.0f} MiB "
            f"of limit_mib={s.limit / 2**20:,.0f}: choose layers, queries, heads='mean' or each=, or raise the limit"
        )
    return size


def _gather(rows: Callable, index: torch.Tensor, e: Explanation, gates, heads: str | None) -> torch.Tensor:
    """Rows in chunks, heads averaged as they come."""
    step = max(1, _CHUNK // max(1, e.batch * e.heads * sizes(e.keys)))
    chunks = []
    for start in range(0, len(index), step):
        weights = rows(index[start : start + step])
        if heads and gates is not None:
            part = gates[:, :, start : start + step]
            part = part / part.sum(dim=1, keepdim=True)
            weights = (weights * part.unsqueeze(-1)).sum(dim=1, keepdim=True)
        elif heads:
            weights = weights.mean(dim=1, keepdim=True)
        chunks.append(weights)
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


def resolve(queries: Queries, segments: tuple, layer: str) -> torch.Tensor:
    """Indices of the asked queries in a layer's sequence.

    Raises:
        ValueError: for an index that is not there, or a place where the layer has no map.
    """
    total, start, found = sizes(segments), 0, []
    grid = None
    for segment in segments:
        if segment.name == "grid":
            grid = (start, segment.shape)
        start += segment.size
    for query in queries:
        if isinstance(query, tuple | list):
            if grid is None or len(grid[1]) != len(query):
                raise ValueError(f"{layer}: its queries lie on no map, so the place {tuple(query)} is not among them")
            if not all(0.0 <= float(p) < 1.0 for p in query):
                raise ValueError(f"queries: the place {tuple(query)} is not (y, x) in [0, 1)")
            at = 0
            for p, side in zip(query, grid[1], strict=True):
                at = at * side + int(float(p) * side)
            found.append(grid[0] + at)
        else:
            if not -total <= int(query) < total:
                raise ValueError(f"{layer}: there is no query {query} among {total}")
            found.append(int(query) % total)
    if not found:
        raise ValueError("queries is empty: give indices, places (y, x), or None for all")
    return torch.tensor(found)
