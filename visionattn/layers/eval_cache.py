"""Tables that depend on weights only, computed once in eval mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MAX_ENTRIES = 8


def _must_compute() -> bool:
    """Whether what is computed belongs to a program, a CUDA graph or a transform, and holds no values yet."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _compute(compute: Callable[[], Any]) -> tuple[Any, bool]:
    """A value, and whether it may be kept: not where tensors have no memory."""
    with torch.inference_mode(False), torch.no_grad():
        value = compute()
    tensors = value if isinstance(value, tuple) else (value,)
    plain = all(type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta for t in tensors if t is not None)
    if plain and any(t is not None and t.is_cuda for t in tensors):
        torch.cuda.current_stream().synchronize()  # once: other streams may read it from now on
    return value, plain


class EvalCache(nn.Module):
    """Keeps what :meth:`cached` computes, in eval mode and where no gradient is wanted.

    An entry is dropped when one of its weights was replaced or changed in place (tensors count their changes, also
    those through ``state_dict()``), and all are dropped by ``train()``, ``eval()``, ``to()`` and
    ``load_state_dict()``. Only a write through ``.data`` escapes. Copies and pickles leave the entries out, and state
    dicts never hold them. Compiled code computes anew: its guards would not see a change of the weights.
    """

    __jit_ignored_attributes__ = ["_entries", "_constants"]

    def __init__(self):
        super().__init__()
        self._entries: dict[Any, tuple] = {}
        self._constants: dict[Any, Any] = {}

    def cached(self, key: Any, weights: tuple[torch.Tensor, ...], compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it gave for the same key and the same weights."""
        wants_grad = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        if self.training or wants_grad or _must_compute() or any(w.is_inference() for w in weights):
            return compute()
        versions = tuple(w._version for w in weights)
        entry = self._entries.get(key)
        if entry is not None and entry[1] == versions and all(a is b for a, b in zip(entry[0], weights, strict=True)):
            return entry[2]
        value, kept = _compute(compute)
        if not kept:
            return value
        if len(self._entries) >= _MAX_ENTRIES:
            self._entries.clear()
        self._entries[key] = (weights, versions, value)
        return value

    def constant(self, key: Any, compute: Callable[[], Any]) -> Any:
        """``compute()``, which depends on the key alone, kept in training too."""
        if _must_compute():
            return compute()
        entry = self._constants.get(key)
        if entry is None:
            entry, kept = _compute(compute)
            if not kept:
                return entry
            if len(self._constants) >= _MAX_ENTRIES:
                self._constants.clear()
            self._constants[key] = entry
        return entry

    def train(self, mode: bool = True):
        self._entries = {}
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._entries = {}
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._entries = {}
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_entries": {}, "_constants": {}}
