"""MALA's operator: the paper's equations, float64, gradients; its rotary tables."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from tests.interpreter import interpret
from visionattn.ops import linear
from visionattn.ops._triton import lacks_shared_memory
from visionattn.ops.linear import (
    mala_attention,
    mala_attention_reference,
    mala_mix,
    rotary_angles,
    rotary_lines,
    rotary_tables,
    rotate,
)


def tables(H, W, dim, dtype=torch.float32):
    sin, cos = rotary_tables(rotary_lines(H, dim), rotary_lines(W, dim))
    return sin.to(dtype), cos.to(dtype)


def problem(B=2, H=3, W=5, heads=2, dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    C = heads * dim
    qkvo = torch.randn(B, H * W, 4 * C, dtype=dtype)
    weight, bias = torch.randn(C, 1, 5, 5, dtype=dtype) * 0.2, torch.randn(C, dtype=dtype)
    return qkvo, weight, bias, *tables(H, W, dim, dtype), heads, (H, W)


@pytest.mark.parametrize("key", "abc")
def test_rotary_tables(key):
    manifest, expected = fx.load(FIXTURES / "mala/mala_rope")
    about = manifest["config"]["args"][key]
    dim = about["embed_dim"] // about["num_heads"]
    sin, cos = tables(*about["hw"], dim)
    sign = torch.tensor([-1.0, 1.0]).repeat(dim // 2)
    assert relative_error(sin * sign, expected[f"{key}_sin"]) < 1e-6
    assert relative_error(cos, expected[f"{key}_cos"]) < 1e-6
    assert relative_error(rotary_angles(dim).repeat_interleave(2), expected[f"{key}_angle"]) < 1e-6
    if key != "b":
        x = torch.from_numpy(fx.inputs(manifest)[f"q{key}"]).transpose(1, 2)
        assert relative_error(rotate(x, sin, cos).transpose(1, 2), expected[f"{key}_rotated"]) < 1e-6


def test_rows_sum_to_one_and_scaling_sharpens():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 3, 8, dtype=torch.float64) for _ in range(3))
    _, weights = mala_attention_reference(q, k, v)
    # beside z, 1e-6 stands as released
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), rtol=0, atol=1e-5)
    _, longer = mala_attention_reference(3 * q.abs(), k, v)
    _, shorter = mala_attention_reference(q.abs(), k, v)
    assert (longer.std(-1) > shorter.std(-1)).all()


def test_paper_formula():
    """Sections 3.1's theory, written out with loops over one head's tokens."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 6, 1, 4, dtype=torch.float64) for _ in range(3))
    fq, fk = F.elu(q)[0, :, 0] + 1, F.elu(k)[0, :, 0] + 1
    rows = []
    for i in range(6):
        s = torch.stack([fq[i] @ fk[j] for j in range(6)]) * 4**-0.5 / 6
        rows.append(((1 + 1 / s.sum()) * s - s.sum() / 6) @ v[0, :, 0])
    torch.testing.assert_close(mala_attention(q, k, v)[0, :, 0], torch.stack(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
def test_two_products_are_the_equation(rotated):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 35, 3, 8, dtype=torch.float64) for _ in range(3))
    sin, cos = tables(5, 7, 8, torch.float64) if rotated else (None, None)
    expected = mala_attention(q, k, v, sin, cos, backend="reference")
    torch.testing.assert_close(mala_attention(q, k, v, sin, cos), expected, rtol=1e-10, atol=1e-12)
    if rotated:
        assert not torch.allclose(mala_attention(q, k, v), expected)


def test_mix_backends():
    args = problem()
    torch.testing.assert_close(mala_mix(*args, "matmul"), mala_mix(*args, "reference"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "matmul"])
def test_gradcheck(backend):
    qkvo, weight, bias, *rest = problem(B=1, H=2, W=3, dim=4)
    leaves = [t.requires_grad_() for t in (qkvo, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: mala_mix(*t, *rest, backend), leaves)


def test_half_precision_stays_finite():
    """k^T v of 4096 tokens overflows float16; divided inside the product it does not."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4096, 1, 16) + 4 for _ in range(3))
    out = mala_attention(q.half(), k.half(), v.half())
    expected = mala_attention(q.double(), k.double(), v.double())
    assert out.isfinite().all() and (k + 1).half().transpose(1, 3).flatten(2).matmul(v.half().flatten(2)).isinf().any()
    assert relative_error(out.float(), expected.numpy()) < 0.05


def test_interpreted():
    """interpreted_mala.py, where Triton is imported as an interpreter."""
    interpret(Path(__file__).with_name("interpreted_mala.py"))


def test_triton_says_why_not():
    with pytest.raises(ValueError, match=r"dtype torch\.float64 is not supported"):
        mala_mix(*problem(), "triton")
    with pytest.raises(ValueError, match="these tensors are on cpu"):
        mala_mix(*problem(dtype=torch.float32), "triton")


def test_wide_heads_need_a_large_gpu(monkeypatch):
    """Heads of 96 channels, as mala_small's: an RTX card has 99 KiB of shared memory, an A100 163."""
    for kib, dtypes in ((99, []), (163, [torch.bfloat16]), (227, [torch.bfloat16, torch.float32])):
        gpu = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        monkeypatch.setattr(linear, "cannot_run", lambda device, dtype: None)
        monkeypatch.setattr(linear, "lacks_shared_memory", lambda _, n: lacks_shared_memory("cuda:0", n))
        for dtype in (torch.bfloat16, torch.float32):
            qkvo = torch.empty(1, 4, 4 * 192, dtype=dtype)
            reason = linear.cannot_mix(qkvo, 2, 25)
            assert (reason is None) == (dtype in dtypes)
            assert reason is None or f"of shared memory, this GPU has {kib}" in reason
            assert linear.cannot_mix(qkvo, 3, 25) is None  # 64 channels


def test_refused():
    with pytest.raises(ValueError, match="backend flash is unknown"):
        mala_mix(*problem(), "flash")
    with pytest.raises(ValueError, match="backend triton is unknown"):
        mala_attention(*(torch.zeros(1, 4, 1, 4) for _ in range(3)), backend="triton")
