"""Graph attention: reference, structures, encodings, and (in a process of its own) the interpreted kernels."""

import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from tests.interpreter import interpret
from visionattn.ops.graph import (
    Graph,
    can_run_triton,
    degree_roles,
    graph_attention,
    graph_attention_reference,
    grid_laplacian_basis,
    laplacian_eigenvectors,
    laplacian_encoding,
    make_graph,
    neighbour_attention_reference,
)
from visionattn.ops.graph.encodings import flip_signs

HERE = Path(__file__).parent


def random_graph(N=7, share=0.5, seed=0):
    torch.manual_seed(seed)
    src, dst = (torch.rand(N, N) < share).nonzero(as_tuple=True)
    order = torch.randperm(len(src))
    return make_graph(src[order], dst[order], N)


def brute_force(q, k, v, graph, e, eps):
    """One node, one head, one edge at a time, from the paper's formula."""
    N, H, D = q.shape
    out = torch.zeros_like(v)
    for i in range(N):
        for n in range(H):
            edges = [m for m in range(len(graph.src)) if graph.dst[m] == i]
            logits = [sum(float(q[i, n, c] * k[graph.src[m], n, c]) / math.sqrt(D)
                          * (1.0 if e is None else float(e[m, n, c])) for c in range(D)) for m in edges]  # fmt: skip
            weights = [math.exp(min(5.0, max(-5.0, s))) for s in logits]
            for w, m in zip(weights, edges, strict=True):
                out[i, n] += w / (sum(weights) + eps) * v[graph.src[m], n]
    return out


@pytest.mark.parametrize("with_edges", [False, True])
def test_reference_is_the_formula(with_edges):
    graph = random_graph()
    q, k, v = torch.randn(3, 7, 2, 3, dtype=torch.float64) * torch.tensor([6.0, 1.0, 1.0])[:, None, None, None]
    e = torch.randn(len(graph.src), 2, 3, dtype=torch.float64) if with_edges else None
    out, scores = graph_attention(q, k, v, graph, e)
    assert torch.allclose(out, brute_force(q, k, v, graph, e, 1e-6 if with_edges else 0.0), atol=1e-12)
    assert (scores is None) == (e is None)


@pytest.mark.parametrize("with_edges", [False, True])
def test_gradcheck(with_edges):
    graph = random_graph(5)
    q, k, v = (torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    e = torch.randn(len(graph.src), 2, 3, dtype=torch.float64, requires_grad=True) if with_edges else None

    def call(*args):
        out, scores = graph_attention_reference(*args[:3], graph.src, graph.dst, *args[3:])
        return out, scores

    assert torch.autograd.gradcheck(call, (q, k, v, *([e] if with_edges else [])))


@pytest.mark.parametrize("per_sample", [False, True])
def test_neighbour_attention(per_sample):
    """Fixed degree, with and without places that pad it, is the general form."""
    torch.manual_seed(0)
    B, N, K = 2, 6, 3
    neighbour = torch.stack([torch.stack([torch.randperm(N)[:K] for _ in range(N)]) for _ in range(B)])
    valid = torch.rand(B, N, K) < 0.7
    if not per_sample:
        neighbour, valid = neighbour[0], valid[0]
    q, k, v = torch.randn(3, B, N, 2, 4, dtype=torch.float64)
    for mask in (valid, None):
        got = neighbour_attention_reference(q, k, v, neighbour, mask)
        for b in range(B):
            index = neighbour[b] if per_sample else neighbour
            keep = torch.ones_like(index, dtype=torch.bool) if mask is None else mask[b] if per_sample else mask
            dst, place = keep.nonzero(as_tuple=True)
            expected, _ = graph_attention_reference(q[b], k[b], v[b], index[dst, place], dst)
            assert torch.allclose(got[b], expected, atol=1e-12)


def test_low_precision_sums_in_float32():
    graph = random_graph(40, 0.9)
    q, k, v = torch.randn(3, 40, 2, 8)
    out, _ = graph_attention(*(x.bfloat16() for x in (q, k, v)), graph)
    exact, _ = graph_attention(*(x.bfloat16().double() for x in (q, k, v)), graph)
    assert out.dtype == torch.bfloat16 and (out.double() - exact).norm() / exact.norm() < 1e-2


@given(st.integers(0, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_csr(extra, pairs):
    N = 6 + extra
    src, dst = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    graph = Graph(src, dst, N)
    for csr, at, other in ((graph.incoming(), dst, src), (graph.outgoing(), src, dst)):
        for i in range(N):
            part = slice(int(csr.start[i]), int(csr.start[i + 1]))
            assert csr.edge[part].tolist() == (at == i).nonzero().flatten().tolist()
            assert csr.neighbour[part].tolist() == other[at == i].tolist()


def test_errors_are_one_line():
    graph = random_graph()
    q = torch.randn(7, 2, 3)
    assert can_run_triton(q) == (False, "the kernels need a CUDA tensor, got one on cpu")
    calls = [
        (lambda: graph_attention(q, q, q, graph, backend="triton"), "need a CUDA tensor"),
        (lambda: graph_attention(q, q, q, graph, backend="csr"), "auto, reference, triton"),
        (lambda: graph_attention(q[:3], q[:3], q[:3], graph), "N=7"),
        (lambda: graph_attention(q, q, q, graph, torch.ones(1, 2, 3)), "for these edges"),
        (lambda: make_graph(graph.src, graph.dst[1:], 7), "one shape"),
        (lambda: make_graph(graph.src, graph.dst, 7, torch.zeros(3).long()), "one graph a node"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_encodings_fixture():
    manifest, expected = fx.load(FIXTURES / "graph_transformer/positional_encodings")
    graph = make_graph(torch.from_numpy(expected["input_src"]), torch.from_numpy(expected["input_dst"]), 14)
    vectors, values = laplacian_eigenvectors(graph.src, graph.dst, 14, manifest["config"]["pos_enc_dim"])
    assert relative_error(vectors.abs(), expected["lap_pos_enc_abs"]) < 1e-5  # of a float32 solver
    assert relative_error(values, expected["eigenvalues"]) < 1e-6
    assert degree_roles(graph).tolist() == expected["wl_pos_enc"].tolist()


def test_encodings_of_a_union():
    """Graphs in a union, nodes in any order, have the encodings that each has alone; small ones are padded."""
    torch.manual_seed(0)
    sizes, edges, first = [9, 2, 6, 1], [], 0
    for n in sizes:
        a = (torch.rand(n, n) < 0.6).triu(1)
        edges.append((a | a.T).nonzero() + first)
        first += n
    src, dst = torch.cat(edges).unbind(1)
    ids = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    shuffle = torch.randperm(first)
    shuffled_ids = torch.empty_like(ids)
    shuffled_ids[shuffle] = ids
    union = make_graph(shuffle[src], shuffle[dst], first, shuffled_ids, 4)
    for threads in (1, 3):
        got = laplacian_encoding(union, 3, threads)[shuffle]
        roles = degree_roles(union)[shuffle]
        for i, n in enumerate(sizes):
            nodes = (ids == i).nonzero().flatten()
            mine = edges[i] - nodes[0]
            expected, _ = laplacian_eigenvectors(mine[:, 0], mine[:, 1], n, 3)
            assert expected.shape == (n, 3) and torch.allclose(got[nodes].abs(), expected.float().abs(), atol=1e-5)
            alone = make_graph(mine[:, 0], mine[:, 1], n)
            assert torch.equal(degree_roles(alone), roles[nodes])
    assert (got[(ids == 1).nonzero().flatten()][:, 1:] == 0).all()


def test_directed_graphs_are_symmetrised():
    src, dst = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0])
    both = laplacian_eigenvectors(torch.cat([src, dst]), torch.cat([dst, src]), 4, 2)[1]
    assert torch.allclose(laplacian_eigenvectors(src, dst, 4, 2)[1], both)


def test_roles_rank_the_digests():
    star = make_graph(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]), 5)
    text = {d: hashlib.md5(("1" + "_1" * d).encode()).hexdigest() for d in (0, 1, 3)}
    rank = {d: sorted(text.values()).index(t) + 1 for d, t in text.items()}
    assert degree_roles(star).tolist() == [rank[3], rank[1], rank[1], rank[1], rank[0]]


@pytest.mark.parametrize("grid", [(5, 5), (4, 7), (1, 6)])
def test_grid_basis(grid):
    """Eigenvectors of the grid's Laplacian, orthonormal, of the smallest eigenvalues; pairs stay separable."""
    H, W = grid
    k = min(5, H * W - 1)
    basis = grid_laplacian_basis(grid, k).double()
    y, x = torch.arange(H * W) // W, torch.arange(H * W) % W
    near = ((y[:, None] - y).abs() + (x[:, None] - x).abs() == 1).double()
    laplacian = near.sum(1).diag() - near
    values = torch.linalg.eigvalsh(laplacian)[1 : k + 1]
    assert torch.allclose(basis.T @ basis, torch.eye(k, dtype=torch.float64), atol=1e-6)
    assert torch.allclose((basis.T @ laplacian @ basis), values.diag(), atol=1e-6)
    for column in basis.T:
        assert torch.linalg.svdvals(column.reshape(H, W))[1:].sum() < 1e-6  # rank 1
    assert (grid_laplacian_basis((1, 2), 4)[:, 1:] == 0).all()


def test_flip_signs():
    encoding = torch.rand(50, 64) + 0.1
    flipped = flip_signs(encoding, torch.Generator().manual_seed(0))
    signs = (flipped / encoding).round()
    assert torch.equal(signs, signs[:1].expand(50, -1)) and set(signs[0].tolist()) == {-1.0, 1.0}


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_interpreted():
    """tests/ops/interpreted_graph.py, where Triton is imported as an interpreter."""
    interpret(HERE / "interpreted_graph.py")
