"""The public function of halo attention: checks its arguments and picks an implementation."""

import torch

from .reference import halo_attention_reference


def halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_height: torch.Tensor,
    rel_width: torch.Tensor,
    block_size: int,
    halo_size: int,
    stride: int = 1,
    border: str = "zero",
    scale: float | None = None,
    scale_rel: bool = False,
    rel_step: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Blocked local self-attention with a halo (arXiv 2103.12731, section 3).

    The (H, W) key map is cut into ``block_size`` squares. The queries of a square attend to the
    ``block_size + 2 * halo_size`` square around it. Maps that blocks do not tile are padded at the bottom and right;
    what lies outside the map is treated as ``border`` says.

    Args:
        q: queries (B, ceil(H / stride), ceil(W / stride), heads, D), any strides.
        k, v: keys (B, H, W, heads, D) and values (B, H, W, heads, Dv), any strides.
        rel_height, rel_width: relative tables (2 * window - 1, D), shared by all heads.
        stride: 1, or 2 for subsampled queries (block_size must be divisible by it).
        border: ``'zero'`` keeps keys outside the map in the softmax, as zeros with their relative logit;
            ``'mask'`` leaves them out.
        scale: factor of q.k, D ** -0.5 by default.
        scale_rel: whether the relative logits are scaled too.
        rel_step: 1 indexes the tables with the subsampled query position, ``stride`` with its true position.
        backend: ``'auto'``, ``'reference'`` (any device).

    Returns:
        (B, ceil(H / stride), ceil(W / stride), heads, Dv) in q's dtype.

    Raises:
        ValueError: for an unknown border or backend, a block that the stride does not divide, or shapes that disagree.
    """
    if border not in ("zero", "mask"):
        raise ValueError(f"border={border!r} is unknown: use 'zero' or 'mask'")
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride != 0:
        raise ValueError(
            f"block_size={block_size}, halo_size={halo_size}, stride={stride}: "
            "block_size must be a positive multiple of stride, halo_size at least 0"
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    rel_scale = factor if scale_rel else 1.0
    return halo_attention_reference(
        q, k, v, rel_height, rel_width, block_size, halo_size, stride, border == "mask", factor, rel_scale, rel_step
    )
