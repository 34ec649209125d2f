"""Mixture-of-head attention: what the released modules compute, the routing rules, and the load-balance loss."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import visionattn
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers.moh import MoHAttention, pop_aux_loss, set_aux_weights, split_heads
from visionattn.layers.transnext import (
    AggregatedAttention,
    ContinuousPositionBias,
    ConvGLU,
    CosineAttention,
    OverlapPatchEmbed,
    axis_offsets,
)

TOLERANCE = 1e-6
ATTENTION = sorted(
    f"{p.parent.name}/{p.stem}"
    for system, start in (("moh_vit", "attention_"), ("moh_vit", "aggregated_"), ("moh_dit", "moh_attention_"))
    for p in (FIXTURES / system).glob(f"{start}*.json")
)


def load(module: torch.nn.Module, manifest: dict) -> torch.nn.Module:
    module.load_state_dict({k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()})
    assert sum(p.numel() for p in module.parameters()) == manifest["num_params"]
    return module.eval()


def built(fixture: str) -> tuple[torch.nn.Module, dict, torch.Tensor]:
    manifest, expected = fx.load(FIXTURES / fixture)
    config = {k: v for k, v in manifest["config"].items() if k != "class"}
    module = load(visionattn.create_module("moh", **config), manifest)
    return module, expected, torch.from_numpy(fx.inputs(manifest)["x"])


@pytest.mark.parametrize("fixture", ATTENTION)
def test_attention(fixture):
    module, expected, x = built(fixture)
    seen = {}
    module.gates = lambda x, q, gates=module.gates: seen.setdefault("gates", gates(x, q))
    with torch.no_grad():
        assert relative_error(module(x), expected["y"]) < TOLERANCE
        assert relative_error(module(x), expected["y"]) < TOLERANCE  # from the cached bias
    assert relative_error(seen["gates"], expected["gates"]) < TOLERANCE
    if "l_aux" in expected:
        module.train()(x)
        assert relative_error(module.pop_load_balance()[None], expected["l_aux"]) < TOLERANCE
        logits = module.wg(x).flatten(0, 1)
        assert relative_error(logits, expected["router_logits"]) < TOLERANCE
        chosen = seen["gates"][..., module.shared_head :].nonzero()[:, 2].view(*x.shape[:2], -1)
        assert (chosen.numpy() == expected["topk_indices_sorted"]).all()
    else:
        module.train()(x)
        assert module.pop_aux_loss() is None


def test_conv_glu():
    manifest, expected = fx.load(FIXTURES / "moh_vit/conv_glu")
    module = load(ConvGLU(30, 100), manifest)
    assert relative_error(module(torch.from_numpy(fx.inputs(manifest)["x"]), (4, 5)), expected["y"]) < TOLERANCE


def test_overlap_patch_embed():
    manifest, expected = fx.load(FIXTURES / "moh_vit/overlap_patch_embed")
    module = load(OverlapPatchEmbed(7, 4, 3, 24), manifest)
    tokens, grid = module(torch.from_numpy(fx.inputs(manifest)["x"]))
    assert grid == (6, 8)
    assert relative_error(tokens, expected["y"]) < TOLERANCE


def test_relative_coords():
    _, expected = fx.load(FIXTURES / "moh_vit/relative_coords")
    for name, coords in expected.items():
        q, k, p = (int(part[1:]) for part in name.split("_"))
        values, index = axis_offsets(q, k, p, torch.device("cpu"))
        rows = values[index][:, None, :, None].expand(q, q, k, k)
        cols = values[index][None, :, None, :].expand(q, q, k, k)
        assert relative_error(torch.stack([rows, cols], -1).view(q * q, k * k, 2), coords) < TOLERANCE, name
        if q % k == 0:
            assert len(values) == 2 * q - q // k


@pytest.mark.parametrize("q, k", [(7, 3), (25, 3), (13, 6), (5, 5), (12, 5), (3, 1)])
def test_offsets_are_those_of_adaptive_pooling(q, k):
    position = torch.arange(q, dtype=torch.float64)
    keys = torch.nn.functional.adaptive_avg_pool1d(position[None, None], k)[0, 0]
    t = (position[:, None] - keys) / (q - 1) * 8
    for dtype, error in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        values, index = axis_offsets(q, k, q, torch.device("cpu"), dtype)
        torch.testing.assert_close(values[index].double(), t.sign() * (t.abs() + 1).log2() / 3, rtol=0, atol=error)
    layer = AggregatedAttention(8, (q, q), num_heads=2, sr_ratio=q // k, dtype=torch.float64)
    pairs = layer.distances((q, q), (k, k))[0]
    assert set(pairs[:, 0].tolist()) == set(values.tolist()), "a float64 layer has them in float64"


@pytest.mark.parametrize("cls, kwargs", [(CosineAttention, {}), (AggregatedAttention, dict(sr_ratio=2))])
def test_bias_cache(cls, kwargs):
    """A bias that is kept must never outlive what it was made from."""
    torch.manual_seed(0)
    module = cls(16, 6, num_heads=2, **kwargs).eval()
    assert isinstance(module, ContinuousPositionBias)
    x = torch.randn(1, 24, 16)

    def fresh(m=None):
        m = module if m is None else m
        m._entries.clear()
        with torch.no_grad():
            return m(x.to(m.proj.weight.dtype), (4, 6))

    def again():
        with torch.no_grad():
            return module(x.to(module.proj.weight.dtype), (4, 6))

    before = again()
    assert any(key[0] == "bias" for key in module._entries) and torch.equal(again(), before)
    with torch.no_grad():
        module(torch.randn(1, 36, 16), (6, 6))
    assert torch.equal(again(), before)
    with torch.no_grad():
        module.cpb_fc2.weight.mul_(3.0)
    changed = again()
    assert not torch.equal(changed, before) and torch.equal(changed, fresh())
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})
    changed = again()
    assert torch.equal(changed, fresh())
    assert not copy.deepcopy(module)._entries
    assert not module.bfloat16()._entries and again().dtype == torch.bfloat16
    module(x.bfloat16(), (4, 6)).sum().backward()
    assert module.cpb_fc1.weight.grad is not None


def reference_loss(module, x):
    """The load-balance loss written out, token by token."""
    probs = (x @ module.wg.weight.T).softmax(-1).flatten(0, 1)
    loads = torch.zeros(probs.shape[1])
    for token in probs:
        loads[token.topk(module.routed_head).indices] += 1 / len(probs)
    return module.pool * (probs.mean(0) * loads).sum()


def routing_layers(n=3):
    torch.manual_seed(0)
    layers = [MoHAttention(24, 6, shared_head=2, routed_head=2, qkv_bias=True) for _ in range(n)]
    return set_aux_weights(torch.nn.Sequential(*layers))


def run(model, x, how="plain"):
    for layer in model:
        if how == "plain":
            x = layer(x)
        else:
            x = checkpoint(layer, x, use_reentrant=False)
    return x


@pytest.mark.parametrize("how", ["plain", "checkpoint"])
def test_aux_loss_and_gradients(how):
    model, x = routing_layers(), torch.randn(2, 5, 24)
    expected, y = [], x
    for layer in model:
        expected.append(reference_loss(layer, y))
        y = layer(y)
    loss = 0.01 * sum(expected) / 3
    wanted = torch.autograd.grad(y.square().mean() + loss, list(model.parameters()))
    pop_aux_loss(model)

    out = run(model, x, how)
    got = pop_aux_loss(model)
    torch.testing.assert_close(got, loss)
    total = out.square().mean() + got
    grads = torch.autograd.grad(total, list(model.parameters()))
    torch.testing.assert_close(grads, wanted)
    assert pop_aux_loss(model) is None  # backward ran the forwards again, and left nothing


def test_aux_loss_is_of_the_last_forward_only():
    model = routing_layers(1)
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    for _ in range(3):
        model(x)
    model(y)
    torch.testing.assert_close(pop_aux_loss(model), 0.01 * reference_loss(model[0], y))
    model.eval()(x)
    assert pop_aux_loss(model) is None


def test_aux_loss_of_copies():
    """EMA copies and pickles are made in the middle of training, and have no loss of the original's."""
    model, x = routing_layers(1), torch.randn(2, 5, 24)
    model(x)
    ema = copy.deepcopy(model)
    assert pop_aux_loss(ema) is None and pickle.loads(pickle.dumps(model))[0]._aux_loss is None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    other = routing_layers(1)
    other(torch.randn(2, 5, 24))
    expected = 0.01 * reference_loss(model[0], x)
    ema.eval()(x)
    assert pop_aux_loss(ema) is None
    torch.testing.assert_close(pop_aux_loss(model), expected)
    assert pop_aux_loss(other) is not None


@pytest.mark.parametrize("how", ["plain", "checkpoint"])
def test_aux_loss_compiled(how):
    model, x = routing_layers(2), torch.randn(2, 5, 24)
    run(model, x)
    expected = pop_aux_loss(model)
    wanted = torch.autograd.grad(expected + 0 * run(model, x).sum(), list(model.parameters()), allow_unused=True)
    pop_aux_loss(model)
    program = torch.compile(lambda x: run(model, x, how), fullgraph=how == "plain", backend="aot_eager")
    for _ in range(2):
        out = program(x)
        got = pop_aux_loss(model)
        torch.testing.assert_close(got, expected)
        grads = torch.autograd.grad(got + 0 * out.sum(), list(model.parameters()), allow_unused=True)
        torch.testing.assert_close(grads, wanted)
        assert pop_aux_loss(model) is None


def test_split_heads():
    assert split_heads(12) == (6, 3) and split_heads(12, 0.5) == (5, 1)
    assert split_heads(12, 0.5, shared=0) == (0, 6) and split_heads(12, 1.0) == (12, 0)
    assert split_heads(3) == (1, 1)
    for bad in (dict(active=0.0), dict(active=0.5, shared=7), dict(active=0.5, shared=6)):
        with pytest.raises(ValueError):
            split_heads(12, **bad)


@pytest.mark.parametrize("shared, routed", [(5, 2), (3, 0), (-1, 2)])
def test_refuses(shared, routed):
    with pytest.raises(ValueError, match="shared_head"):
        MoHAttention(24, 6, shared_head=shared, routed_head=routed)


def test_plain_attention_has_no_router():
    module = MoHAttention(24, 6, moh=False)
    assert not any(name.startswith("wg") for name, _ in module.named_parameters())


def test_every_fixture_is_used():
    used = {*ATTENTION, "moh_vit/conv_glu", "moh_vit/overlap_patch_embed", "moh_vit/relative_coords"}
    used |= {"moh_vit/moh_vit_small_80_224", "moh_dit/moh_dit_s_2_75", "moh_dit/moh_dit_xl_2_90_slice3"}
    used |= {"moh_dit/dit_block"}
    present = {
        f"{p.parent.name}/{p.stem}" for p in FIXTURES.glob("moh_*/*.json") if "outputs" in json.loads(p.read_text())
    }
    assert present == used


def test_merged_projections():
    """Queries, keys, values and the pooled map by one product, and by their modules where these have hooks."""
    torch.manual_seed(0)
    module = AggregatedAttention(16, 4, num_heads=2, sr_ratio=2, shared_head=1, routed_head=1).eval()
    x = torch.randn(2, 16, 16)
    with torch.no_grad():
        merged = module(x)
        assert any(key[0] == "merged" for key in module._entries)
        seen = []
        handle = module.kv.register_forward_hook(lambda *args: seen.append(args))
        apart = module(x)
        assert len(seen) == 2  # of the tokens and of the pooled map
        handle.remove()
        torch.testing.assert_close(merged, apart)
        module.kv.weight.mul_(2.0)
        assert not torch.allclose(module(x), merged)
    module(x).square().sum().backward()
    grads = [p.grad.clone() for p in (module.q.weight, module.kv.weight, module.kv.bias, module.sr.weight)]
    module.zero_grad()
    module.q.register_forward_hook(lambda *args: None)
    module(x).square().sum().backward()
    for grad, p in zip(grads, (module.q.weight, module.kv.weight, module.kv.bias, module.sr.weight), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_nothing_is_kept_of_programs():
    from torch.fx.experimental.proxy_tensor import make_fx

    module = AggregatedAttention(16, 4, num_heads=2, sr_ratio=2).eval()
    x = torch.randn(2, 16, 16)
    with torch.no_grad():
        make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        for values in (*module._entries.values(), *module._constants.values()):
            tensors = values[2] if isinstance(values[0], tuple) and len(values) == 3 else values
            assert all(type(t) is torch.Tensor for t in (tensors if isinstance(tensors, tuple) else (tensors,)))
        assert module(x).isfinite().all()
