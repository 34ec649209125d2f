"""Kernels of TransNeXt and its gates (convolutional GLU, residual norm, heads' gates): interpreted, compiled for a GPU
that is not there, and where they are refused."""

from pathlib import Path

import pytest
import torch

from tests.interpreter import interpret
from visionattn.layers.transnext import ConvGLU
from visionattn.ops.conv_glu import conv_glu

HERE = Path(__file__).parent


def test_reference_is_the_layer():
    torch.manual_seed(0)
    layer = ConvGLU(6, 12)
    h, conv = torch.randn(2, 15, 16), layer.dwconv.dwconv
    a, v = h.chunk(2, dim=-1)
    with torch.no_grad():
        assert torch.equal(conv_glu(h, conv.weight, conv.bias, (3, 5)), layer.act(layer.dwconv(a, (3, 5))) * v)


def test_errors():
    h, weight = torch.randn(2, 15, 16), torch.randn(8, 1, 3, 3)
    with pytest.raises(ValueError, match="unknown: use one of"):
        conv_glu(h, weight, None, (3, 5), "cuda")
    with pytest.raises(ValueError, match=r"grid \(3, 4\) needs"):
        conv_glu(h, weight, None, (3, 4))
    with pytest.raises(ValueError, match=r"need \[8, 1, 3, 3\]"):
        conv_glu(h, weight[:4], None, (3, 5))
    with pytest.raises(ValueError, match="float64"):
        conv_glu(h.double(), weight, None, (3, 5), "triton")


def test_interpreted():
    """Files of this folder, where Triton is imported as an interpreter."""
    interpret(*(HERE / f"interpreted_{name}.py" for name in ("conv_glu", "gates", "norm", "transnext")), skips=True)


def test_compiled(monkeypatch):
    """Rows are read and written 16 bytes a thread, taps too, and hardly a register spills."""
    pytest.importorskip("triton")
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set")
    from tests.ops.cross_compile import check, record
    from visionattn.ops import conv_glu_triton as module

    kernels = record(monkeypatch, module, "_forward_kernel", "_gate_grad_kernel", "_conv_grad_kernel")
    h, taps, bias = torch.empty(2, 3136, 768, dtype=torch.bfloat16), torch.empty(9, 384), torch.empty(384)
    y = module.forward(h, taps, bias, 56, 56)
    module.backward(y, h, taps, bias, 56, 56)
    check(kernels, 90, spills={})
    for kernel in kernels:
        (compiled,) = kernel.compile(90)
        assert "ld.global.v4.b32" in compiled.asm["ptx"] and "ld.global.b16" not in compiled.asm["ptx"]


@pytest.mark.parametrize("heads", [(9, 3, 6), (27, 5, 16)])
def test_compiled_gates_and_norms(heads, monkeypatch):
    pytest.importorskip("triton")
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set")
    from tests.ops.cross_compile import check, record
    from visionattn.ops import norm_triton
    from visionattn.ops.moh import gates_triton

    kernels = record(monkeypatch, gates_triton, "_forward_kernel", "_loss_kernel", "_backward_kernel")
    kernels += record(monkeypatch, norm_triton, "_norm_kernel", "_norm_grad_kernel")
    E, S, k = heads
    logits = torch.empty(2, 196, gates_triton.width(E, S), dtype=torch.bfloat16, requires_grad=True)
    gates, loss = gates_triton.HeadGates.apply(logits, E, S, k)
    (gates.sum() + loss).backward()
    x, y = torch.empty(2, 196, 288, requires_grad=True), torch.empty(2, 196, 288, dtype=torch.bfloat16)
    weight = torch.empty(288)
    total, out = norm_triton.AddNorm.apply(x, y, weight, weight, 1e-6, torch.bfloat16)
    (total.sum() + out.sum()).backward()
    check(kernels, 90, spills={})
