"""The Gluon backward kernels of local attention on a Hopper GPU: errors, the same bits twice, choice, fallback."""

import math

import pytest
import torch

from visionattn.ops.local import Disk, Neighborhood, fused, gluon, gluon_grad, local_attention

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs a GPU of compute capability 9.0")]

# grid, pattern, text, batch, heads, key heads, channels, text first
CASES = {
    "window, stride is two tiles": ((64, 80), Neighborhood(48, 16), 512, 1, 2, 2, 128, True),
    "window, odd text, grouped heads": ((48, 64), Neighborhood(16, 16), 77, 2, 4, 2, 128, True),
    "window, text last, 64 channels": ((64, 64), Neighborhood(48, 16), 130, 2, 2, 1, 64, False),
    "disk, odd grid, odd text, grouped heads": ((45, 37), Disk(9), 77, 2, 4, 2, 128, True),
    "disk, text last": ((64, 72), Disk(16), 128, 1, 2, 2, 128, False),
    "disk, no text": ((33, 50), Disk(6.5), 0, 1, 2, 2, 128, True),
    "disk above the grid": ((13, 9), Disk(20), 5, 3, 2, 2, 128, True),
    "small disk, 64 channels": ((70, 129), Disk(2), 0, 2, 2, 2, 64, True),
}


@pytest.fixture(autouse=True)
def force(monkeypatch):
    reason = gluon.cannot_build_gluon(gluon_grad.KERNELS)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(fused, "backward_choice", "gluon")
    monkeypatch.setattr(fused, "_plans", {})


def make(case, dtype):
    grid, pattern, text, batch, heads, kv_heads, dim, first = CASES[case]
    torch.manual_seed(0)
    n = math.prod(grid) + text
    tensors = [torch.randn(batch, n, h, dim, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads, heads)]
    return tensors[:3], tensors[3], dict(grid=grid, pattern=pattern, text=text, text_first=first)


def chosen(tensors, given):
    q, k, v = tensors
    settings = (given["grid"], given["pattern"], given["text"], given.get("text_first", True), q.shape[-1] ** -0.5)
    return fused.plan(q, k, v, None, None, None, None, *settings).gluon_grad


def gradients(tensors, grad, dtype, given, backend):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = local_attention(*leaves, **given, backend=backend, return_lse=True)
    # through the log-sum-exp as well
    return torch.autograd.grad((out, lse), leaves, (grad.to(dtype), torch.ones_like(lse) * 0.1))


def error(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), ("window, odd text, grouped heads", torch.float16),
     ("disk, text last", torch.float16)],
)  # fmt: skip
def test_errors(case, dtype, monkeypatch):
    """At most 1.2 times those of Triton's kernels, and the same bits twice."""
    tensors, grad, given = make(case, dtype)
    assert chosen(tensors, given) is not None
    oracle = gradients(tensors, grad, torch.float64, given, "reference")
    found = gradients(tensors, grad, dtype, given, "triton")
    again = gradients(tensors, grad, dtype, given, "triton")
    monkeypatch.setattr(fused, "backward_choice", "triton")
    assert chosen(tensors, given) is None
    triton = gradients(tensors, grad, dtype, given, "triton")
    for name, x, y, z, w in zip(("dq", "dk", "dv"), found, again, triton, oracle, strict=True):
        assert x.isfinite().all(), name
        assert torch.equal(x, y), name
        assert error(x, w) <= 1.2 * error(z, w) + 1e-5, f"{name}: {error(x, w):.2e}, Triton's {error(z, w):.2e}"


@pytest.mark.parametrize("stages", [1, 2])
def test_few_stages(stages, monkeypatch):
    """No pair of warps waits for the other for ever, whatever is in flight."""
    few = gluon_grad.Setting(groups=(2, 1), stages=stages)
    monkeypatch.setattr(gluon_grad, "WINDOW", (few, few))
    monkeypatch.setattr(gluon_grad, "DISK", (few, few))
    for case in ("disk, odd grid, odd text, grouped heads", "window, stride is two tiles"):
        tensors, grad, given = make(case, torch.bfloat16)
        oracle = gradients(tensors, grad, torch.float64, given, "reference")
        for x, y in zip(gradients(tensors, grad, torch.bfloat16, given, "triton"), oracle, strict=True):
            assert error(x, y) < 1e-2


def test_what_it_does_not_do(monkeypatch):
    tensors, _, given = make("disk, text last", torch.bfloat16)
    assert chosen([t.float() for t in tensors], given) is None
    for pattern in (Neighborhood(48, 1), Neighborhood(48, 16, causal=True), Neighborhood(16, dilation=2)):
        assert chosen(tensors, {**given, "pattern": pattern}) is None
    monkeypatch.setattr(fused, "backward_choice", "auto")
    assert chosen(tensors, given) is None  # too few tiles


def test_failure_is_said_once_and_triton_runs(monkeypatch):
    monkeypatch.setattr(fused, "backward_choice", "auto")
    monkeypatch.setattr(gluon_grad, "failed", [])
    monkeypatch.setattr(gluon, "MEASURED", ("",))
    monkeypatch.setattr(gluon, "TILES", 1)
    tensors, grad, given = make("disk, text last", torch.bfloat16)
    tensors = [t.repeat(1, 1, 2, 1) for t in tensors]
    grad = grad.repeat(1, 1, 2, 1)
    given["pattern"] = Disk(8)
    assert chosen(tensors, given) is not None
    monkeypatch.setattr(fused, "backward_choice", "triton")
    expected = gradients(tensors, grad, torch.bfloat16, given, "triton")
    monkeypatch.setattr(fused, "backward_choice", "auto")

    def fail(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(gluon_grad, "backward", fail)
    with pytest.warns(UserWarning, match="no such instruction"):
        found = gradients(tensors, grad, torch.bfloat16, given, "triton")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
