"""What test_local_parallel.py runs in four forked processes: every case against one process's float64 reference.

Run as ``python -m tests.ops.parallel_local FOLDER``; rank r writes FOLDER/all-r.json, {case: largest error}, and then,
when the last process ends in the middle, FOLDER/lose-r.json.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from visionattn.ops.local import Cross, Disk, Neighborhood, local_attention, pool_tokens
from visionattn.ops.local.exchange import heads_for_tokens, shares, tokens_for_heads
from visionattn.ops.local.parallel import Split, attend_split, local_attention_bands, pool_over

WORLD = 4

# name: processes, grid, pattern, options; bands are even where not given
CASES = {
    "disk": (4, (13, 9), Disk(3), dict(text=3)),
    "disk, uneven bands": (3, (13, 9), Disk(4), dict(text=2, bands=(2, 10, 1))),
    "disk larger than the image": (2, (16, 5), Disk(20), dict(text=2)),
    "disk, bands of one row, halos of many": (4, (6, 7), Disk(3.5), dict(text=1, bands=(1, 1, 3, 1))),
    "disk with text behind and padded": (3, (8, 6), Disk(3), dict(text=4, text_first=False, lengths=(1, 4))),
    "disk with sharded text": (4, (9, 5), Disk(3), dict(text=6, text_sharded=True)),
    "padded sharded text": (2, (8, 6), Disk(3), dict(text=5, text_sharded=True, lengths=(0, 3))),
    "pooled disk": (3, (12, 8), Disk(3, downsample=4), dict(text=2, bands=(3, 6, 3))),
    "strided window": (4, (16, 12), Neighborhood((6, 5), (5, 3)), dict(text=3)),
    "strided window, halos longer than bands": (4, (16, 8), Neighborhood((12, 4), (8, 1)), dict(text=2)),
    "window shifted at the border": (3, (13, 7), Neighborhood((11, 3), (3, 2)), dict(bands=(1, 11, 1))),
    "dilated window": (4, (14, 6), Neighborhood((4, 3), (2, 1), (3, 2)), dict(text=1, bands=(1, 5, 2, 6))),
    "causal window": (3, (11, 4), Neighborhood((5, 3), (3, 2), 1, (True, False)), dict(bands=(4, 2, 5))),
    "causal dilated window": (2, (13, 3), Neighborhood((3, 2), (2, 1), (3, 1), (True, True)), dict(bands=(3, 10))),
    "video": (2, (5, 4, 3), Neighborhood((3, 3, 2), (2, 1, 1)), dict(text=2)),
    "sequence": (4, (17,), Neighborhood(6, 4), {}),
    "whole columns": (2, (6, 5), Cross(3, 2), dict(text=1)),
    "grouped heads": (3, (9, 4), Disk(3), dict(text=3, kv_heads=1, text_sharded=True)),
    "one process": (1, (4, 4), Disk(2), dict(text=2)),
}


def noise(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part_of(x, split: Split, rank: int, text: int, text_first: bool):
    """A process's tokens of a whole sequence."""
    words, image = (x[:, :text], x[:, text:]) if text_first else (x[:, x.shape[1] - text :], x[:, : x.shape[1] - text])
    a, b = split.bounds(rank)
    if split.text is not None:
        start = sum(split.text[:rank])
        words = words[:, start : start + split.text[rank]]
    parts = [words, image[:, a:b]]
    return torch.cat(parts if text_first else parts[::-1], 1)


def run_case(name: str, groups) -> float:
    size, grid, pattern, options = CASES[name]
    options = dict(options)
    text, text_first = options.get("text", 0), options.get("text_first", True)
    lengths, kv_heads = options.pop("lengths", None), options.pop("kv_heads", 2)
    options |= dict(text_lengths=None if lengths is None else torch.tensor(lengths), scale=0.6)
    bands = options.get("bands") or shares(grid[0], size)
    row = torch.Size(grid[1:]).numel()
    split = Split(grid, tuple(b * row for b in bands), shares(text, size) if options.get("text_sharded") else None)
    rank = dist.get_rank(groups[size])

    n = text + grid[0] * row
    leaves = [noise(2, n, heads, 4, seed=i).requires_grad_() for i, heads in enumerate((2, kv_heads, kv_heads))]
    weight = noise(2, n, 2, 4, seed=9)
    single = {key: v for key, v in options.items() if key not in ("bands", "text_sharded")}
    whole = local_attention(*leaves, grid, pattern, **single, backend="reference")
    expected = torch.autograd.grad((whole * weight).sum(), leaves)

    own = [part_of(x.detach(), split, rank, text, text_first).requires_grad_() for x in leaves]
    out = local_attention_bands(*own, grid, pattern, **options, group=groups[size])
    with torch.no_grad():  # text rows by PyTorch's fused attention
        plain = local_attention_bands(*own, grid, pattern, **options, group=groups[size])
    error = max((x - part_of(whole, split, rank, text, text_first)).abs().max().item() for x in (out, plain))

    own_weight = part_of(weight, split, rank, text, text_first).clone()
    words = slice(0, text) if text_first else slice(out.shape[1] - text, None)
    if split.text is None:
        own_weight[:, words] *= 2.0 * (rank + 1) / (size * (size + 1))  # every process has its share of the text's loss
    grads = torch.autograd.grad((out * own_weight).sum(), own)
    for grad, e in zip(grads, expected, strict=True):
        grad = grad.clone()
        if split.text is None and text:
            copies = grad[:, words].contiguous()
            dist.all_reduce(copies, group=groups[size])
            grad[:, words] = copies
        error = max(error, (grad - part_of(e, split, rank, text, text_first)).abs().max().item())
    return error


def run_ragged(groups) -> float:
    """Bands that end inside rows, a process without grid tokens, pooling over processes: as diffusers splits."""
    rank, grid, text = dist.get_rank(), (6, 8), 4
    split = Split(grid, (13, 24, 11, 0), (1, 0, 1, 2))
    q, k, v = (noise(1, text + 48, 2, 4, seed=i) for i in range(3))
    weight = noise(2, 2, seed=5)
    pooled = [pool_tokens(x[:, text:], grid, 2, weight) for x in (k, v)]
    whole = local_attention(q, k, v, grid, Disk(3), text, extra_k=pooled[0], extra_v=pooled[1], backend="reference")
    own = [part_of(x, split, rank, text, True).requires_grad_() for x in (q, k, v)]
    image = [x[:, split.text[rank] :] for x in own[1:]]
    mine = pool_over(torch.stack(image), split, 2, weight)
    error = max((a - b).abs().max().item() for a, b in zip(mine, pooled, strict=True))
    out = attend_split(*own, split, Disk(3), extra_k=mine[0], extra_v=mine[1])
    torch.autograd.grad(out.sum(), own)  # ends at every process
    return max(error, (out - part_of(whole, split, rank, text, True)).abs().max().item())


def run_heads(groups) -> float:
    """Ulysses there and back, with a number of heads and tokens that the processes do not divide."""
    rank = dist.get_rank()
    runs, heads = (shares(6, 4), (5, 1, 0, 3)), shares(7, 4)
    whole = [noise(2, sum(run), 7, 3, seed=i) for i, run in enumerate(runs)]
    own = torch.cat([x.split(run, 1)[rank] for x, run in zip(whole, runs, strict=True)], 1).requires_grad_()
    there = heads_for_tokens(own, runs, heads)
    expected = torch.cat(whole, 1).split(heads, 2)[rank]
    back = tokens_for_heads(there, runs, heads)
    weight = torch.randn_like(own)
    (grad,) = torch.autograd.grad((back * weight).sum(), own)
    return max((a - b).abs().max().item() for a, b in ((there, expected), (back, own), (grad, weight)))


def run_all(rank: int, out: Path) -> None:
    groups = {size: dist.new_group(range(size)) for size in (1, 2, 3)} | {4: dist.group.WORLD}
    results = {}
    for name, (size, *_) in CASES.items():
        if rank < size:
            results[name] = run_case(name, groups)
    results["ragged"] = run_ragged(groups)
    results["heads"] = run_heads(groups)
    if rank < 2:
        try:
            x = noise(1, 7, 2, 4, seed=0)
            local_attention_bands(x, x, x, (4, 3), Disk(2), group=groups[2])
        except ValueError as e:
            results["error"] = str(e)
    (out / f"all-{rank}.json").write_text(json.dumps(results))


def lose_one(rank: int, out: Path) -> None:
    """The last process ends in the middle; the others have to notice."""
    x = noise(1, 8, 2, 4, seed=0)
    local_attention_bands(x, x, x, (8 * WORLD,), Neighborhood(6))
    if rank == WORLD - 1:
        os._exit(0)
    start, message = time.monotonic(), "nothing happened"
    try:
        local_attention_bands(x, x, x, (8 * WORLD,), Neighborhood(6))
    except RuntimeError as e:
        message = str(e)
    (out / f"lose-{rank}.json").write_text(json.dumps({"message": message, "seconds": time.monotonic() - start}))


def join(rank: int, folder: Path, name: str, size: int = WORLD, seconds: int = 120) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{name}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )  # fmt: skip


def fork(work, size: int = WORLD) -> int:
    """Runs ``work(rank)`` in forked processes; the number of those that failed."""
    torch.set_num_threads(1)
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(rank)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


if __name__ == "__main__":
    folder = Path(sys.argv[1])

    def all_cases(rank):
        join(rank, folder, "all")
        run_all(rank, folder)

    def a_lost_process(rank):
        join(rank, folder, "lose", seconds=20)
        lose_one(rank, folder)

    sys.exit(fork(all_cases) + fork(a_lost_process))
