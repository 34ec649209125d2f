"""Dense attention of queries to other keys, with its log-sum-exp: what merging needs of text rows."""

import math

import torch

_CHUNK = 2**25  # logits at a time


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Nq, H, D) in q's dtype or wider, and natural log-sum-exp (B, H, Nq) in float32 or wider.

    Args:
        q: (B, Nq, H, D).
        k, v: (B, Nk, Hk, D); Hk divides H.
        scale: factor of q.k.
        lengths: (B,) valid keys, the rest is hidden. A row without keys is 0, its log-sum-exp -inf.
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    if lengths is None and k.shape[1] and _has_fused(q, k, v):
        return _fused(q, k, v, scale)
    # 16-bit logits would round away what the exponential needs
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    keys, values = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    hidden = None
    if lengths is not None:
        position = torch.arange(k.shape[1], device=q.device)
        hidden = (position >= lengths.to(q.device)[:, None])[:, None, None, :]
    outs, lses = [], []
    step = max(1, _CHUNK // max(q.shape[0] * q.shape[2] * k.shape[1], 1))
    for part in q.split(step, 1):
        logits = (part.transpose(1, 2) @ keys) * scale
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        lse = logits.logsumexp(-1)
        weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        outs.append((weights @ values).transpose(1, 2))
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _has_fused(q, k, v) -> bool:
    """Whether PyTorch's fused attention takes the call; it has no gradient of its log-sum-exp."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.float64)
    if not q.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256


def _fused(q, k, v, scale):
    out, lse = with_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
    return out.transpose(1, 2), lse


def cudnn_reason(q, k, v) -> str | None:
    """Why cuDNN's attention does not take q, k, v (B, H, N, D) on CUDA, or None.

    PyTorch's own answer, so that what a user has switched off (``torch.backends.cuda.enable_cudnn_sdp``,
    ``torch.use_deterministic_algorithms``) stays off; and Hopper only, where it was measured.
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "cuDNN's attention was measured on compute capability 9.0 only"
    if min(q.shape[2], k.shape[2]) < 64:
        return f"cuDNN's attention was not tried on fewer than 64 tokens: got {q.shape[2]} and {k.shape[2]}"
    for x in (q, k, v):
        steps = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(s <= 0 or s * x.element_size() % 16 for s in steps):
            return "cuDNN's attention needs addresses and strides that are multiples of 16 bytes"
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1])
    if not torch.backends.cuda.can_use_cudnn_attention(params):
        return "PyTorch's cuDNN attention is switched off, or does not take these tensors"
    return None


def with_lse(q, k, v, scale: float, cudnn: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's fused attention of q (B, H, Nq, D) to k, v (B, H, Nk, D): output and log-sum-exp (B, H, Nq).

    The public function returns no log-sum-exp, so its operators are called: cuDNN's where it takes the call
    (:func:`cudnn_reason`, asked unless `cudnn` says it), else flash attention.
    """
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse, *_ = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    elif cudnn or (cudnn is None and cudnn_reason(q, k, v) is None):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return out, lse.reshape(out.shape[:3])
