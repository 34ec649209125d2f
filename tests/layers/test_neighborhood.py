"""Neighbourhood attention: the operator against the mask, the layer against what the released one computes."""

import copy
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visionattn
from tests.extras import require_extra
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from tests.interpreter import interpret
from visionattn.layers import NeighborhoodAttention
from visionattn.ops.local import Neighborhood
from visionattn.ops.neighborhood import neighborhood_attention, tiled_attention

TOLERANCE = 1e-6
MODULES = ["na_k3_d2_13x9", "na_k7_d1_14x11", "na_k7_d2_13x9_padded"]


def official(name: str):
    manifest, expected = fx.load(FIXTURES / "nat" / name)
    module = visionattn.create_module("neighborhood", **manifest["config"]["args"])
    module.load_state_dict({k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()})
    assert sum(p.numel() for p in module.parameters()) == manifest["num_params"]
    return module.eval(), torch.from_numpy(fx.inputs(manifest)["x"]), expected


@pytest.mark.parametrize("name", MODULES)
def test_released_module(name):
    module, x, expected = official(name)
    before_proj = []
    module.proj.register_forward_pre_hook(lambda _, args: before_proj.append(args[0]))
    with torch.no_grad():
        assert relative_error(module(x), expected["out"]) < TOLERANCE
        tokens = module(x.flatten(1, 2), x.shape[1:3])
        assert relative_error(before_proj[0].reshape(expected["pre_proj"].shape), expected["pre_proj"]) < TOLERANCE
        assert relative_error(tokens.reshape(x.shape), expected["out"]) < TOLERANCE


@pytest.mark.parametrize("name", MODULES)
def test_released_weights_of_the_keys(name):
    """The softmax itself: values that are a one-hot code of their token give the weights back."""
    module, x, expected = official(name)
    K, d = module.kernel_size[0], module.dilation[0]
    grid = tuple(max(side, K * d) for side in x.shape[1:3])
    n = grid[0] * grid[1]
    padded = torch.nn.functional.pad(x[:1], (0, 0, 0, grid[1] - x.shape[2], 0, grid[0] - x.shape[1]))
    with torch.no_grad():
        q, k, _ = module.qkv(padded.flatten(1, 2)).unflatten(2, (3, module.num_heads, -1)).unbind(2)
        codes = torch.eye(n)[None, :, None, :].expand(1, n, module.num_heads, n)
        weights = neighborhood_attention(q, k, codes, grid, K, d, bias=module.rpb)[0]  # N, heads, N
    mask = Neighborhood(K, dilation=d).mask(grid)
    assert (weights.permute(1, 0, 2)[:, ~mask] == 0).all()
    sample = torch.arange(0, n, 5)
    got = torch.stack([weights[i][:, mask[i]] for i in sample.tolist()], 1)
    assert relative_error(got, expected["attn"]) < TOLERANCE


def loops(q, k, v, grid, window, dilation, bias, scale):
    """The rule of NAT and DiNAT, query by query (one image), as the papers and the released kernels have it."""
    out = np.zeros(v.shape)
    for query in itertools.product(*(range(n) for n in grid)):
        keys, rows = [], []
        for i, n_axis, K, d in zip(query, grid, window, dilation, strict=True):
            m, p = i % d, i // d
            n = -(-(n_axis - m) // d)
            s = min(max(p - (K - 1) // 2, 0), n - K)
            keys.append([m + d * (s + t) for t in range(K)])
            rows.append([s + t - p + K - 1 for t in range(K)])
        index = np.ravel_multi_index(query, grid)
        places = [np.ravel_multi_index(key, grid) for key in itertools.product(*keys)]
        biases = np.stack([bias[(slice(None), *row)] for row in itertools.product(*rows)])  # keys, heads
        logits = np.einsum("hd,khd->kh", q[index] * scale, k[places]) + biases
        weights = np.exp(logits - logits.max(0))
        out[index] = np.einsum("kh,khd->hd", weights / weights.sum(0), v[places])
    return out


@pytest.mark.parametrize(
    "grid, window, dilation",
    [((9,), (3,), (2,)), ((7, 10), (3, 5), (1, 2)), ((13, 9), (3, 3), (4, 3)), ((4, 5, 6), (3, 3, 3), (1, 1, 2))],
)
def test_against_loops(grid, window, dilation):
    rng = np.random.default_rng(0)
    n = int(np.prod(grid))
    q, k, v = rng.standard_normal((3, n, 2, 4))
    bias = rng.standard_normal((2, *(2 * w - 1 for w in window)))
    expected = loops(q, k, v, grid, window, dilation, bias, 0.5)
    q, k, v, bias = (torch.from_numpy(x) for x in (q, k, v, bias))
    for backend in ("tiles", "reference"):
        out = neighborhood_attention(q[None], k[None], v[None], grid, window, dilation, bias=bias, backend=backend)
        assert np.abs(out[0].numpy() - expected).max() < 1e-13


@st.composite
def calls(draw):
    dims = draw(st.integers(1, 3))
    largest = {1: 9, 2: 5, 3: 3}[dims]
    window = draw(st.lists(st.integers(1, largest), min_size=dims, max_size=dims))
    dilation = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    stride = [draw(st.integers(1, w)) for w in window]
    causal = draw(st.lists(st.booleans(), min_size=dims, max_size=dims))
    grid = tuple(w * d + draw(st.integers(0, 6 if dims < 3 else 2)) for w, d in zip(window, dilation, strict=True))
    return grid, tuple(window), tuple(dilation), tuple(stride), tuple(causal), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(calls())
def test_tiles_against_the_mask(call):
    grid, window, dilation, stride, causal, with_bias = call
    torch.manual_seed(0)
    n = int(np.prod(grid))
    q, k, v = (torch.randn(2, n, heads, 4, dtype=torch.double) for heads in (4, 2, 2))  # grouped keys
    bias = torch.randn(4, *(2 * w - 1 for w in window), dtype=torch.double) if with_bias else None
    args = (grid, window, dilation, stride, causal, bias)
    out = neighborhood_attention(q, k, v, *args, backend="tiles")
    expected = neighborhood_attention(q, k, v, *args, backend="reference")
    assert (out - expected).abs().max() < 1e-12
    chunked = tiled_attention(q, k, v, *(list(a) for a in args[:5]), bias, 0.5, 0.0, chunk=16)
    assert (chunked - expected).abs().max() < 1e-12


def test_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30, 2, 3, dtype=torch.double, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 3, dtype=torch.double, requires_grad=True)

    def run(q, k, v, bias):
        return neighborhood_attention(q, k, v, (6, 5), (3, 2), (2, 1), bias=bias, backend="tiles")

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    """No worse than twice PyTorch's own dense attention on the same window as a mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 12 * 11, 2, 16, dtype=torch.double).to(dtype) for _ in range(3))
    out = neighborhood_attention(q, k, v, (12, 11), 5, 2, backend="tiles")
    oracle = neighborhood_attention(q.double(), k.double(), v.double(), (12, 11), 5, 2, backend="reference")
    dense = neighborhood_attention(q, k, v, (12, 11), 5, 2, backend="sdpa")
    assert out.dtype == dtype
    assert (out.double() - oracle).norm() <= 2 * (dense.double() - oracle).norm() + 1e-3 * oracle.norm()


def test_window_as_large_as_the_grid_is_dense():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 35, 2, 8) for _ in range(3))
    out = neighborhood_attention(q, k, v, (5, 7), (5, 7))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out, dense.transpose(1, 2))


def test_any_strides():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 48, 10)[..., 1:9].permute(0, 1, 3, 2, 4)
    args = ((6, 8), 3, 2)
    out = neighborhood_attention(q, k, v, *args)
    torch.testing.assert_close(out, neighborhood_attention(q.contiguous(), k.contiguous(), v.contiguous(), *args))


def test_memory_is_not_quadratic():
    """128 x 128 tokens in a fraction of the 1 GB that their square takes."""
    q = torch.randn(1, 128 * 128, 1, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        neighborhood_attention(q, q, q, (128, 128), 7, 2)
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 100e6


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(grid=(5, 5)), "25 tokens, but q, k, v have 24"),
        (dict(dilation=2), "window 3 x dilation 2 = 6 exceeds the axis of length 4"),
        (dict(stride=4), "stride=4 exceeds window=3"),
        (dict(bias=torch.zeros(2, 3, 3)), r"need \[2, 5, 5\]"),
        (dict(backend="fast"), "fast"),
        (dict(backend="reference", dropout=0.1), "no dropout=0.1"),
    ],
)
def test_bad_calls(change, words):
    q = torch.randn(1, 24, 2, 4)
    with pytest.raises(ValueError, match=words) as error:
        neighborhood_attention(q, q, q, **{**dict(grid=(4, 6), window=3), **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=16"),
        (dict(kernel_size=(3, 3), dilation=(1, 1, 2)), "give one number"),
        (dict(kernel_size=0), "at least 1"),
        (dict(kernel_size=7.5), "kernel_size=7.5: give whole numbers"),
        (dict(dilation=(1, 1.5)), r"dilation=\(1, 1.5\): give whole numbers"),
        (dict(qk_norm=True), "switch them off"),
        (dict(dims=4), "1 to 3"),
        (dict(stride=9), "stride=9 exceeds window=7"),
    ],
)
def test_bad_layers(arguments, words):
    with pytest.raises(ValueError, match=words):
        NeighborhoodAttention(**{**dict(dim=16, num_heads=2), **arguments})


def test_bad_inputs():
    module = NeighborhoodAttention(16, 2, 3)
    with pytest.raises(ValueError, match="without their grid"):
        module(torch.randn(1, 12, 16))
    with pytest.raises(ValueError, match="is not a grid"):
        module(torch.randn(1, 12, 16), (3, 5))


@pytest.mark.parametrize("size", [(5,), (23,), (2, 9), (8, 12), (3, 4, 5), (6, 9, 4)])
def test_layer_in_one_to_three_dimensions(size):
    """Sides below kernel_size * dilation are filled with zeros before the projection, the others are left alone."""
    torch.manual_seed(0)
    dims = len(size)
    module = NeighborhoodAttention(16, 2, 3, 2, dims=dims).double().eval()
    torch.nn.init.normal_(module.qkv.bias)
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(2, *size, 16, dtype=torch.double)
    padded = [max(n, 6) for n in size]
    canvas = torch.zeros(2, *padded, 16, dtype=torch.double)
    canvas[(slice(None), *(slice(n) for n in size))] = x
    q, k, v = module.qkv(canvas.flatten(1, dims)).unflatten(2, (3, 2, 8)).unbind(2)
    out = neighborhood_attention(q, k, v, tuple(padded), 3, 2, bias=module.rpb, backend="reference")
    out = module.proj(out.flatten(2)).unflatten(1, padded)[(slice(None), *(slice(n) for n in size))]
    torch.testing.assert_close(module(x), out)
    torch.testing.assert_close(module(x.flatten(1, dims), size), out.flatten(1, dims))


def test_layer_programs():
    torch.manual_seed(0)
    module = NeighborhoodAttention(16, 2, 3, 2, proj_drop=0.1).eval()
    for size in ((9, 12), (4, 13)):
        x = torch.randn(2, *size, 16)
        expected = module(x)
        torch.compiler.reset()
        for program in (
            torch.jit.script(module),
            torch.export.export(module, (x,)).module(),
            torch.compile(module, fullgraph=True, backend="aot_eager"),
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module),
        ):
            torch.testing.assert_close(program(x), expected)


def test_export_of_any_batch():
    module = NeighborhoodAttention(16, 2, 3, 2).eval()
    shapes = dict(x={0: torch.export.Dim("batch")})
    program = torch.export.export(module, (torch.randn(2, 9, 4, 16),), dynamic_shapes=shapes).module()
    for batch in (3, 5):
        x = torch.randn(batch, 9, 4, 16)
        torch.testing.assert_close(program(x), module(x))


def test_dropout_only_in_training():
    torch.manual_seed(0)
    module = NeighborhoodAttention(16, 2, 3, attn_drop=0.5)
    x = torch.randn(1, 6, 6, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_without_bias_table():
    module = NeighborhoodAttention(16, 2, 3, rel_pos_bias=False)
    assert module.rpb is None and "rpb" not in module.state_dict()
    with_table = NeighborhoodAttention(16, 2, 3)
    with_table.load_state_dict({**module.state_dict(), "rpb": torch.zeros(2, 5, 5)})
    x = torch.randn(1, 5, 6, 16)
    torch.testing.assert_close(module(x), with_table(x))


def test_prefix_tokens():
    """They see all tokens and all tokens see them, whatever else a token sees."""
    torch.manual_seed(0)
    module = NeighborhoodAttention(16, 2, 3, num_prefix_tokens=2, grid=(6, 7)).eval()
    torch.nn.init.normal_(module.rpb)
    x = torch.randn(1, 44, 16)
    mask = torch.ones(44, 44, dtype=torch.bool)
    mask[2:, 2:] = Neighborhood(3).mask((6, 7))
    touched = torch.autograd.functional.jacobian(lambda x: module(x).sum(-1)[0], x)[:, 0].abs().sum(-1) > 0
    assert torch.equal(touched, mask)


def test_in_timms_vision_transformer():
    layer = NeighborhoodAttention.configured(grid=(14, 14), num_prefix_tokens=1, kernel_size=5)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, attn_layer=layer).eval()
    assert isinstance(model.blocks[0].attn, NeighborhoodAttention)
    assert model(torch.randn(1, 3, 224, 224)).isfinite().all()


def test_natten_as_second_oracle():
    natten = require_extra("natten", "natten")
    torch.manual_seed(0)
    for grid, window, dilation in (((13, 9), 3, 2), ((14, 11), 7, 1), ((8, 9, 10), 3, 2)):
        q, k, v = (torch.randn(1, *grid, 2, 32) for _ in range(3))
        theirs = {2: natten.na2d, 3: natten.na3d}[len(grid)](q, k, v, kernel_size=window, dilation=dilation)
        ours = neighborhood_attention(*(x.flatten(1, len(grid)) for x in (q, k, v)), grid, window, dilation)
        torch.testing.assert_close(ours, theirs.flatten(1, len(grid)), rtol=1e-4, atol=1e-5)


def test_kernels_in_the_interpreter():
    interpret(Path(__file__).with_name("interpreted_neighborhood.py"))
