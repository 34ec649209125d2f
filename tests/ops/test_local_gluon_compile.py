"""The Gluon kernel of local attention compiles for sm90 without a GPU: no spilled registers, within shared memory."""

import math

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from tests.ops.cross_compile import usage
from visionattn.ops.local import gluon
from visionattn.ops.local.tiles import SHARED_KIB

if gluon._missing() is not None:
    pytest.skip(gluon._missing(), allow_module_level=True)

from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from visionattn.ops.local import kernels_hopper


def compile_forward(setting, text: bool, dim=128):
    three = setting.query[0] > 1
    constants = dict(
        Q=setting.query, K=setting.key, SUB=setting.part, CAUSAL=(False,) * 3, KIND=0, THREE=three,
        PARTS=2 if text else 1, LENGTHS=False, STAGES=setting.stages, D=dim, SPECIAL=setting.special,
        PINGPONG=setting.pingpong, SKIP=setting.skip, REGISTERS=setting.registers, len_ptr=None, table=None, o_ptr=None,
    )  # fmt: skip
    blocks = {"q_desc": setting.part, "o_desc": setting.part, "k_desc": setting.key, "v_desc": setting.key}
    run = [1, math.prod(setting.key), 1, dim]
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernels_hopper.forward_kernel.arg_names):
        if name in constants or (name in ("kt_desc", "vt_desc") and not text):
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name)
        elif name.endswith("_desc"):
            block = [*blocks[name], 1, dim] if name in blocks else run
            layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
            signature[name] = f"tensordesc<bf16{block},{layout!r}>"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "qk_scale" else "i32"
    source = GluonASTSource(kernels_hopper.forward_kernel, signature, constexprs, attrs)
    options = dict(num_warps=setting.rows // 16, maxnreg=setting.cap)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(("setting", "text"), [(gluon.WINDOW, True), (gluon.VIDEO, False)], ids=["window", "video"])
def test_compiles(setting, text):
    compiled = compile_forward(setting, text)
    assert compiled.metadata.shared <= SHARED_KIB[90] * 1024
    assert "wgmma" in compiled.asm["ptx"]
    assert "LOCAL:0 " in usage(compiled), usage(compiled)  # bytes spilled
