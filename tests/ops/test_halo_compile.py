"""The halo kernels compile, without a GPU, for every architecture that they claim, within its shared memory."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from visionattn.ops.halo import fused, kernels

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_kernel(kernel, constants, tiles, dtype, capability, table="fp32"):
    """As a channels-last call would: aligned pointers and strides, channels next to each other."""
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_stride = len(name) == 3 and name[0] == "s"
        if name in constants or (is_stride and name[2] == "d"):
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name, 1)
            continue
        if name.endswith("_ptr"):
            fixed = {"lse_ptr": "fp32", "delta_ptr": "fp32", "dt_ptr": "fp32", "th_ptr": table, "tw_ptr": table}
            signature[name] = "*" + fixed.get(name, NAMES[dtype])
        else:
            signature[name] = "fp32" if name in ("qk_scale", "ratio", "scale", "rel_scale") else "i32"
        if is_stride or name.endswith("_ptr"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tiles.launch())


def check(problem, capability, which):
    forward_tiles, query_tiles, key_tiles = fused.pick_tiles(problem)
    kernel, constants, tiles = {
        "forward": (kernels.halo_forward, fused.forward_constants(problem, forward_tiles), forward_tiles),
        "queries": (kernels.halo_query_grad, fused.forward_constants(problem, query_tiles), query_tiles),
        "keys": (kernels.halo_key_grad, fused.key_constants(problem, key_tiles), key_tiles),
    }[which]
    compiled = compile_kernel(kernel, constants, tiles, problem.dtype, capability)
    assert compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024


def problem(block, halo, stride, dim, dim_v, dtype):
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    return fused.Problem(block, halo, stride, 1, False, dim, dim_v, dtype, precision)


@pytest.mark.parametrize("which", ["forward", "queries", "keys"])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_h1(capability, which):
    check(problem(8, 3, 1, 16, 16, torch.bfloat16), capability, which)


@pytest.mark.parametrize("which", ["forward", "queries", "keys"])
def test_widest_heads_in_the_least_shared_memory(which):
    check(problem(8, 0, 1, 128, 256, torch.float32), 89, which)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["forward", "queries", "keys"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize(
    "shape",
    [
        (8, 3, 2, 16, 16),
        (10, 3, 1, 16, 16),
        (12, 2, 1, 16, 16),
        (14, 2, 1, 16, 40),
        (8, 4, 1, 16, 48),
        (10, 3, 1, 16, 64),
    ],
    ids=lambda s: "-".join(map(str, s)),
)
def test_family(shape, dtype, capability, which):
    check(problem(*shape, dtype), capability, which)
