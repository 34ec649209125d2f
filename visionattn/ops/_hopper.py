"""What the Gluon kernels for Hopper GPUs share: the running softmax, its scaling, and views of shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # its name from triton 3.8 on


def _rescale() -> str:
    """Multiplies 32 numbers of a thread by its rows' two factors (elements 0 and 2), where a warp has any but 1."""
    ask = [f"setp.neu.or.f32 p, ${64 + i}, 0f3F800000, p;" for i in (1, 2, 3)]
    keep = [f"mov.b32 ${i}, ${32 + i};" for i in range(32)]
    multiply = [f"mul.f32 ${i}, ${i}, ${64 + i};" for i in range(32)]
    lines = [
        "{.reg .pred p, q;", "setp.neu.f32 p, $64, 0f3F800000;", *ask, "vote.sync.any.pred q, p, 0xffffffff;", *keep,
        "@!q bra DONE;", *multiply, "DONE:", "}",
    ]  # fmt: skip
    return "\n".join(lines)


RESCALE = gl.constexpr(_rescale())
RESCALE_REGISTERS = gl.constexpr(",".join(["=&f"] * 32 + ["f"] * 64))


@gluon.jit
def as_block(buf, desc):
    """A 2-D buffer with the shape of a descriptor's block: the same bytes."""
    return buf._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def softmax(s, row_max, row_sum, qk_scale, LAZY: gl.constexpr):
    """Probabilities, and the running maximum, sum and factor of what was before.

    LAZY: the maximum stays until one is 64 times above it, so that what was before is seldom multiplied.
    """
    top = gl.max(s, 1) * qk_scale
    if LAZY:
        new_max = gl.where(top > row_max + 6.0, top, row_max)
    else:
        new_max = gl.maximum(row_max, top)
    p = gl.exp2(s * qk_scale - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def scaled(acc, rescale, LAZY: gl.constexpr):
    """What was accumulated, times its rows' factors; LAZY: only in warps that have any but 1."""
    factor = gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    if LAZY:
        factor, _ = gl.broadcast(factor, acc)
        return gl.inline_asm_elementwise(RESCALE, RESCALE_REGISTERS, [acc, factor], gl.float32, True, 32)
    else:
        return acc * factor
