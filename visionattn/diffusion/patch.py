"""``sparsify``: one line on, one line off."""

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from visionattn.ops.local.patterns import Pattern

from .adapters import adapter_of, has_adapter
from .presets import preset
from .report import Report, report
from .session import Layer, Session
from .steps import Steps, counter


class Handle:
    """What :func:`sparsify` did. :meth:`remove` undoes it; as a context manager it does so at the end of the block."""

    def __init__(self, sessions: list[Session], note: str | None = None):
        self.sessions = sessions
        self.note = note
        self.on_remove: list[Callable[[], Any]] = []

    def remove(self) -> None:
        """The transformers are what they were: outputs are the same to the bit."""
        for session in self.sessions:
            session.remove()
        while self.on_remove:
            self.on_remove.pop()()

    def report(self) -> Report:
        """Per layer: pattern, share of the pairs that it skips, calls, time if measured, and why calls were dense."""
        return report(self.sessions, self.note)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def __reduce__(self) -> tuple:
        raise TypeError("a handle belongs to the pipeline in memory: it can't be pickled, patch the loaded one anew")


def sparsify(
    pipe: Any,
    pattern: Pattern | str,
    *,
    layers: str | Iterable[str | int] | Callable[[str], bool] | None = None,
    dense_steps: int = 0,
    dense_until: float | None = None,
    backend: str = "auto",
    timing: bool = False,
    proportional: bool | int = False,
    controlnet: bool = True,
) -> Handle:
    """Patches sparse attention into a diffusers pipeline, or into a transformer of one.

    The text tokens see all and are seen by all; an image or video token sees the tokens of its neighbourhood. Grid and
    text length come from each call, so any resolution works, and a new one costs nothing. Weights, modules and the
    state dict are not touched. Under diffusers' context parallelism (``enable_parallelism``, before or after) the
    result is one process's; see :mod:`visionattn.diffusion.parallel`.

    Args:
        pipe: a pipeline (its ``transformer`` and ``transformer_2`` are patched, its ``controlnet`` if it has an
            adapter), or a transformer.
        pattern: :class:`Disk`, :class:`Neighborhood`, :class:`Cross`, or the name of a preset: ``'quality'``,
            ``'balanced'``, ``'fast'``.
        layers: which attentions, by default all: their numbers, names with ``*``, or a function of the name.
        dense_steps: leading denoising steps that stay dense.
        dense_until: steps whose timestep is above this stay dense (in the transformer's unit: 0 to 1 for FLUX, 0 to
            1000 for most others).
        backend: of :func:`visionattn.ops.local.local_attention`.
        timing: measure every call for :meth:`Handle.report`; a GPU waits for it.
        proportional: scale the logits by the number of keys (CLEAR's option); True means against FLUX's 4608 tokens.
        controlnet: whether a control network is patched too.

    Raises:
        ValueError: for a model without an adapter (the message lists those that have one), layers that match nothing,
            a transformer that is patched already, or what cannot combine.
    """
    note = None
    transformers = _transformers(pipe, controlnet)
    if isinstance(pattern, str):
        pattern, defaults, note = preset(pattern, type(transformers[0]).__name__)
        dense_steps = dense_steps or defaults.get("dense_steps", 0)
    if not isinstance(pattern, Pattern):
        raise ValueError(f"pattern is a {type(pattern).__name__}: give a Disk, Neighborhood, Cross, or a preset's name")
    if proportional is True:
        proportional = 4608
    sessions: list[Session] = []
    steps = Steps(dense_steps, dense_until, counter(pipe))
    try:
        for transformer in transformers:
            adapter = adapter_of(transformer)
            session = Session(transformer, adapter, steps, timing, proportional or None)
            sites = _choose(adapter.sites(session.module), layers)
            session.install([Layer(session, site, pattern, backend) for site in sites])
            sessions.append(session)
    except Exception:
        for session in sessions:
            session.remove()
        raise
    return Handle(sessions, note)


def _transformers(pipe: Any, controlnet: bool) -> list[nn.Module]:
    if isinstance(pipe, nn.Module):
        return [pipe]
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    found = [t for t in found if isinstance(t, nn.Module)]
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no transformer: U-Nets have visionattn.agent_sd")
    control = getattr(pipe, "controlnet", None)
    if controlnet and isinstance(control, nn.Module):
        nets = getattr(control, "nets", None)  # several in one
        found += [net for net in ([control] if nets is None else nets) if has_adapter(net)]  # others stay dense
    return found


def _choose(sites: list, layers: Any) -> list:
    if layers is None:
        return sites
    if callable(layers):
        chosen = [s for s in sites if layers(s.name)]
    else:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        numbers = {w for w in wanted if isinstance(w, int)}
        names = [w for w in wanted if isinstance(w, str)]
        strange = [n for n in numbers if not 0 <= n < len(sites)]
        if strange:
            raise ValueError(f"layers={strange} do not exist: this model has 0 to {len(sites) - 1}")
        chosen = [s for i, s in enumerate(sites) if i in numbers or any(fnmatch.fnmatchcase(s.name, n) for n in names)]
    if not chosen:
        raise ValueError(f"layers={layers!r} matches none of {sites[0].name} ... {sites[-1].name}")
    return chosen
