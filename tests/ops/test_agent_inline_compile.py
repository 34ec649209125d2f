"""Kernels of the linear-attention backbones compile, without a GPU, within their shared memory."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from visionattn.ops import depthwise_triton, inline_triton, mala_triton, norm_triton

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

SHARED_KIB = {80: 163, 90: 227}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SINGLE = {
    "s_ptr",
    "sk_ptr",
    "sv_ptr",
    "ds_ptr",
    "dk_ptr",
    "dv_ptr",
    "sa_ptr",
    "sb_ptr",
    "m_ptr",
    "ma_ptr",
    "mb_ptr",
    "mk_ptr",
    "mv_ptr",
    "dm_ptr",
    "sg_ptr",
    "part_ptr",
}
FLOATS = {"scale", "factor", "square_factor", "line_factor", "eps"}


def compile_kernel(
    kernel, constants: dict, dtype: torch.dtype, capability: int, single: set[str] = frozenset(), **options
):
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants[name]
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in SINGLE | single else f"*{NAMES[dtype]}"
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024


BLOCK = dict(BLOCK_N=depthwise_triton.BLOCK_N, BLOCK_C=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_depthwise(capability, dtype):
    weights = {"w_ptr", "b_ptr"}  # float32 under autocast
    for flip in (False, True):
        constants = dict(RESIDUAL=not flip, BIAS=not flip, FLIP=flip, K=3, **BLOCK)
        compile_kernel(depthwise_triton._conv_kernel, constants, dtype, capability, weights)
    constants = dict(K=3, CHUNK=depthwise_triton.WEIGHT_CHUNK, **BLOCK)
    compile_kernel(depthwise_triton._weight_kernel, constants, dtype, capability)


@pytest.mark.parametrize("dim, dtype", [(24, torch.bfloat16), (64, torch.bfloat16), (32, torch.float32)])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_inline(capability, dim, dtype):
    constants = inline_triton._constants(dim, dtype)
    blocks = dict(BLOCK_N=inline_triton.BLOCK_N, **constants)
    compile_kernel(
        inline_triton._moments_kernel, dict(CENTER=True, CHUNK=inline_triton.CHUNK, **blocks), dtype, capability
    )
    constants.pop("PREC")
    compile_kernel(inline_triton._finish_kernel, dict(CENTER=True, **constants), dtype, capability)
    compile_kernel(inline_triton._apply_kernel, dict(BIAS=True, **blocks), dtype, capability)
    compile_kernel(inline_triton._grads_kernel, blocks, dtype, capability)


@pytest.mark.parametrize("dim, dtype", [(64, torch.bfloat16), (96, torch.bfloat16), (32, torch.float32)])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_mala(capability, dim, dtype):
    constants = mala_triton._constants(dim, dtype)
    blocks = dict(BLOCK_N=mala_triton.BLOCK_N, **constants)
    options, weights = dict(num_warps=mala_triton._warps(dim)), {"w_ptr", "b_ptr"}
    for kernel, more in (
        (mala_triton._state_kernel, dict(LAST=False, CHUNK=mala_triton.CHUNK)),
        (mala_triton._mix_kernel, dict(BIAS=True, K=5)),
        (
            mala_triton._query_grad_kernel,
            dict(BIAS=True, K=5, CHUNK=mala_triton.CHUNK, BLOCK_N=mala_triton.GRAD_BLOCK_N),
        ),
        (mala_triton._key_grad_kernel, dict(K=5)),
    ):
        compile_kernel(kernel, {**blocks, **more}, dtype, capability, weights, **options)
    constants.pop("PREC")
    compile_kernel(mala_triton._finish_kernel, constants, dtype, capability)


def test_norm():
    constants = dict(ADD=True, C=192, BLOCK_C=256, ROWS=8)
    compile_kernel(norm_triton._norm_kernel, constants, torch.bfloat16, 90, {"x_ptr", "sum_ptr", "w_ptr", "b_ptr"})
