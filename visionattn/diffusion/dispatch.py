"""The one place that touches diffusers' attention dispatcher, whose list of backends is a closed enum.

diffusers hands a backend neither the module nor the grid that it works for, so each patched layer has a member of its
own. The dispatcher offers no registration; members are added as its own registry keeps them, and taken out again when
a patch is removed. A release that changes this breaks this file and nothing else.
"""

import itertools
from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn

PREFIX = "visionattn_"
_numbers = itertools.count()


def add_backend(function: Callable) -> AttentionBackendName:
    """A new member of the enum that dispatches to ``function``; thread safe, unique in this process."""
    name = f"{PREFIX}{next(_numbers)}"
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    member.__reduce_ex__ = lambda protocol: (_nothing, ())  # a pickle of the network carries no patch
    AttentionBackendName._value2member_map_[name] = member
    AttentionBackendName._member_map_[member._name_] = member
    _AttentionBackendRegistry.register(member, supports_context_parallel=True)(function)
    return member


def _nothing() -> None:
    return None


def remove_backend(member: AttentionBackendName) -> None:
    """Takes a member of :func:`add_backend` out again."""
    for table in (
        _AttentionBackendRegistry._backends,
        _AttentionBackendRegistry._constraints,
        _AttentionBackendRegistry._supported_arg_names,
    ):
        table.pop(member, None)
    _AttentionBackendRegistry._supports_context_parallel.discard(member._value_)
    AttentionBackendName._value2member_map_.pop(member._value_, None)
    AttentionBackendName._member_map_.pop(member._name_, None)


def is_ours(backend: object) -> bool:
    """Whether a processor's ``_attention_backend`` is one of :func:`add_backend`'s."""
    return isinstance(backend, str) and str.__str__(backend).startswith(PREFIX)


def dense(query, key, value, backend=None, parallel_config=None, **kwargs):
    """What diffusers does without us: its dispatcher with ``backend``, its active one where None.

    Raises:
        ValueError: under context parallelism with a backend that attends to one process's tokens only, or that has no
            ring attention.
    """
    if parallel_config is not None:
        registry = _AttentionBackendRegistry
        name = registry.get_active_backend()[0] if backend is None else backend
        name = name if isinstance(name, AttentionBackendName) else AttentionBackendName(name)
        if not registry._is_context_parallel_available(name):
            raise ValueError(
                f"dense calls run on diffusers' backend {name.value!r}, which has no context parallelism: set one of "
                f"{', '.join(sorted(b for b in registry._supports_context_parallel if not b.startswith(PREFIX)))}"
            )
    if parallel_config is None or torch.compiler.is_compiling():
        return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config, **kwargs)
    try:
        return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config, **kwargs)
    except ValueError as e:
        if "return_lse" not in str(e):
            raise
        raise ValueError(
            f"dense calls run on diffusers' backend {name.value!r}, which has no ring attention: set_attention_backend "
            "('_native_cudnn', '_native_flash', 'flash') before enable_parallelism, or use ulysses_degree"
        ) from e
