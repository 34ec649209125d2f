"""Names of DiT weights: facebook's (which MoH's are too, and ours) and diffusers' ``DiTTransformer2DModel``."""

import os
import re
from typing import Any

import torch

from ._checkpoint import CheckpointError, read_state_dict
from .dit import DiT

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_QKV = ("to_q", "to_k", "to_v")


def _split(name: str) -> tuple[str, str]:
    module, _, kind = name.rpartition(".")
    return module, kind


def dit_to_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A plain DiT's weights under the names of diffusers' ``DiTTransformer2DModel``.

    diffusers has the embedders of steps and classes in every block: each gets the same tensors. The fixed positions are
    left out, which diffusers computes.

    Raises:
        ValueError: for routers (``wg``), which diffusers' network does not have, and names that are not a DiT's.
    """
    if routers := [name for name in state_dict if ".attn.wg" in name]:
        raise ValueError(
            f"{len(routers)} router weights ({routers[0]}, ..): diffusers' DiT has plain attention only, use "
            "visionattn.models.dit_diffusers.MoHDiTTransformer2DModel in its pipelines"
        )
    blocks = 1 + max((int(m[1]) for name in state_dict if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    out = {}
    for name, value in state_dict.items():
        module, kind = _split(name)
        if name == "pos_embed":
            continue
        if module in _TOP:
            out[f"{_TOP[module]}.{kind}"] = value
        elif module in _EMBEDDERS:
            for i in range(blocks):
                out[f"transformer_blocks.{i}.norm1.emb.{_EMBEDDERS[module]}.{kind}"] = value
        elif (found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module)) and found[2] in _BLOCK:
            out[f"transformer_blocks.{found[1]}.{_BLOCK[found[2]]}.{kind}"] = value
        elif found and found[2] == "attn.qkv":
            for part, chunk in zip(_QKV, value.chunk(3), strict=True):
                out[f"transformer_blocks.{found[1]}.attn1.{part}.{kind}"] = chunk
        else:
            raise ValueError(f"{name!r} is not a name of a DiT: give the state dict of visionattn's or facebook's DiT")
    return out


def dit_from_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of diffusers' ``DiTTransformer2DModel`` under facebook's names, ours.

    Raises:
        ValueError: for names that are not that network's.
    """
    top = {theirs: ours for ours, theirs in _TOP.items()}
    block = {theirs: ours for ours, theirs in _BLOCK.items()}
    embedders = {theirs: ours for ours, theirs in _EMBEDDERS.items()}
    out, qkv = {}, {}
    for name, value in state_dict.items():
        module, kind = _split(name)
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if name == "pos_embed.pos_embed":
            continue
        if module in top:
            out[f"{top[module]}.{kind}"] = value
        elif found and found[2] in block:
            out[f"blocks.{found[1]}.{block[found[2]]}.{kind}"] = value
        elif found and found[2].removeprefix("attn1.") in _QKV:
            qkv.setdefault(f"blocks.{found[1]}.attn.qkv.{kind}", {})[found[2].removeprefix("attn1.")] = value
        elif found and found[2].removeprefix("norm1.emb.") in embedders:
            out.setdefault(f"{embedders[found[2].removeprefix('norm1.emb.')]}.{kind}", value)
        else:
            raise ValueError(f"{name!r} is not a name of diffusers' DiTTransformer2DModel")
    for name, parts in qkv.items():
        out[name] = torch.cat([parts[part] for part in _QKV])
    return out


def diffusers_config(model: DiT) -> dict[str, Any]:
    """Arguments of diffusers' ``DiTTransformer2DModel`` for a plain ``model`` of square latents.

    Raises:
        ValueError: for routed heads or latents that are not square.
    """
    if any(block.attn.routed for block in model.blocks):
        raise ValueError("diffusers' DiT has no routed heads: use visionattn.models.dit_diffusers in its pipelines")
    if model.input_size[0] != model.input_size[1]:
        raise ValueError(f"input_size={model.input_size}: diffusers' DiT takes square latents")
    attn = model.blocks[0].attn
    return dict(
        num_attention_heads=attn.num_heads, attention_head_dim=attn.head_dim, in_channels=model.in_channels,
        out_channels=model.out_channels, num_layers=len(model.blocks), sample_size=model.input_size[0],
        patch_size=model.patch_size, num_embeds_ada_norm=model.num_classes, norm_eps=1e-6,
    )  # fmt: skip


def load_dit(model: DiT, file: str | os.PathLike) -> DiT:
    """Loads a file of facebook's, MoH's or diffusers' names into ``model``; the fixed positions may be absent.

    Raises:
        FileNotFoundError, CheckpointError: for a file that is not there, can't be read, or does not fit.
    """
    state_dict = read_state_dict(file)
    try:
        if any(name.startswith("transformer_blocks.") for name in state_dict):
            state_dict = dit_from_diffusers(state_dict)
        own = model.state_dict()
        table = state_dict.pop("pos_embed", None)
        if table is not None and table.shape == own["pos_embed"].shape:
            state_dict["pos_embed"] = table
        missing = sorted(own.keys() - state_dict.keys() - {"pos_embed"})
        strange = sorted(state_dict.keys() - own.keys())
        shapes = [n for n in state_dict if n in own and state_dict[n].shape != own[n].shape]
        if missing or strange or shapes:
            raise ValueError(
                f"{len(missing)} names are missing, {len(strange)} are not the model's, {len(shapes)} have another "
                f"shape (first: {[*missing, *strange, *shapes][0]})"
            )
    except ValueError as error:
        raise CheckpointError(f"checkpoint {file} does not fit this DiT: {error}; choose the name it is for") from error
    model.load_state_dict(state_dict, strict=False)
    return model
