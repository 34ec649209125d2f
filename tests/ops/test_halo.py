"""Halo attention: the eager reference, the public functions, and (in a process of its own) the interpreted kernels."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch

from tests.interpreter import interpret
from visionattn.ops.halo import api, can_run_triton, halo_attention, halo_attention_kv

HERE = Path(__file__).parent


def make(B=1, H=7, W=9, heads=2, dim=4, dim_v=3, block=4, halo=2, stride=1, dtype=torch.float64, grad=False):
    torch.manual_seed(0)
    window = block + 2 * halo
    shapes = [(B, -(-H // stride), -(-W // stride), heads, dim), (B, H, W, heads, dim), (B, H, W, heads, dim_v)]
    shapes += [(2 * window - 1, dim)] * 2
    return [torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes]


def brute_force(q, k, v, rel_h, rel_w, block, halo, stride, border, scale, scale_rel, rel_step):
    """One query, one key at a time, from the paper's formula."""
    B, H, W, heads, dim = k.shape
    window = block + 2 * halo
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(*q.shape[:4], v.shape[-1], dtype=q.dtype)
    for b, y, x, n in itertools.product(range(B), range(q.shape[1]), range(q.shape[2]), range(heads)):
        query = q[b, y, x, n]
        top, left = y * stride // block * block, x * stride // block * block
        r, c = (y * stride - top) // stride, (x * stride - left) // stride
        logits, values = [], []
        for R, S in itertools.product(range(window), range(window)):
            ky, kx = top - halo + R, left - halo + S
            inside = 0 <= ky < H and 0 <= kx < W
            if not inside and border == "mask":
                continue
            rel = query @ rel_h[R - rel_step * r + window - 1] + query @ rel_w[S - rel_step * c + window - 1]
            dot = query @ k[b, ky, kx, n] if inside else torch.zeros((), dtype=q.dtype)
            logits.append(scale * dot + (scale * rel if scale_rel else rel))
            values.append(v[b, ky, kx, n] if inside else torch.zeros_like(out[0, 0, 0, 0]))
        out[b, y, x, n] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize(
    "block, halo, stride, rel_step, scale_rel",
    [(4, 2, 1, 1, False), (4, 1, 2, 1, True), (4, 1, 2, 2, False), (3, 4, 1, 1, False), (2, 0, 1, 1, True)],
)
def test_reference_is_the_formula(border, block, halo, stride, rel_step, scale_rel):
    args = make(block=block, halo=halo, stride=stride)
    settings = (block, halo, stride, border, None, scale_rel, rel_step)
    out = halo_attention(*args, *settings, backend="reference")
    torch.testing.assert_close(out, brute_force(*args, *settings), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("border, stride", [("zero", 1), ("mask", 2)])
def test_reference_gradcheck(border, stride):
    args = make(H=5, W=4, heads=1, dim=3, dim_v=2, block=2, halo=1, stride=stride, grad=True)
    assert torch.autograd.gradcheck(lambda *a: halo_attention(*a, 2, 1, stride, border), args)


def test_packed_keys_and_values():
    q, k, v, *tables = make(grad=True)
    kv = torch.cat([k, v], -1)
    torch.testing.assert_close(halo_attention_kv(q, kv, *tables, 4, 2), halo_attention(q, k, v, *tables, 4, 2))
    grads = torch.autograd.grad(halo_attention_kv(q, kv, *tables, 4, 2).square().sum(), (q, k, v, *tables))
    expected = torch.autograd.grad(halo_attention(q, k, v, *tables, 4, 2).square().sum(), (q, k, v, *tables))
    torch.testing.assert_close(grads, expected)


BAD = {
    "border": (dict(border="wrap"), "use 'zero' or 'mask'"),
    "backend": (dict(backend="cuda"), "use 'auto', 'triton' or 'reference'"),
    "stride": (dict(stride=3), "multiple of stride"),
    "rel_step": (dict(rel_step=9), "leaves the relative tables"),
    "halo": (dict(halo_size=3), r"rel_height has shape \[15, 4\]"),
    "query map": (dict(q=torch.zeros(1, 6, 9, 2, 4).double()), r"q has shape \[1, 6, 9, 2, 4\]"),
    "values": (dict(v=torch.zeros(1, 7, 8, 2, 3).double()), "must agree with k"),
    "rank": (dict(k=torch.zeros(7, 9, 2, 4).double()), "batch, height, width, heads, channels"),
    "dtype": (dict(k=torch.zeros(1, 7, 9, 2, 4)), "one floating-point dtype"),
    "no cuda": (dict(backend="triton"), "backend='triton' cannot run: dtype torch.float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    names = ("q", "k", "v", "rel_height", "rel_width")
    kwargs = dict(zip(names, make(), strict=True)) | dict(block_size=4, halo_size=2) | BAD[case][0]
    with pytest.raises(ValueError, match=BAD[case][1]) as error:
        halo_attention(**kwargs)
    assert "\n" not in str(error.value)


def test_can_run_triton_says_why_not():
    assert "on cpu" in can_run_triton(*make(dtype=torch.float32), 4, 2)
    assert "float64" in can_run_triton(*make(), 4, 2)
    assert "not positive" in can_run_triton(*make(dtype=torch.float32), 4, 2, scale=0.0)
    assert "at most 64" in can_run_triton(*make(dtype=torch.float32, block=64, halo=1), 64, 1)
    with pytest.raises(ValueError, match="too wide"):
        halo_attention(*make(dtype=torch.float32, dim=300), 4, 2, backend="triton")


def test_auto_reports_a_failing_kernel_once(monkeypatch):
    pytest.importorskip("triton")
    from visionattn.ops.halo import fused

    def broken(*args):
        raise RuntimeError("ptxas went away\nand more")

    monkeypatch.setattr(fused, "forward", broken)
    monkeypatch.setattr(api, "_limits", lambda *args: None)
    static = ("cpu", torch.float32, torch.float32, torch.float32, 1, 4, 4, 4, 2, 1, False, False)
    api._probe.cache_clear()
    api._warn.cache_clear()
    try:
        with pytest.warns(UserWarning, match="eager reference.*ptxas went away$"):
            assert "ptxas went away" in api._static_reason(True, *static)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert api._static_reason(True, *static) is not None
    finally:
        api._probe.cache_clear()
        api._warn.cache_clear()


class Wrapped(torch.nn.Module):
    def __init__(self, packed: bool = False):
        super().__init__()
        self.packed = packed
        self.rel_h = torch.nn.Parameter(torch.randn(15, 4))
        self.rel_w = torch.nn.Parameter(torch.randn(15, 4))

    def forward(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        if self.packed:
            return halo_attention_kv(q, kv, self.rel_h, self.rel_w, 4, 2)
        return halo_attention(q, kv[..., :4], kv[..., 4:], self.rel_h, self.rel_w, 4, 2, 1, "mask")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", ["script", "export", "compile"])
def test_programs(how, packed):
    model = Wrapped(packed)
    q, k, v, *_ = make(dtype=torch.float32)
    kv = torch.cat([k, v], -1)
    if how == "script":
        program = torch.jit.script(model)
    elif how == "export":
        program = torch.export.export(model, (q, kv)).module()
    else:
        program = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(program(q, kv), model(q, kv))


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = Wrapped().eval()
    q, k, v, *_ = make(dtype=torch.float32)
    kv = torch.cat([k, v], -1)
    torch.onnx.export(model, (q, kv), tmp_path / "halo.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "halo.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, dict(zip((i.name for i in session.get_inputs()), (q.numpy(), kv.numpy()), strict=True)))
    torch.testing.assert_close(torch.from_numpy(out), model(q, kv).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["kernels", "operators"])
def test_interpreted(part):
    """tests/ops/interpreted_halo.py, where Triton is imported as an interpreter."""
    interpret(HERE / "interpreted_halo.py", only=part)
