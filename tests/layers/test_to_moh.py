"""Dense Vision Transformers into mixture-of-head ones."""

import copy

import pytest
import timm
import torch

import visionattn
from visionattn.layers.moh import MoHAttention, pop_aux_loss

ARGS = dict(img_size=32, num_classes=5)


def vit(name="test_vit", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**ARGS, **kwargs}).eval()


def heads_of(model):
    return [(m.shared_head, m.routed_head, m.num_heads) for m in model.modules() if isinstance(m, MoHAttention)]


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "deit_tiny_patch16_224"])
def test_all_heads_is_the_dense_model(name):
    model, x = vit(name), torch.randn(2, 3, 32, 32)
    before, names = model(x), list(model.state_dict())
    weights = {id(p) for p in model.parameters()}
    same = visionattn.to_moh(model, active=1.0)
    assert same is model and heads_of(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names and {id(p) for p in model.parameters()} == weights


def test_starting_point():
    """The dense attention with some heads left out: the shared stay, and of the others those of the longest queries."""
    model = vit(embed_dim=96, num_heads=12)
    dense = copy.deepcopy(model.blocks[0].attn)
    layer = visionattn.to_moh(model, active=0.75).blocks[0].attn
    assert set(heads_of(model)) == {(6, 3, 12)}
    x = torch.randn(2, 7, 96)
    qkv = dense.qkv(x).view(2, 7, 3, 12, 8)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    keep = torch.zeros(2, 7, 12)
    keep[..., :6] = 1
    longest = qkv[:, :, 0, 6:].norm(dim=-1).topk(3, dim=-1).indices + 6
    keep.scatter_(2, longest, 1.0)
    torch.testing.assert_close(layer(x), dense.proj((heads * keep[..., None]).flatten(2)))


@pytest.mark.parametrize("router", ["query", "linear"])
def test_trains(router):
    model = visionattn.to_moh(vit(embed_dim=96, num_heads=12), 0.5, router=router).train()
    x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4,))
    loss = torch.nn.functional.cross_entropy(model(x), y)
    aux = pop_aux_loss(model)
    # E heads, k of them: between k / E (all tokens agree) and E times that, 0.01 in front
    assert 0 < aux.item() < 0.01 * 12
    (loss + aux).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    routers = [n for n, _ in model.named_parameters() if ".wg" in n]
    assert bool(routers) == (router == "linear")


def test_routing_gradient():
    """The selection passes gradients to the queries that are not those of the attention itself."""
    model = visionattn.to_moh(vit(embed_dim=96, num_heads=12), 0.5)
    layer = model.blocks[0].attn.train()
    x = torch.randn(1, 5, 96)
    layer(x)
    (grad,) = torch.autograd.grad(layer.pop_aux_loss(), [layer.qkv.weight])
    q = grad.view(3, 12, 8, 96)[0]
    assert q[layer.shared_head :].abs().sum() > 0 and q[: layer.shared_head].abs().sum() == 0


def test_device_and_dtype_and_mode():
    model = visionattn.to_moh(vit().bfloat16(), 0.5, shared=0, router="linear")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.blocks[0].attn.training
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiles_and_scripts():
    model, x = visionattn.to_moh(vit(), 0.5, shared=0), torch.randn(1, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_refuses():
    with pytest.raises(ValueError, match=r"no timm\.layers\.Attention"):
        visionattn.to_moh(timm.create_model("test_resnet"))
    model = vit()
    with pytest.raises(ValueError, match="shared=9"):
        visionattn.to_moh(model, shared=9)
    assert not heads_of(model)
    with pytest.raises(ValueError, match="routed heads already"):
        visionattn.to_moh(visionattn.to_moh(model))
