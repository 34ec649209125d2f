"""The one place that touches diffusers' attention dispatcher, whose list of backends is a closed enum.

diffusers hands a backend neither the module nor the grid that it works for, so each patched layer has a member of its
own. The dispatcher offers no registration; members are added as its own registry keeps them, and taken out again when
a patch is removed. A release that changes this breaks this file and nothing else.
"""

import itertools
from collections.abc import Callable

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn

PREFIX = "visionattn_"
_numbers = itertools.count()


def add_backend(function: Callable) -> AttentionBackendName:
    """A new member of the enum that dispatches to ``function``; thread safe, unique in this process."""
    name = f"{PREFIX}{next(_numbers)}"
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    AttentionBackendName._value2member_map_[name] = member
    AttentionBackendName._member_map_[member._name_] = member
    _AttentionBackendRegistry.register(member)(function)
    return member


def remove_backend(member: AttentionBackendName) -> None:
    """Takes a member of :func:`add_backend` out again."""
    for table in (
        _AttentionBackendRegistry._backends,
        _AttentionBackendRegistry._constraints,
        _AttentionBackendRegistry._supported_arg_names,
    ):
        table.pop(member, None)
    AttentionBackendName._value2member_map_.pop(member._value_, None)
    AttentionBackendName._member_map_.pop(member._name_, None)


def is_ours(backend: object) -> bool:
    """Whether a processor's ``_attention_backend`` is one of :func:`add_backend`'s."""
    return isinstance(backend, str) and str.__str__(backend).startswith(PREFIX)


def dense(query, key, value, backend=None, **kwargs):
    """What diffusers does without us: its dispatcher with ``backend``, its active one where None."""
    return dispatch_attention_fn(query, key, value, backend=backend, **kwargs)
