"""The public function of aggregated attention: it checks its arguments and picks an implementation."""

import torch

from .reference import aggregated_attention_reference

BACKENDS = ("auto", "reference")


def aggregated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    query_embedding: torch.Tensor,
    tau: torch.Tensor,
    bias_local: torch.Tensor,
    bias_pool: torch.Tensor,
    tokens: torch.Tensor,
    token_bias: torch.Tensor,
    height: int,
    width: int,
    window: int = 3,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Pixel-focused attention: a token's neighbourhood and a pooled map under one softmax (arXiv 2311.17132).

    Queries and keys are normalised here. With u = q / |q| and s_n = tau * log(neighbours inside the map + P)::

        A = softmax([ (u + query_embedding) s_n . k / |k| + bias_local over the neighbours inside the map,
                      (u + query_embedding) s_n . k_pool / |k_pool| + bias_pool ])
        out = (A_local + u . tokens + token_bias) v_neighbours + A_pool v_pool

    Args:
        q, k, v: (B, N, heads, D) of a map of N = height * width tokens, row by row.
        k_pool, v_pool: (B, P, heads, D).
        query_embedding: (heads, D).
        tau: positive temperatures (heads,).
        bias_local: (heads, window ** 2).
        bias_pool: (heads, N, P).
        tokens, token_bias: (heads, D, window ** 2) and (heads, window ** 2); added after the softmax and its dropout.
        window: odd side of the neighbourhood.
        dropout_p: dropout of the attention weights.
        backend: ``'reference'``: eager PyTorch. ``'auto'``: what is fastest where it can run.

    Returns:
        (B, N, heads, D).

    Raises:
        ValueError: for an unknown backend, an even window, or shapes that disagree.
    """
    if not torch.jit.is_scripting():
        _check(q, k, v, k_pool, v_pool, bias_local, bias_pool, tokens, height, width, window, backend)
    return aggregated_attention_reference(
        q, k, v, k_pool, v_pool, query_embedding, tau, bias_local, bias_pool, tokens, token_bias, height, width,
        window, dropout_p,
    )  # fmt: skip


def _check(q, k, v, k_pool, v_pool, bias_local, bias_pool, tokens, height, width, window, backend) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: the neighbourhood has an odd side, 3 for example")
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}: give (B, N, heads, D)"
        )
    B, N, heads, dim = q.shape
    if height * width != N:
        raise ValueError(f"{N} tokens are not a {height} x {width} map: pass the grid that they lie on")
    P = k_pool.shape[1]
    if k_pool.shape != (B, P, heads, dim) or v_pool.shape != k_pool.shape:
        raise ValueError(f"k_pool, v_pool have shapes {list(k_pool.shape)}, {list(v_pool.shape)}: q needs "
                         f"{[B, P, heads, dim]}")  # fmt: skip
    if bias_pool.shape != (heads, N, P):
        raise ValueError(f"bias_pool has shape {list(bias_pool.shape)}: q and k_pool need {[heads, N, P]}")
    if bias_local.shape != (heads, window**2) or tokens.shape != (heads, dim, window**2):
        raise ValueError(
            f"bias_local, tokens have shapes {list(bias_local.shape)}, {list(tokens.shape)}: window={window} needs "
            f"{[heads, window**2]}, {[heads, dim, window**2]}"
        )
