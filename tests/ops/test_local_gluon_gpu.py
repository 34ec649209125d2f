"""The Gluon forward kernel of local attention on a Hopper GPU: errors, log-sum-exp, gradients, choice, fallback."""

import math
import warnings

import pytest
import torch

from visionattn.ops.local import Disk, Neighborhood, fused, gluon, local_attention

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs a GPU of compute capability 9.0")]

# grid, pattern, text, batch, heads, key heads, channels, text first
CASES = {
    "stride is the tile": ((64, 80), Neighborhood(32, 16), 512, 1, 2, 2, 128, True),
    "odd grid, odd text": ((45, 37), Neighborhood((17, 20), (3, 8)), 77, 2, 2, 1, 128, True),
    "slides, text last": ((45, 37), Neighborhood(12), 130, 1, 2, 2, 128, False),
    "causal, no text": ((33, 50), Neighborhood((9, 21), 1, causal=(True, False)), 0, 2, 2, 2, 64, True),
    "window below the tile": ((13, 9), Neighborhood(5), 1, 3, 2, 2, 128, True),
    "video": ((9, 20, 21), Neighborhood((4, 8, 8), (2, 4, 4)), 30, 2, 1, 1, 128, True),
    "disk, odd grid, odd text": ((45, 37), Disk(9), 77, 2, 2, 1, 128, True),
    "disk, text last": ((64, 72), Disk(16), 128, 1, 2, 2, 128, False),
    "disk, no text": ((33, 50), Disk(6.5), 0, 1, 2, 2, 128, True),
    "disk above the grid": ((13, 9), Disk(20), 5, 3, 2, 2, 128, True),
    "small disk, 64 channels": ((70, 129), Disk(2), 0, 2, 2, 2, 64, True),
    "video, strides are tiles": ((8, 24, 32), Neighborhood((4, 16, 16), (2, 8, 8)), 0, 1, 2, 2, 128, True),
}


@pytest.fixture(autouse=True)
def force(monkeypatch):
    reason = gluon.cannot_build_gluon(gluon.KERNELS)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(fused, "forward_choice", "gluon")
    monkeypatch.setattr(fused, "_plans", {})


def make(case, dtype):
    grid, pattern, text, batch, heads, kv_heads, dim, first = CASES[case]
    torch.manual_seed(0)
    n = math.prod(grid) + text
    tensors = [torch.randn(batch, n, h, dim, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads)]
    return tensors, dict(grid=grid, pattern=pattern, text=text, text_first=first)


def takes_gluon(tensors, given) -> bool:
    q, k, v = tensors
    settings = (given["grid"], given["pattern"], given["text"], given.get("text_first", True), q.shape[-1] ** -0.5)
    return fused.plan(q, k, v, None, None, None, None, *settings).gluon is not None


def run(tensors, grad, dtype, given, backend):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = local_attention(*leaves, **given, backend=backend, return_lse=True)
    return out, *torch.autograd.grad(out, leaves, grad.to(dtype)), lse


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in CASES),
        ("odd grid, odd text", torch.float16),
        ("video", torch.float16),
        ("disk, text last", torch.float16),
    ],
)
def test_errors(case, dtype):
    """At most twice those of dense attention under a mask at the same precision; the gradients take Triton's kernels
    from this forward pass's output and log-sum-exp."""
    tensors, given = make(case, dtype)
    assert takes_gluon(tensors, given)
    grad = torch.randn(tensors[0].shape, device="cuda").to(dtype)
    oracle = run(tensors, grad, torch.float64, given, "reference")
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = local_attention(*leaves, **given, backend="sdpa")
    dense = out, *torch.autograd.grad(out, leaves, grad)
    found = run(tensors, grad, dtype, given, "triton")
    assert torch.equal(found[0], run(tensors, grad, dtype, given, "triton")[0])
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), found, dense, oracle, strict=False):
        assert x.isfinite().all(), name
        assert error(x, z) <= 2 * error(y, z) + 1e-7, f"{name}: {error(x, z):.2e}, dense {error(y, z):.2e}"
    torch.testing.assert_close(found[-1].double(), oracle[-1], atol=1e-4, rtol=1e-4)


def test_strided_inputs_and_poison():
    """Heads of a packed projection, and NaN in keys that no tile of the first rows visits."""
    grid, pattern, text = (64, 64), Neighborhood(16, 16), 77
    packed = torch.randn(1, 64 * 64 + text, 3, 2, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = packed.unbind(2)
    far = k.clone()
    far[:, text:].view(1, 64, 64, 2, 128)[:, 32:] = float("nan")
    given = dict(grid=grid, pattern=pattern, text=text)
    assert takes_gluon((q, far, v), given)
    expected = local_attention(q.double(), k.double(), v.double(), **given, backend="reference")
    assert error(local_attention(q, k, v, **given, backend="triton"), expected) < 5e-3
    rows = local_attention(q, far, v, **given, backend="triton")[:, text:].view(1, 64, 64, 2, 128)
    assert rows[:, :32].isfinite().all()
    assert rows[:, 32:].isnan().any()  # the control


def test_auto_takes_full_tiles_only(monkeypatch):
    """Same answer as Triton's kernel where 'auto' takes this one, also compiled; large disks and float32 stay there."""
    monkeypatch.setattr(fused, "forward_choice", "auto")
    monkeypatch.setattr(gluon, "failed", [])
    monkeypatch.setattr(gluon, "MEASURED", ("",))
    given = dict(grid=(64, 128), pattern=Neighborhood(32, 16), text=77)
    tensors = [torch.randn(1, 64 * 128 + 77, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    assert takes_gluon(tensors, given)
    assert not takes_gluon([t.float() for t in tensors], given)
    assert not takes_gluon(tensors, {**given, "pattern": Disk(8)})  # too few tiles
    monkeypatch.setattr(gluon, "TILES", 1)
    assert takes_gluon(tensors, {**given, "pattern": Disk(8)})
    for pattern in (Disk(40), Neighborhood(7, dilation=2)):
        assert not takes_gluon(tensors, {**given, "pattern": pattern})

    def attend(q, k, v):
        return local_attention(q, k, v, **given)

    found = attend(*tensors)
    assert torch.equal(torch.compile(attend, fullgraph=True)(*tensors), found)
    monkeypatch.setattr(fused, "forward_choice", "triton")
    assert not takes_gluon(tensors, given)
    assert error(attend(*tensors), found.double()) < 5e-3


@pytest.mark.parametrize("groups", [(1, 1), (1, 2), (2, 1)])
def test_disk_of_few_stages(groups):
    """A warpgroup that passes over many tiles in a row still gives its values back: two stages, small disks."""
    small = gluon.DiskSetting(groups=groups, stages=2)
    for grid, radius, text in (((40, 72), 5, 0), ((33, 50), 6.5, 70), ((64, 64), 16, 0)):
        pattern = Disk(radius)
        tensors = [
            torch.randn(1, math.prod(grid) + text, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        ]
        p = fused.plan(*tensors, None, None, None, None, grid, pattern, text, True, 128**-0.5)
        out = torch.full_like(tensors[0], math.nan)
        lse = torch.empty(1, 2, len(out[0]), device="cuda")
        gluon.disk_forward(p, *tensors, out, lse, small)
        expected = local_attention(
            *(t.double() for t in tensors), grid=grid, pattern=pattern, text=text, backend="reference"
        )
        assert error(out[:, text:], expected[:, text:]) < 5e-3


def test_failure_is_said_once_and_triton_runs(monkeypatch):
    monkeypatch.setattr(fused, "forward_choice", "auto")
    monkeypatch.setattr(gluon, "failed", [])
    monkeypatch.setattr(gluon, "MEASURED", ("",))
    given = dict(grid=(64, 144), pattern=Neighborhood(32, 16), backend="triton")
    q = torch.randn(1, 64 * 144, 4, 128, device="cuda", dtype=torch.bfloat16)
    expected = local_attention(q, q, q, **given)

    def fail(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(gluon, "_launch", fail)
    with pytest.warns(UserWarning, match="no such instruction"):
        found = local_attention(q, q, q, **given)
    assert error(found, expected.double()) < 5e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(local_attention(q, q, q, **given), found)
