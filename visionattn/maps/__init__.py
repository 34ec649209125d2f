"""Attention that can be looked at: the map from query to key of every layer, and attention rollout."""

from . import gates, graph, linear  # noqa: F401  they register their layers
from .capture import attention_maps, map_layers
from .local import local_map
from .registry import Call, Placement, explained_layers, register_map, register_placement
from .result import AttentionMap, AttentionMaps, Explanation, Segment
from .rollout import Rollout, rollout

__all__ = [
    "AttentionMap",
    "AttentionMaps",
    "Call",
    "Explanation",
    "Placement",
    "Rollout",
    "Segment",
    "attention_maps",
    "explained_layers",
    "local_map",
    "map_layers",
    "register_map",
    "register_placement",
    "rollout",
]
