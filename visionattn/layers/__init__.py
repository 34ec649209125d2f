"""One published mechanism, one file; and the registry of modules."""

from .agent import AgentAttention
from .ela import ELA
from .graph_transformer import GraphTransformerLayer, GraphTransformerNet
from .halo import HaloAttention
from .inline import InLineAttention
from .insert import Insertion, insert
from .mala import MALA
from .moh import MoHAttention, pop_aux_loss
from .neighborhood import NeighborhoodAttention
from .nin import FeedForward, MixerBlock, MixerGatingUnit, NiNBlock
from .registry import create_module, list_modules, module_kind, register_module
from .residual import Residual
from .transnext import AggregatedAttention, ConvGLU, CosineAttention, OverlapPatchEmbed
from .ulsam import ULSAM, SubSpace

__all__ = [
    "ELA",
    "MALA",
    "ULSAM",
    "AgentAttention",
    "AggregatedAttention",
    "ConvGLU",
    "CosineAttention",
    "FeedForward",
    "GraphTransformerLayer",
    "GraphTransformerNet",
    "HaloAttention",
    "InLineAttention",
    "Insertion",
    "MixerBlock",
    "MixerGatingUnit",
    "MoHAttention",
    "NeighborhoodAttention",
    "NiNBlock",
    "OverlapPatchEmbed",
    "Residual",
    "SubSpace",
    "create_module",
    "insert",
    "list_modules",
    "module_kind",
    "pop_aux_loss",
    "register_module",
]
