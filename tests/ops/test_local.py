"""Local attention on a CPU: patterns against their words, the reference against loops, merging, bad input."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interpreter import interpret
from visionattn.ops.local import (
    Axis,
    Cross,
    Disk,
    Neighborhood,
    local_attention,
    merge,
    planner,
    pool_tokens,
    worthwhile,
)
from visionattn.ops.local import text as text_rows
from visionattn.ops.local.call import make_call
from visionattn.ops.local.counts import visits


def window_in_words(axis: Axis) -> list[set[int]]:
    """The keys of each query of one axis, as sparse_diffusion's definition reads, without arrays."""
    out = []
    for token in range(axis.length):
        group = [t for t in range(axis.length) if t % axis.dilation == token % axis.dilation]
        i, n = group.index(token), len(group)
        if axis.causal:
            leader = min(i // axis.stride * axis.stride + axis.stride - 1, n - 1)
            seen = range(max(leader - axis.window + 1, 0), i + 1)
        else:
            leader = min(i // axis.stride * axis.stride + axis.stride // 2, n - 1)
            start = min(max(leader - axis.window // 2, 0), n - axis.window)
            seen = range(start, start + axis.window)
        out.append({group[j] for j in seen})
    return out


@st.composite
def axes(draw, longest=40):
    window = draw(st.integers(1, longest // 2))
    dilation = draw(st.integers(1, longest // window))
    length = draw(st.integers(window * dilation, longest))
    return Axis(length, window, draw(st.integers(1, window)), dilation, draw(st.booleans()))


@settings(max_examples=600, deadline=None)
@given(axes())
def test_axis(axis):
    words, mask = window_in_words(axis), axis.mask()
    assert [set(row.nonzero()[0]) for row in mask] == words
    assert axis.pairs() == mask.sum()
    for group in range(min(axis.dilation, axis.length)):
        n = axis.group_length(group)
        inside = mask[group :: axis.dilation, group :: axis.dilation]
        for j in range(n):
            first, after = (int(x) for x in axis.queries(j, n))
            assert set(range(first, after)) == set(inside[:, j].nonzero()[0]), j


@pytest.mark.parametrize("grid", [(7,), (6, 9), (3, 5, 4)])
@pytest.mark.parametrize("radius", [1, 2, 2.5, 4, 30])
def test_disk(grid, radius):
    mask = Disk(radius).mask(grid)
    tokens = list(itertools.product(*map(range, grid)))
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            assert mask[i, j] == (math.dist(a, b) < radius)
    assert Disk(radius).pairs(grid) == mask.sum()
    assert Disk(radius).dense(grid) == mask.all()


def test_disk_sizes():
    """Keys of an interior query, as CLEAR's paper counts them."""
    for radius, count in {8: 193, 16: 793, 24: 1789, 32: 3205}.items():
        grid = (2 * radius + 1, 2 * radius + 1)
        assert Disk(radius).mask(grid, (2 * radius + 2) * radius, (2 * radius + 2) * radius + 1).sum() == count


def test_cross():
    grid = (7, 9)
    pattern = Cross(3, 2, stride=2)
    rows, cols = pattern.axes(grid)
    expected = torch.from_numpy(rows.mask())[:, None, :, None] | torch.from_numpy(cols.mask())[None, :, None, :]
    mask = pattern.mask(grid)
    assert torch.equal(mask, expected.reshape(63, 63))
    assert pattern.pairs(grid) == mask.sum()


PATTERNS = {
    "window": ((5, 6), Neighborhood(3)),
    "uneven": ((5, 8), Neighborhood((2, 4), (1, 3), (2, 1))),
    "causal": ((9,), Neighborhood(4, 2, 2, True)),
    "video": ((3, 4, 4), Neighborhood((2, 3, 4), (1, 2, 1), 1, (True, False, False))),
    "disk": ((6, 5), Disk(2.5)),
    "cross": ((5, 6), Cross(2, 3)),
}


def tensors(grid, text, heads=2, key_heads=2, dim=4, extra=0, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    n = math.prod(grid) + text
    shapes = [(2, n, heads, dim), (2, n, key_heads, dim), (2, n, key_heads, dim)]
    shapes += [(2, extra, key_heads, dim)] * 2 if extra else []
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_reference(name, text_first):
    """Against one query at a time, with everything on: text of two lengths, extra keys, grouped heads, bias."""
    grid, pattern = PATTERNS[name]
    n, text = math.prod(grid), 3
    q, k, v, extra_k, extra_v = tensors(grid, text, 4, 2, extra=2)
    lengths = torch.tensor([2, 3])
    biased = isinstance(pattern, Neighborhood)
    bias = torch.randn(4, *(2 * a.window - 1 for a in pattern.axes(grid)), dtype=q.dtype) if biased else None
    out, lse = local_attention(
        q, k, v, grid, pattern, text, text_first, lengths, extra_k, extra_v, bias, 0.7, "reference", return_lse=True
    )
    mask = pattern.mask(grid)
    first, text_at = (text, 0) if text_first else (0, n)
    tokens = list(itertools.product(*map(range, grid)))
    for b, i, h in itertools.product(range(2), range(n + text), range(4)):
        keys, values, offsets = [], [], []
        for j in range(n + text):
            is_text, sees_all = text_at <= j < text_at + text, not first <= i < first + n
            if (is_text and j - text_at >= lengths[b]) or not (is_text or sees_all or mask[i - first, j - first]):
                continue
            keys.append(k[b, j, h // 2])
            values.append(v[b, j, h // 2])
            offset = 0.0
            if biased and not is_text and not sees_all:
                steps = zip(tokens[i - first], tokens[j - first], pattern.axes(grid), strict=True)
                offset = bias[(h, *((y - x) // a.dilation + a.window - 1 for x, y, a in steps))]
            offsets.append(offset)
        if first <= i < first + n:
            keys, values = [*keys, *extra_k[b, :, h // 2]], [*values, *extra_v[b, :, h // 2]]
            offsets += [0.0, 0.0]
        logits = torch.stack(keys) @ q[b, i, h] * 0.7 + torch.tensor(offsets, dtype=q.dtype)
        torch.testing.assert_close(out[b, i, h], logits.softmax(0) @ torch.stack(values))
        torch.testing.assert_close(lse[b, h, i], logits.logsumexp(0))


def test_reference_chunks(monkeypatch):
    grid, pattern = PATTERNS["uneven"]
    q, k, v = tensors(grid, 3)
    whole = local_attention(q, k, v, grid, pattern, 3, backend="reference", return_lse=True)
    monkeypatch.setattr("visionattn.ops.local.reference._CHUNK", 2000)
    torch.testing.assert_close(local_attention(q, k, v, grid, pattern, 3, backend="reference", return_lse=True), whole)


@pytest.mark.parametrize("name", PATTERNS)
def test_gradients(name):
    grid, pattern = PATTERNS[name]
    q, k, v, extra_k, extra_v = tensors(grid, 2, 1, 1, dim=2, extra=1)
    biased = isinstance(pattern, Neighborhood)
    bias = torch.randn(1, *(2 * a.window - 1 for a in pattern.axes(grid)), dtype=q.dtype) if biased else None
    leaves = [t[:1].detach().requires_grad_() for t in (q, k, v, extra_k, extra_v)]
    if biased:
        leaves.append(bias.requires_grad_())

    def run(q, k, v, extra_k, extra_v, bias=None):
        return local_attention(
            q, k, v, grid, pattern, 2, extra_k=extra_k, extra_v=extra_v, bias=bias, backend="reference", return_lse=True
        )

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("name", PATTERNS)
def test_sdpa(name):
    grid, pattern = PATTERNS[name]
    q, k, v, extra_k, extra_v = tensors(grid, 3, 4, 2, extra=2)
    biased = isinstance(pattern, Neighborhood)
    bias = torch.randn(4, *(2 * a.window - 1 for a in pattern.axes(grid)), dtype=q.dtype) if biased else None
    given = (grid, pattern, 3, False, torch.tensor([2, 3]), extra_k, extra_v, bias)
    torch.testing.assert_close(
        local_attention(q, k, v, *given, backend="sdpa"), local_attention(q, k, v, *given, backend="reference")
    )


def test_window_of_the_grid_is_dense():
    q, k, v = tensors((4, 5), 3)
    dense = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    for pattern in (Neighborhood((4, 5)), Neighborhood(9), Disk(40), Cross(4, 1)):
        for backend in ("reference", "sdpa", "auto"):
            torch.testing.assert_close(local_attention(q, k, v, (4, 5), pattern, 3, backend=backend), dense)


def test_pooled_keys():
    grid = (4, 6)
    q, k, v = tensors(grid, 3)
    keys, values = (t[:, 3:].reshape(2, 2, 2, 3, 2, 2, 4).mean((2, 4)).reshape(2, 6, 2, 4) for t in (k, v))
    torch.testing.assert_close(
        local_attention(q, k, v, grid, Disk(2, downsample=2), 3),
        local_attention(q, k, v, grid, Disk(2), 3, extra_k=keys, extra_v=values),
    )
    weight = torch.rand(2, 2, dtype=k.dtype)
    pooled = pool_tokens(k[:, 3:], grid, 2, weight)
    expected = (k[:, 3:].reshape(2, 2, 2, 3, 2, 2, 4) * weight[None, None, :, None, :, None, None]).sum((2, 4))
    torch.testing.assert_close(pooled, expected.reshape(2, 6, 2, 4))
    assert Disk(2, 2).pairs(grid) == Disk(2).pairs(grid) + 24 * 6


def test_merge():
    q, k, v = tensors((12,), 0)
    parts = [
        local_attention(q, k, v, (12,), Neighborhood(12, causal=True), return_lse=True),
        local_attention(q.flip(1), k.flip(1), v.flip(1), (12,), Neighborhood(12, causal=True), return_lse=True),
    ]
    # keys up to the query, and keys from the query on: joined, each query counts its own key twice
    out, lse = merge([parts[0][0], parts[1][0].flip(1)], [parts[0][1], parts[1][1].flip(2)])
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2 + torch.eye(12, dtype=q.dtype) * math.log(2)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v))
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    empty = torch.full_like(lse, float("-inf"))
    torch.testing.assert_close(merge([out, torch.zeros_like(out)], [lse, empty])[0], out)
    leaves = [t.detach()[:1, :, :1].requires_grad_() for t in (out, out.flip(1))]
    lses = [t.detach()[:1, :1].requires_grad_() for t in (lse, lse.flip(2))]
    assert torch.autograd.gradcheck(lambda a, b, c, d: merge([a, b], [c, d]), (*leaves, *lses))
    with pytest.raises(ValueError, match="2 outputs and 1"):
        merge([out, out], [lse])
    with pytest.raises(ValueError, match="two lists of tensors"):
        merge(out, lse)
    for outs, table in ([out, out], lse.mT), ([out, out], lse[:1]), ([out, out[:, :, :1]], lse):
        with pytest.raises(ValueError, match=r"with log-sum-exps .*: give \(batch, tokens"):
            merge(outs, [table, table])


def test_numbers_of_any_kind():
    """Lengths from NumPy, tensors or a division are whole numbers too."""
    q, k, v = tensors((4, 6), 0)
    expected = local_attention(q, k, v, (4, 6), Neighborhood((3, 2)))
    for grid in ([4, 6], torch.tensor([4, 6]), np.array([4, 6]), (8 / 2, 6.0), torch.Size([4, 6])):
        assert torch.equal(local_attention(q, k, v, grid, Neighborhood(np.array([3, 2]))), expected)


BAD = {
    "grid 20 tokens": (dict(grid=(4, 5), text=1), r"grid \(4, 5\) has 20 tokens, with text=1 that makes 21.*24"),
    "dilation": (dict(pattern=Neighborhood(3, dilation=2)), "window 3 x dilation 2 = 6 exceeds the axis of length 4"),
    "stride": (dict(pattern=Neighborhood(2, 3)), "stride=3 exceeds window=2"),
    "axes": (dict(pattern=Neighborhood((2, 2, 2))), "3 entries"),
    "backend": (dict(backend="fast"), "backend='fast' is unknown"),
    "pattern": (dict(pattern=7), "pattern is a int"),
    "pool": (dict(pattern=Disk(2, downsample=4)), "downsample=4 does not divide"),
    "dtype": (dict(k=torch.zeros(2, 24, 2, 4)), "give one floating-point dtype"),
    "heads": (dict(k=torch.zeros(2, 24, 3, 4).double(), v=torch.zeros(2, 24, 3, 4).double()), "2 heads, k and v 3"),
    "lengths": (dict(text=4, grid=(4, 5), text_lengths=torch.tensor([1])), "text_lengths has shape"),
    "bias": (dict(bias=torch.zeros(2, 5, 3).double()), r"bias has shape \[2, 5, 3\]"),
    "bias kind": (dict(pattern=Disk(2), bias=torch.zeros(2, 5, 5).double()), "Disk has none"),
    "extra": (dict(extra_k=torch.zeros(2, 3, 2, 4).double()), "go together"),
    "no tensor": (dict(q=None), "q is a NoneType: give a tensor"),
    "list of lengths": (dict(text=12, grid=(2, 6), text_lengths=[3, 4]), "text_lengths is a list: give a tensor"),
    "grid of one number": (dict(grid=24), "grid=24: give 1 to 3 positive lengths"),
    "part of a token": (dict(grid=(4.5, 6)), r"grid=\(4.5, 6\): give 1 to 3 positive lengths"),
    "part of a key": (dict(pattern=Neighborhood(2.5)), "window=2.5: give whole numbers"),
    "part of a step": (dict(pattern=Neighborhood(2, dilation=(1, 1.5))), r"dilation=\(1, 1.5\): give whole numbers"),
    "causal": (dict(pattern=Neighborhood(2, causal="no")), "causal=no: give True or False"),
    "cross": (dict(pattern=Cross(1.5, 2)), r"window=\(1.5, 2\): give whole numbers"),
    "radius": (dict(pattern=Disk("3")), "radius=3: give a positive radius, one number"),
    "endless": (dict(pattern=Disk(math.inf)), "radius=inf: give a positive radius"),
    "pool of a float": (dict(pattern=Disk(2, 2.0)), "downsample=2.0 does not divide"),
    "text": (dict(text=2.0), "text=2.0: give the number of text tokens"),
    "scale": (dict(scale=math.nan), "scale=nan: give a finite number"),
    "lse": (dict(backend="sdpa", return_lse=True), "backend='sdpa' cannot run"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, message = BAD[name]
    q, k, v = tensors((4, 6), 0)
    with pytest.raises(ValueError, match=message) as caught:
        local_attention(**{**dict(q=q, k=k, v=v, grid=(4, 6), pattern=Neighborhood(3)), **change})
    assert "\n" not in str(caught.value)


HERE = Path(__file__).parent
# the kernels one by one take minutes in an interpreter: the shortest of each kind here, the others are slow tests
QUICK = "text_rows or test_kernels and (window or disk or bias) and not (larger or dilated or line)"


def test_interpreted():
    """tests/ops/interpreted_local.py, where Triton is imported as an interpreter."""
    interpret(HERE / "interpreted_local.py", only=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "part", [f"test_kernels and not ({QUICK})", "not test_kernels and not text_rows"], ids=["kernels", "rest"]
)
def test_interpreted_others(part):
    interpret(HERE / "interpreted_local.py", only=part)


@st.composite
def visited_axes(draw):
    axis = draw(axes(24))
    return axis, draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4, 8]))


@settings(max_examples=300, deadline=None)
@given(visited_axes())
def test_visits_by_brute_force(case):
    """Anchored tiles of keys begin at a query tile's first key, aligned ones lie on the raster."""
    axis, own, other = case
    pattern = Neighborhood(axis.window, axis.stride, axis.dilation, axis.causal)
    mask = axis.mask()
    for placement in ("anchored", "aligned"):
        visited = full = 0
        for group in range(axis.dilation):
            part = mask[group :: axis.dilation, group :: axis.dilation]
            n = len(part)
            for a in range(0, n, own):
                rows = part[a : a + own]
                keys = rows.any(0).nonzero()[0]
                first = int(keys[0]) if placement == "anchored" else int(keys[0]) // other * other
                for b in range(first, int(keys[-1]) + 1, other):
                    visited += 1
                    tile = rows[:, b : b + other]
                    full += bool(tile.all()) and (placement == "aligned" or b + other <= n)
        found = visits(pattern, (axis.length,), (1, 1, own), (1, 1, other), placement)
        assert found == (visited, full), placement


def test_chunks_of_text_rows():
    """All keys are in a chunk or left over, never one alone; 96 blocks on 132 multiprocessors are cut, many are not."""
    for keys in (*range(1, 300), 4173, 65613, 66048):
        for count in range(1, min(keys, 17)):
            found = text_rows.cut(keys, count)
            left = keys - found.count * found.keys
            assert found.keys > 0 and left >= 0 and left != 1, (keys, count)
            assert found.count == (count if keys >= 4 * count else 1)
    assert text_rows.pick_chunks(96, 66048, 132) == text_rows.Chunks(4, 16512)
    assert text_rows.pick_chunks(96 * 64, 66048, 132).count == 1
    assert text_rows.pick_chunks(96, 1000, 132).count == 1
    q = torch.zeros(1, 600, 2, 128, dtype=torch.bfloat16)
    assert text_rows.choose(q, q, q, None, 512, 90, "auto") is None  # on a CPU
    assert text_rows.takes(90, 512, 128) and not text_rows.takes(80, 512, 128) and not text_rows.takes(90, 77, 128)


def test_worthwhile_needs_a_gpu_and_a_gain():
    arguments = (24, 128, torch.bfloat16)
    assert not worthwhile((256, 256), Disk(16), 512, *arguments, "cpu")
    q = torch.empty(1, 1, 24, 128, device="meta", dtype=torch.bfloat16)
    faster = {}
    for side in (64, 128, 256):
        x = q.expand(1, side * side + 512, 24, 128)
        faster[side] = planner.is_predicted_faster(make_call(x, x, x, (side, side), Disk(16), 512))
    assert faster == {64: False, 128: True, 256: True}
    x = q.expand(1, 64 * 64 + 512, 24, 128)
    assert not planner.is_predicted_faster(make_call(x, x, x, (64, 64), Disk(32), 512))  # 0.55 ms against 0.44
    with pytest.raises(ValueError, match="grid=256: give 1 to 3"):
        worthwhile(256, Disk(16), 512, *arguments, "cuda")
    with pytest.raises(ValueError, match="exceeds the axis"):
        worthwhile((4, 4), Neighborhood(3, dilation=2), 0, *arguments, "cuda")


def test_one_graph_of_any_size():
    """Grid, text and heads symbolic: a text's length comes from a tensor's shape in the diffusers' networks."""

    def joint(image, text, h, w):
        x = torch.cat([text, image], 1)
        return local_attention(x, x, x, (h, w), Neighborhood(3, causal=True), text.shape[1])

    compiled = torch.compile(joint, fullgraph=True, dynamic=True, backend="eager")
    for h, w, t in ((4, 5, 2), (6, 3, 7)):
        inputs = torch.randn(1, h * w, 2, 8), torch.randn(1, t, 2, 8), h, w
        torch.testing.assert_close(compiled(*inputs), joint(*inputs))
