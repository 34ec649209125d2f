"""The Triton kernels of mixture-of-head attention, interpreted on a CPU. test_moh.py runs this file."""

import pytest
import torch

from tests.interpreter import need_interpreter, uninitialised_is_nan  # noqa: F401
from visionattn.ops.moh import fused, moh_attention
from visionattn.ops.moh.reference import moh_attention_reference

need_interpreter()

# B, N, M, heads, D, share of tokens that choose a head, tiles, dtype
SMALL = fused.Tiles(16, 16, 4, 1)
HALVES = fused.Tiles(32, 16, 4, 1)
TMA = fused.Tiles(32, 16, 4, 1, tma=True)
CASES = {
    "tiles that do not fit": (2, 37, 37, 3, 16, 0.5, SMALL, torch.float32),
    "keys that fit": (1, 40, 32, 2, 32, 0.7, SMALL, torch.float32),
    "72 channels as 64 and 16": (1, 20, 19, 2, 72, 0.5, SMALL, torch.float32),
    "24 channels": (1, 33, 17, 2, 24, 0.5, SMALL, torch.float32),
    "12 channels": (1, 33, 17, 2, 12, 0.5, SMALL, torch.float32),
    "more tokens than a chunk": (1, 1100, 16, 1, 16, 0.02, SMALL, torch.float32),
    "all and none": (1, 24, 24, 3, 16, None, SMALL, torch.float32),
    "half tiles": (2, 37, 37, 9, 16, 0.3, HALVES, torch.float32),
    "half tiles, all and none": (1, 48, 24, 3, 16, None, HALVES, torch.float32),
    "descriptors": (2, 37, 37, 3, 16, 0.6, TMA, torch.float32),
    "descriptors, 24 channels": (1, 40, 21, 2, 24, 0.5, TMA, torch.float16),
    "half precision": (1, 40, 40, 2, 16, 0.5, SMALL, torch.float16),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3}


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """x as a view of a larger tensor of NaN: what a kernel reads beside it shows."""
    before = [2] * (x.dim() - 1) + [8]  # descriptors want addresses and strides of 16 bytes
    big = torch.full([n + 2 * m for n, m in zip(x.shape, before, strict=True)], float("nan"), dtype=x.dtype)
    view = big[tuple(slice(m, m + n) for n, m in zip(x.shape, before, strict=True))]
    return view.copy_(x)


def problem(case):
    B, N, M, heads, dim, share, tiles, dtype = CASES[case]
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, heads, dim).to(dtype) for n in (N, M, M))
    gates = torch.rand(B, N, heads) + 0.1
    if share is None:
        gates[..., 1] = 0.0  # nobody; head 0 and 2 are everybody's
    else:
        gates = gates * (torch.rand(B, N, heads) < share)
    return q, k, v, gates, dim**-0.5, tiles


@pytest.mark.parametrize("case", CASES)
def test_kernels(case):
    q, k, v, gates, scale, tiles = problem(case)
    expected = moh_attention_reference(q.double(), k.double(), v.double(), gates.double(), scale)
    assert not tiles.tma or fused.suits_descriptor(inside_nan(k))
    got = fused.forward(inside_nan(q), inside_nan(k), inside_nan(v), inside_nan(gates), scale, tiles)
    assert ((got.double() - expected).norm() / expected.norm()).item() < TOLERANCE[q.dtype]
    assert (got[gates == 0] == 0).all()


def test_items_cover_every_slot_once():
    """Of each (image, head): queries that chose it in items of at most `parts` x 64; the others are rows of zeros."""
    torch.manual_seed(0)
    gates = inside_nan((torch.rand(2, 1100, 5) < torch.tensor([0.0, 0.05, 0.5, 0.97, 1.0])).float())
    for parts in (2, 3):
        order, work, zeros, totals = fused.list_tokens(gates, parts)
        work, zeros = work[: int(totals[0])], zeros[: int(totals[1])]
        assert torch.equal(zeros.sort().values.long(), (gates.flatten() == 0).nonzero().flatten())
        for pair, (row, chosen) in enumerate(
            zip(order.flatten(0, 1), gates.transpose(1, 2).flatten(0, 1), strict=True)
        ):
            count = int(chosen.sum())
            assert torch.equal(row[:count].long(), chosen.nonzero().flatten())
            queries = []
            for _, first, end in work[work[:, 0] == pair].tolist():
                assert first % 64 == 0 and 0 < end - first <= 64 * parts
                queries += range(first, end)
            assert sorted(queries) == list(range(count))


def test_operator():
    q, k, v, gates, scale, _ = problem("keys that fit")
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.visionattn.moh_attention.default, (q, k, v, gates, scale))
    expected = moh_attention(q, k, v, gates, backend="reference")
    torch.testing.assert_close(moh_attention(q, k, v, gates, backend="triton"), expected)
    program = torch.compile(lambda *args: moh_attention(*args, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(program(q, k, v, gates), expected)
    with pytest.raises(ValueError, match="no gradient"):
        moh_attention(q.requires_grad_(), k, v, gates, backend="triton")
