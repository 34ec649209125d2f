"""A whole MoH-ViT by its kernels, interpreted on a CPU that passes for a GPU: the layers hand them what they expect.
The interpreter multiplies no bfloat16 matrices, so autocast is to float16.
test_transnext_kernels.py runs this file with TRITON_INTERPRET=1."""

import contextlib

import pytest
import timm
import torch

import visionattn  # noqa: F401  registers the models
from tests.interpreter import need_interpreter
from visionattn.layers.moh import pop_aux_loss
from visionattn.ops import _launch, _triton, conv_glu_triton, norm_triton
from visionattn.ops.aggregated import api, fused
from visionattn.ops.moh import gates_triton

need_interpreter()


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Returns the names of the kernels that are launched from now on."""
    launched, call = set(), _launch.Launch.__call__
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    for module in (norm_triton, conv_glu_triton, gates_triton, fused):
        monkeypatch.setattr(module, "on_device", lambda x: contextlib.nullcontext())
    for key in ("block_norm", "conv_glu", "head_gates"):
        monkeypatch.setitem(_triton.IN_AUTO, key, True)
    monkeypatch.setattr(_triton, "KERNELS", "auto")
    monkeypatch.setattr(_triton, "_cannot_run_on", lambda device: None)
    monkeypatch.setattr(api, "_triton_reason", lambda *args: None)
    stream = type("", (), {"synchronize": lambda self: None})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def note(self, *tensors):
        launched.add(self.kernel.__name__)
        return call(self, *tensors)

    monkeypatch.setattr(_launch.Launch, "__call__", note)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    yield launched
    torch.set_autocast_enabled("cuda", False)


def run(model, x, autocast):
    torch.set_autocast_enabled("cpu", autocast)
    torch.set_autocast_dtype("cpu", torch.float16)
    model.zero_grad(set_to_none=True)
    out = model.train()(x)
    aux = pop_aux_loss(model)
    (out.float().square().mean() + aux).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    with torch.no_grad():
        inferred, again = model.eval()(x), model(x)
    assert torch.equal(inferred, again)
    torch.set_autocast_enabled("cpu", False)
    return out.detach(), grads, aux.detach()[None], inferred


def test_network(request):
    torch.manual_seed(0)
    model, x = timm.create_model("test_moh_vit", img_size=32, depths=(1, 1, 1, 1)), torch.randn(1, 3, 32, 32)
    oracle, eager = run(model, x, False), run(model, x, True)
    launched = request.getfixturevalue("pretend_gpu")
    ours = run(model, x, True)
    assert launched == {
        "forward", "query_grad", "key_grad", "pool_grad", "pool_sum", "bias_grad", "_norm_kernel", "_norm_grad_kernel",
        "_forward_kernel", "_gate_grad_kernel", "_conv_grad_kernel", "_loss_kernel", "_backward_kernel",
    }  # fmt: skip
    for a, b, c in zip(ours, eager, oracle, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6 * c.norm()
