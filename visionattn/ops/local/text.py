"""Rows of text queries by cuDNN's attention through PyTorch, which is faster on dense rows than our kernels.

Text queries see all tokens, so nothing is hidden but padded text. They are few: 512 rows of 24 heads are 96 blocks of
128 rows, which leave a quarter of an H100's multiprocessors idle. So the keys are cut into chunks that run as entries
of one batch, and the chunks' outputs are joined by their log-sum-exps, as those of the Triton kernel are.
"""

import functools
import os
from dataclasses import dataclass, replace

import torch

from visionattn.ops._triton import give_up

from .attend import cudnn_reason, with_lse

# What computes text rows, for benchmarks and tests: 'auto', 'triton', or 'cudnn' wherever it can run.
CHOICES = ("auto", "triton", "cudnn")
choice = os.environ.get("VISIONATTN_LOCAL_TEXT", "auto")
if choice not in CHOICES:
    raise ValueError(f"VISIONATTN_LOCAL_TEXT={choice!r}: use one of {', '.join(CHOICES)}")

# Fewer text tokens than this stay with Triton's kernel: with 256 on 66,000 keys it was faster.
LEAST_TEXT = 512
_BLOCK = 128  # queries and keys of cuDNN's tiles, for counting only
_MOST_CHUNKS = 16
LEAST_KEYS = 2**15  # with fewer the host takes longer for the chunks than they save


@dataclass(frozen=True)
class Chunks:
    """`count` chunks of `keys` keys; what they leave over is one more call."""

    count: int
    keys: int

    def __str__(self) -> str:
        return "cuDNN's attention" + (f" in {self.count} chunks of {self.keys} keys" if self.count > 1 else "")


def reason(q, k, v, lengths, text: int) -> str | None:
    """Why cuDNN can't compute the text rows of q (B, N, H, D), or None."""
    if lengths is not None and text:
        return "text lengths hide keys"
    if q.numel() >= 2**31:
        return "cuDNN was not tried on 2 ** 31 elements"
    if not q.is_cuda:
        return None if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) else "needs CUDA"
    if text < 64:
        return f"cuDNN's attention was not tried on fewer than 64 tokens: got {text}"
    return cudnn_reason(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def takes(capability: int, text: int, dim: int) -> bool:
    """Where cuDNN was measured to be faster than the Triton kernel (docs/kernels.md): Hopper, heads of 128 channels."""
    return capability == 90 and dim == 128 and text >= LEAST_TEXT


def choose(q, k, v, lengths, text: int, capability: int, which: str) -> Chunks | None:
    """How cuDNN runs the text rows, or None for the Triton kernel.

    which: ``'auto'`` takes cuDNN where :func:`takes` says so, ``'triton'`` never, ``'cudnn'`` wherever it can run.
    """
    if not text or which == "triton" or (which == "auto" and (failed or not takes(capability, text, q.shape[3]))):
        return None
    if reason(q, k, v, lengths, text) is not None:
        return None
    rows = -(-text * (q.shape[2] // k.shape[2]) // _BLOCK) * q.shape[0] * k.shape[2]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    return pick_chunks(rows, q.shape[1], processors)


@functools.lru_cache(maxsize=1024)
def pick_chunks(blocks: int, keys: int, processors: int) -> Chunks:
    """Into how many chunks the keys are cut so that `blocks` blocks of queries fill the multiprocessors evenly."""

    def cost(count: int) -> float:
        # in keys: a block's start and end, and a chunk's output that is written and read again, cost about five tiles
        rounds = -(-blocks * count // processors)
        return rounds * (keys / count + 5 * _BLOCK) + (4 * _BLOCK if count > 1 else 0)

    most = _MOST_CHUNKS if keys >= LEAST_KEYS else 1
    return cut(keys, min(range(1, most + 1), key=cost))


def cut(keys: int, count: int) -> Chunks:
    """`count` equal chunks, of a multiple of 64 keys if there are several; not one key is left over, which cuDNN does
    not take."""
    if count == 1 or keys < 4 * count:
        return Chunks(1, keys)
    unit = 64 if keys // count >= 128 else 1
    size = keys // count // unit * unit
    if keys - count * size == 1:
        size -= unit
    return Chunks(count, size)


failed: list[str] = []


def try_forward(p, q, k, v, out, lse) -> bool:
    """Whether cuDNN wrote the text rows of a plan; where it fails, Triton's kernel runs from then on."""
    if p.text_chunks is None or (failed and choice == "auto"):
        return False
    try:
        forward(p, q, k, v, out, lse)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever cuDNN or its frontend say
        if choice == "cudnn":
            raise
        give_up(failed, e, "local_attention runs text rows by Triton's kernel, not cuDNN's")
        return False
    return True


def forward(p, q, k, v, out, lse) -> None:
    """Writes the text rows of out (B, N, H, D) and lse (B, H, N)."""
    place = slice(p.text_at, p.text_at + p.text)
    # heads that share keys become rows of one head: nothing is masked
    rows = q[:, place].unflatten(2, (p.kv_heads, p.group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if p.text_chunks.count == 1:
        found, stats = with_lse(rows, keys, values, p.scale, cudnn=True)  # as choose() asked
        out[:, place] = found.unflatten(2, (p.group, p.text)).flatten(1, 2).transpose(1, 2)
        lse[:, :, place] = stats.reshape(p.batch, p.heads, p.text)
        return
    for b in range(p.batch):
        _entry(p, rows[b], keys[b], values[b], out[b : b + 1], lse[b : b + 1])


def _entry(p, rows, keys, values, out, lse) -> None:
    """One batch entry: rows (heads, n, D), keys and values (heads, N, D)."""
    from . import fused

    count, size = p.text_chunks.count, p.text_chunks.keys
    whole = count * size

    def chunks(x):
        return x[:, :whole].unflatten(1, (count, size)).transpose(0, 1)

    repeated = rows.expand(count, *rows.shape).contiguous()  # cuDNN takes no stride of 0
    part, stats = with_lse(repeated, chunks(keys), chunks(values), p.scale, cudnn=size >= 64)
    if whole < p.N:
        last, more = with_lse(rows[None], keys[None, :, whole:], values[None, :, whole:], p.scale)
        part, stats = torch.cat([part, last]), torch.cat([stats, more])
    part, stats = part.contiguous(), stats.contiguous() * fused.LOG2E  # as the kernel that joins them takes them
    block = 16
    tiles = -(-p.text // block)
    launch = p.launch(
        ("merge", "cudnn", len(part)), fused.kernels.merge_chunks, tiles * p.heads,
        (*out.stride()[:3], p.heads, p.text, p.text_at, p.N, tiles, len(part)), dict(BM=block, D=p.D, DP=p.DP),
        replace(p.tiles.dense, warps=4, stages=1),
    )  # fmt: skip
    launch(part, stats, out, lse)
