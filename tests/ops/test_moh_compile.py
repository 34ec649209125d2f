"""The kernels of mixture-of-head and aggregated attention compile, without a GPU, within the shared memory there is."""

import pytest
import torch

pytest.importorskip("triton")

import triton

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

from tests.ops.cross_compile import check, record
from visionattn.ops import aggregated, moh
from visionattn.ops.aggregated import fused as aggregated_fused
from visionattn.ops.moh import fused as moh_fused

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def moh_launches(monkeypatch, dim, dtype, capability, N=1024):
    recorders = record(monkeypatch, moh_fused.kernels, "partition", "moh_forward")
    qkv = torch.empty(2, N, 3, 4, dim, dtype=dtype)
    gates = torch.ones(2, N, 4)
    moh_fused.forward(*qkv.unbind(2), gates, dim**-0.5, moh_fused.pick_tiles(dim, dtype, capability))
    if capability == 90:
        moh_fused.list_tokens(gates, 2)  # with the Gluon kernel's items
    return recorders


def aggregated_launches(monkeypatch, dim, dtype, window=3, side=56):
    names = ["forward", "query_grad", "key_grad", "pool_grad", "pool_sum", "bias_grad"]
    recorders = record(monkeypatch, aggregated_fused.kernels, *names)
    B, N, heads, P, L = 2, side * side, 3, 49, window**2
    shapes = [(B, N, heads, dim), (B, N, 2, heads, dim), (B, P, 2, heads, dim)]
    tensors = [torch.empty(s, dtype=dtype) for s in shapes]
    tensors += [torch.empty(s) for s in ((heads, dim), (heads,), (heads, L))]
    tensors += [torch.empty(heads, N, P, dtype=dtype), torch.empty(heads, dim, L), torch.empty(heads, L)]
    out, lse = aggregated_fused.forward(*tensors, side, side, window)
    aggregated_fused.backward(out, *tensors, out, lse, side, side, window)
    return recorders


@pytest.mark.parametrize("capability", [80, 90])
def test_moh(capability, monkeypatch):
    assert moh.can_run_triton is not None
    recorders = moh_launches(monkeypatch, 64, torch.bfloat16, capability)
    # on an H100, 168 registers with a few spilled are faster than more of them
    check(recorders, capability, {"moh_forward": 64} if capability == 90 else {})
    assert recorders[1].launches[0][1]["TMA"] == (capability >= 90)


@pytest.mark.parametrize("dim, dtype", [(72, "bf16"), (256, "fp32"), (16, "fp32")])
def test_moh_in_the_least_shared_memory(dim, dtype, monkeypatch):
    check(moh_launches(monkeypatch, dim, DTYPES[dtype], 89, N=1000), 89)


@pytest.mark.parametrize("capability", [80, 90])
def test_aggregated(capability, monkeypatch):
    assert aggregated.can_run_triton is not None
    # the queries' gradient takes 255 registers, and goes over them by a few
    check(aggregated_launches(monkeypatch, 24, torch.bfloat16), capability, {"query_grad": 64})


@pytest.mark.slow
@pytest.mark.parametrize("dim, dtype, window", [(24, "fp32", 3), (64, "bf16", 5), (128, "fp32", 3)])
def test_aggregated_in_the_least_shared_memory(dim, dtype, window, monkeypatch):
    check(aggregated_launches(monkeypatch, dim, DTYPES[dtype], window, 28), 89)
