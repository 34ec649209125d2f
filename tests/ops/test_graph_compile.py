"""The graph kernels compiled for GPUs that need not be there."""

import os

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from visionattn.ops.graph import fused, kernels  # noqa: E402


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("heads, dim", [(8, 10), (6, 32), (4, 160)])
@pytest.mark.parametrize("name", ["forward_kernel", "query_kernel", "key_kernel"])
def test_compiles_without_local_memory(name, heads, dim, capability):
    kernel, tiles = getattr(kernels, name), fused._tiles(heads, dim)
    warps = tiles.pop("num_warps")
    kinds = dict(start="*i32", neighbour="*i32", den="*fp32", delta="*fp32", scale="fp32", eps="fp32")
    kinds |= dict.fromkeys(("sq", "sk", "sv", "heads", "dim"), "i32") | dict.fromkeys(tiles, "constexpr")
    signature = {arg: kinds.get(arg, "*fp32") for arg in kernel.arg_names}
    constants = {(i,): tiles[arg] for i, arg in enumerate(kernel.arg_names) if arg in tiles}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps))
    assert ".local" not in compiled.asm["ptx"] and compiled.metadata.shared <= 48 * 1024
