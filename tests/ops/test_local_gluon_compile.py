"""The Gluon kernels of local attention compile for sm90 without a GPU: hardly spill, fit shared memory."""

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from tests.ops.cross_compile import usage
from visionattn.ops.local import fused, gluon, gluon_grad, rates
from visionattn.ops.local.patterns import Axis
from visionattn.ops.local.tiles import SHARED_KIB

if gluon.cannot_build_gluon(gluon.KERNELS) is not None:
    pytest.skip(gluon.cannot_build_gluon(gluon.KERNELS), allow_module_level=True)

from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from visionattn.ops.local import kernels_disk, kernels_grad, kernels_hopper


def build(kernel, constants, blocks, setting, warps):
    """As a launch would: `blocks` of the descriptors that are there."""
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or (name.endswith("_desc") and name not in blocks):
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name)
        elif name.endswith("_desc"):
            block = list(blocks[name])
            layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
            signature[name] = f"tensordesc<bf16{block},{layout!r}>"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("qk_scale", "scale") else "i32"
    source = GluonASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, maxnreg=setting.cap))


POINTERS = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "table": "*i32", "bits": "*i64"}


def compile_forward(setting, text: bool, dim=128):
    three = setting.query[0] > 1
    constants = dict(
        Q=setting.query, K=setting.key, SUB=setting.part, CAUSAL=(False,) * 3, KIND=0, THREE=three,
        PARTS=2 if text else 1, LENGTHS=False, STAGES=setting.stages, D=dim, SPECIAL=setting.special,
        PINGPONG=setting.pingpong, REGISTERS=setting.registers, len_ptr=None, table=None, o_ptr=None,
    )  # fmt: skip
    blocks = {"q_desc": setting.part, "o_desc": setting.part, "k_desc": setting.key, "v_desc": setting.key}
    blocks = {name: (*block, 1, dim) for name, block in blocks.items()}
    if text:
        blocks |= dict.fromkeys(("kt_desc", "vt_desc"), (1, math.prod(setting.key), 1, dim))
    return build(kernels_hopper.forward_kernel, constants, blocks, setting, setting.rows // 16)


def compile_disk(setting, dim=128):
    constants = dict(
        QY=setting.groups[0], QX=setting.groups[1], STAGES=setting.stages, D=dim, QREG=setting.in_registers,
        LAZY=setting.lazy, TOGETHER=setting.together, REGISTERS=setting.registers,
    )  # fmt: skip
    blocks = dict.fromkeys(("q_desc", "k_desc", "v_desc", "o_desc"), (1, 8, 8, 1, dim))
    blocks |= dict.fromkeys(("kt_desc", "vt_desc"), (1, 64, 1, dim))
    return build(kernels_disk.disk_forward, constants, blocks, setting, 4)


# bytes spilled, nearly all of them outside the loops over keys
def compile_grad(kernel, setting, kind, dim=128, **more):
    constants = dict(
        QY=setting.groups[0], QX=setting.groups[1], KIND=kind, STAGES=setting.stages, D=dim,
        REGISTERS=setting.registers, ORDERED=setting.ordered, **more,
    )  # fmt: skip
    if kind == 0:
        constants |= dict(table=None, bits=None)
    blocks = {n: (1, 64, 1, dim) if n[1] == "t" else (1, 8, 8, 1, dim) for n in kernel.arg_names if n[-5:] == "_desc"}
    return build(kernel, constants, blocks, setting, 4)


@pytest.mark.parametrize(
    ("setting", "text", "spills"), [(gluon.WINDOW, True, 192), (gluon.VIDEO, False, 128)], ids=["window", "video"]
)
def test_compiles(setting, text, spills):
    compiled = compile_forward(setting, text)
    assert compiled.metadata.shared <= SHARED_KIB[90] * 1024
    assert "wgmma" in compiled.asm["ptx"]
    assert usage(compiled)["STACK"] <= spills


def test_disk_compiles():
    compiled = compile_disk(gluon.DISK)
    assert compiled.metadata.shared <= SHARED_KIB[90] * 1024
    assert "wgmma" in compiled.asm["ptx"]
    assert usage(compiled)["STACK"] == 0


@pytest.mark.parametrize("which", ["query", "key"])
def test_backward_compiles(which):
    """A few numbers of the loading warp are spilled, and read again for each tile of its own: under 128 bytes."""
    if which == "query":
        s = gluon_grad.DISK[0]
        compiled = compile_grad(kernels_grad.query_grad, s, 1, QREG=s.in_registers)
    else:
        compiled = compile_grad(kernels_grad.key_grad, gluon_grad.WINDOW[1], 0, TEXT_LAST=True)
    assert compiled.metadata.shared <= SHARED_KIB[90] * 1024
    assert "wgmma" in compiled.asm["ptx"]
    assert usage(compiled)["STACK"] < 128, usage(compiled)


def test_full_windows():
    """Which windows have full tiles only, against the mask."""
    for n, window, stride, own in itertools.product((32, 40, 64), (8, 16, 24, 32), (1, 8, 16), (8, 16)):
        if stride > window:
            continue
        axis = Axis(n, window, stride)
        mask = axis.mask()
        for m, keys_own in ((mask, False), (mask.T, True)):
            full = True
            for first in range(0, n, own):
                seen = m[first : first + own]
                at = np.flatnonzero(seen.any(0))
                full &= bool(seen[:, at[0] : at[-1] + 1].all()) and (at[-1] + 1 - at[0]) % 8 == 0
            found = gluon_grad._full_axis(axis, own, 8, keys_own)
            assert found == full, (n, window, stride, own, keys_own)


def test_planner_knows_its_limits():
    assert (rates.GLUON_FULL, rates.GLUON_RADIUS) == (gluon.FULL, gluon.RADIUS)


def test_a_kernel_that_fails():
    """Triton's run from then on, said once; a forced kernel's failure and a full memory are the caller's."""
    failed = []

    def run(error=None):
        if error is not None:
            raise error

    assert fused._try_gluon(failed, "auto", "x runs", run)
    with pytest.warns(UserWarning, match="x runs Triton's kernels, not Gluon's"):
        assert not fused._try_gluon(failed, "auto", "x runs", lambda: run(RuntimeError("no such thing")))
    assert len(failed) == 1 and not fused._try_gluon(failed, "auto", "x runs", run)
    with pytest.raises(RuntimeError, match="no such thing"):
        fused._try_gluon(failed, "gluon", "x runs", lambda: run(RuntimeError("no such thing")))
    with pytest.raises(torch.OutOfMemoryError):
        fused._try_gluon([], "auto", "x runs", lambda: run(torch.OutOfMemoryError("full")))
