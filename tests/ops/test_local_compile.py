"""The kernels of local attention compile, without a GPU, for every architecture, within its shared memory."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ops.cross_compile import usage
from visionattn.ops.local import Cross, Disk, Neighborhood, fused, kernels, kernels_backward
from visionattn.ops.local.tiles import SHARED_KIB, Tile, pad_dim, pick_tiles

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

CAPABILITIES = (80, 89, 90, 100)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FLOAT32 = ("lse_ptr", "delta_ptr", "part_ptr", "slots_ptr", "dlse_ptr", "part_lse_ptr")
FLOATS = ("qk_scale", "scale")


def compile_kernel(kernel, constants, tile, dtype, capability, descriptors, absent=()):
    """As a call with aligned tensors would: `descriptors` gives the blocks of those that are there."""
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in absent or (name.endswith("_desc") and name not in descriptors):
            signature[name] = "constexpr"
            constexprs[(i,)] = constants.get(name)
        elif name.endswith("_desc"):
            signature[name] = f"tensordesc<{NAMES[dtype]}{descriptors[name]}>"
        elif name.endswith("_ptr") or name == "table":
            kind = "fp32" if name in FLOAT32 else "i32" if name in ("len_ptr", "table") else NAMES[dtype]
            signature[name] = "*" + kind
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if len(name) == 3 and name[0] == "s":
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=tile.launch())


def compile_grid(which, pattern, grid, dim, dtype, capability, bias=False, text=True):
    """One of the kernels with the tiles that :func:`pick_tiles` chooses; returns bytes of shared memory."""
    box = fused.boxes(pattern, grid)
    tiles = pick_tiles(dtype, dim, box, bias, capability)
    tile = {"forward": tiles.forward, "queries": tiles.query, "keys": tiles.backward_keys}.get(which, tiles.dense)
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    padded = pad_dim(dim)
    absent = [] if box.kind else ["table"]
    absent += ["len_ptr"] + ([] if bias else ["bias_ptr"]) + ["ek_ptr", "ev_ptr"]
    plan = SimpleNamespace(
        boxes=box, D=dim, DP=padded, text=int(text), bias_shape=(1,) if bias else None, tma=tiles.tma,
        precision=precision,
    )  # fmt: skip
    constants = fused.Plan.constants(plan, tile.query, tile.key)
    key_block, query_block = [*tile.key, 1, padded], [*tile.query, 1, padded]
    descriptors = {}
    if which in ("forward", "queries"):
        constants |= dict(EXTRA=False, LENGTHS=False)
        run = [1, tile.keys, 1, padded]
        if tiles.tma:
            descriptors = dict(k_desc=key_block, v_desc=key_block) | (dict(kt_desc=run, vt_desc=run) if text else {})
        kernel = kernels.grid_forward if which == "forward" else kernels_backward.grid_query_grad
    elif which == "keys":
        run = [1, tile.queries, 1, padded]
        if tiles.tma:
            descriptors = dict(q_desc=query_block, g_desc=query_block)
            descriptors |= dict(qt_desc=run, gt_desc=run) if text else {}
        kernel = kernels_backward.grid_key_grad
    else:
        run = [1, tile.keys, 1, padded]
        constants = dict(BM=tile.queries, BN=tile.keys, D=dim, DP=padded, LENGTHS=False, TMA=tiles.tma, PREC=precision)
        if which == "dense":
            kernel = kernels.dense_forward
            descriptors = dict(k_desc=run, v_desc=run) if tiles.tma else {}
        elif which == "dense queries":
            tile, kernel = tiles.query, kernels_backward.dense_query_grad
            descriptors = dict(k_desc=[1, tile.keys, 1, padded], v_desc=[1, tile.keys, 1, padded]) if tiles.tma else {}
        else:
            tile, kernel = tiles.backward_keys, kernels_backward.dense_key_grad
            block = [1, tile.queries, 1, padded]
            descriptors = dict(q_desc=block, g_desc=block) if tiles.tma else {}
        constants |= dict(BM=tile.queries, BN=tile.keys)
    compiled = compile_kernel(kernel, constants, tile, dtype, capability, descriptors, absent)
    assert compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024, (which, tile)
    return compiled


KERNELS = ("forward", "queries", "keys", "dense", "dense queries", "dense keys")


@pytest.mark.parametrize("capability", (80, 90, 100))
@pytest.mark.parametrize("which", ("forward", "keys"))
def test_clear(which, capability):
    compile_grid(which, Disk(16), (256, 256), 128, torch.bfloat16, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("which", KERNELS)
def test_window(which, capability):
    compile_grid(which, Neighborhood(80, 16), (256, 256), 128, torch.bfloat16, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("which", KERNELS[:3])
def test_nat(which, capability):
    compile_grid(which, Neighborhood(7), (56, 56), 32, torch.bfloat16, capability, bias=True, text=False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("which", KERNELS[:3])
def test_video(which, capability):
    pattern = Neighborhood((18, 24, 24), (2, 8, 8))
    compile_grid(which, pattern, (30, 48, 80), 128, torch.bfloat16, capability)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("dim", [32, 64, 96, 256])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("which", KERNELS)
def test_head_sizes(which, capability, dim, dtype):
    pattern = Cross(8, 8) if dim == 64 else Disk(8) if dim == 96 else Neighborhood(13, 1, 2)
    compile_grid(which, pattern, (64, 64), dim, dtype, capability)


def test_registers_at_flux():
    """Of the forward kernel that FLUX's layers stand on: none is spilled."""
    compiled = compile_grid("forward", Disk(16), (256, 256), 128, torch.bfloat16, 90)
    assert usage(compiled)["STACK"] == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bias_gradient(capability):
    constants = dict(CY=False, CX=False, BM=64, D=32, DP=32)
    tile = Tile((1, 1, 64), (1, 1, 64), 4, 1)
    compiled = compile_kernel(kernels_backward.bias_grad, constants, tile, torch.bfloat16, capability, {})
    assert compiled.metadata.shared <= 8 * 1024  # sums across warps only
    assert "mma" not in compiled.asm["ptx"]
