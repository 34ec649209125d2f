"""Windows against natten's own implementation (FlexAttention on a CPU), and our FlexAttention backend in eager mode."""

import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.extras import require_extra
from visionattn.ops.local import Cross, Disk, Neighborhood, local_attention
from visionattn.ops.local.natten import neighborhood


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def windows(draw) -> tuple[tuple[int, ...], Neighborhood]:
    """A grid of one to three axes, and a window that natten takes (window 2 and more)."""
    ndim = draw(st.integers(1, 3))
    grid, window, stride, dilation = [], [], [], []
    for _ in range(ndim):
        n = draw(st.integers(2, (19, 9, 6)[ndim - 1]))
        d = draw(st.integers(1, max(n // 2, 1)))
        w = draw(st.integers(2, n // d))
        grid.append(n)
        window.append(w)
        dilation.append(d)
        stride.append(draw(st.integers(1, w)))
    causal = tuple(draw(st.lists(st.booleans(), min_size=ndim, max_size=ndim)))
    return tuple(grid), Neighborhood(tuple(window), tuple(stride), tuple(dilation), causal)


@settings(max_examples=14, deadline=None, derandomize=True)
@given(windows())
@example(((9,), Neighborhood((4,), (4,))))
@example(((7, 6), Neighborhood((6, 2), (5, 1), (1, 3))))
@example(((5, 6, 4), Neighborhood((2, 3, 4), (2, 1, 3), (2, 1, 1), (True, False, False))))
def test_windows_are_nattens(case):
    require_extra("natten", "natten")
    grid, pattern = case
    axis = pattern.axes(grid)[0]
    if len(grid) == 1 and axis.causal and axis.window == axis.length:
        return  # natten refuses it
    n = torch.Size(grid).numel()
    q, k, v = (noise(1, n, 2, 8, seed=i) for i in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, lse = neighborhood(q, k, v, grid, pattern, 0.7, backend="flex-fna", return_lse=True)
    out, own = local_attention(q, k, v, grid, pattern, scale=0.7, backend="reference", return_lse=True)
    torch.testing.assert_close(out, expected.reshape(out.shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, lse.reshape(1, n, 2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_text_beside_a_window_is_nattens_additional_keys():
    """natten merges the window with other keys by their log-sum-exps; ours sees both at once."""
    require_extra("natten", "natten")
    grid, text, pattern = (6, 5), 7, Neighborhood((4, 3), (2, 1))
    q, k, v = (noise(2, 30 + text, 2, 8, seed=i) for i in range(3))
    image, words = [x[:, text:] for x in (q, k, v)], (k[:, :text], v[:, :text])
    expected = neighborhood(
        *image, grid, pattern, 0.7, words, backend="flex-fna", attention_kwargs=dict(backend="flex-fmha")
    )
    out = local_attention(q, k, v, grid, pattern, text, scale=0.7, backend="reference")[:, text:]
    torch.testing.assert_close(out, expected.reshape(out.shape), rtol=1e-4, atol=1e-5)


FLEX = {
    "window": ((9, 7), Neighborhood((4, 3), (3, 1), (2, 1), (False, True)), dict(text=3)),
    "disk, padded text behind": ((8, 6), Disk(3), dict(text=4, text_first=False, text_lengths=torch.tensor([1, 4]))),
    "cross, grouped heads": ((6, 5), Cross(3, 2, 2), dict(kv_heads=1)),
    "bias": ((6, 5), Neighborhood(3), dict(bias=noise(2, 5, 5, seed=7))),
    "extra keys": ((3, 4, 4), Disk(2), dict(text=2, extra=5)),
}


@pytest.mark.parametrize("name", list(FLEX))
def test_flex_in_eager_mode(name):
    grid, pattern, options = FLEX[name]
    options = dict(options)
    heads, extra = options.pop("kv_heads", 2), options.pop("extra", 0)
    n = torch.Size(grid).numel() + options.get("text", 0)
    q, k, v = noise(2, n, 2, 8, seed=0), noise(2, n, heads, 8, seed=1), noise(2, n, heads, 8, seed=2)
    if extra:
        options |= dict(extra_k=noise(2, extra, heads, 8, seed=3), extra_v=noise(2, extra, heads, 8, seed=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = local_attention(q, k, v, grid, pattern, **options, backend="flex", return_lse=True)
    expected = local_attention(q, k, v, grid, pattern, **options, backend="reference", return_lse=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
