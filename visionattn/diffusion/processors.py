"""Processors for attentions that call PyTorch directly, past diffusers' dispatcher.

Each does what the model's projections ask for and hands (B, N, H, D) tensors to its layer. A call that stays dense goes
to the processor that was there before, so that its result is the same to the bit.
"""

import copy
from typing import Any

import torch
from torch import nn


class Processor:
    """Base: chooses between the layer's pattern and the processor that was there."""

    visionattn_original: Any = None
    stands_for: tuple[str, ...] = ()  # the classes of processors whose attention this one computes

    def __init__(self, layer: Any):
        self.layer = layer

    @property
    def __class__(self) -> type:
        """The original's: diffusers' loaders make anew what they find, by its class."""
        return type(self) if self.visionattn_original is None else type(self.visionattn_original)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        # someone may have kept this processor beyond the patch, and set it again: then it is the original
        # named one by one: diffusers drops what a processor's signature does not name
        named = {"temb": temb, "image_rotary_emb": image_rotary_emb}
        kwargs = {name: value for name, value in named.items() if value is not None}
        length = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            length += encoder_hidden_states.shape[1]
        if (
            not self.layer.session.installed
            or hidden_states.ndim != 3
            or self.layer.stays_dense(length, attention_mask)
        ):
            return self.visionattn_original(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        return self.sparse(attn, hidden_states, encoder_hidden_states, **kwargs)

    def sparse(self, attn, hidden_states, encoder_hidden_states, **kwargs):
        raise NotImplementedError

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.visionattn_original, memo)

    def __reduce__(self) -> tuple:
        return _itself, (self.visionattn_original,)


def _itself(value: Any) -> Any:
    return value


def _project(
    attn: nn.Module, x: torch.Tensor, names: tuple[str, str, str], norms: tuple[str, str]
) -> list[torch.Tensor]:
    """(B, N, H, D) queries, keys, values; normed per head where the model has norms."""
    q, k, v = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)) for name in names)
    norm_q, norm_k = (getattr(attn, name, None) for name in norms)
    return [q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v]


def _out(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](x))


_OWN = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


class SelfAttention(Processor):
    """DiT's and PixArt's ``attn1``."""

    stands_for = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "FusedAttnProcessor2_0")

    def sparse(self, attn, hidden_states, encoder_hidden_states, **kwargs):
        q, k, v = _project(attn, hidden_states, *_OWN)
        out = _out(attn, self.layer.sparse(q, k, v, None).flatten(2).to(q.dtype))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class JointImageFirst(Processor):
    """Stable Diffusion 3's: [image | text], or the image alone in its second attention."""

    stands_for = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor", "FusedJointAttnProcessor2_0")

    def sparse(self, attn, hidden_states, encoder_hidden_states, **kwargs):
        q, k, v = _project(attn, hidden_states, *_OWN)
        if encoder_hidden_states is None:
            return _out(attn, self.layer.sparse(q, k, v, None).flatten(2))
        added = _project(attn, encoder_hidden_states, *_ADDED)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), added, strict=True))
        out = self.layer.sparse(q, k, v, None).flatten(2)
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return _out(attn, image), text


class JointTextFirstRotary(Processor):
    """CogVideoX's: [text | video] through the same projections, a rotary embedding on the video."""

    stands_for = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")

    def sparse(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb=None, **kwargs):
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        q, k, v = _project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1), *_OWN)
        if image_rotary_emb is not None:
            q, k = (
                torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], image_rotary_emb, sequence_dim=1)], dim=1)
                for x in (q, k)
            )
        out = _out(attn, self.layer.sparse(q, k, v, None).flatten(2))
        words, video = out.split([text, out.shape[1] - text], dim=1)
        return video, words
