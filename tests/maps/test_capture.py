"""What attention_maps does around the maps: selection, memory, restoration, errors; and rollout."""

import copy

import pytest
import timm
import torch
from torch import nn

import visionattn
from visionattn.layers import AgentAttention, MoHAttention
from visionattn.maps import AttentionMap, attention_maps, map_layers, register_map, rollout
from visionattn.maps.registry import _explainers

X = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5, img_size=(48, 80))
    assert all(m.fused_attn for m in model.modules() if hasattr(m, "fused_attn"))
    return model


def test_nothing_of_the_model_changes(vit):
    before = vit.train()(X)
    vit.blocks[1].eval()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    maps = visionattn.attention_maps(vit, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.training and not vit.blocks[1].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert all(m.fused_attn for m in vit.modules() if hasattr(m, "fused_attn"))
    assert torch.equal(before, vit.train()(X))
    assert maps.keys() == [f"blocks.{i}.attn" for i in range(6)]
    assert maps["blocks.3.attn"].num_prefix_tokens == 1 and "blocks.3.attn" in maps
    assert not maps[0].map.requires_grad


def test_an_error_inside_leaves_no_hooks(vit):
    with pytest.raises(RuntimeError, match="channels"):
        attention_maps(vit.train(), torch.zeros(1, 4, 48, 80))
    assert vit.training and not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())

    def stop(amap):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attention_maps(vit, X, each=stop)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert len(attention_maps(vit, X)) == 6


def test_fused_and_unfused_agree_with_what_was_computed(vit):
    """With fused kernels off, timm's own softmax is what is seen; the two maps differ by rounding."""
    fused = attention_maps(vit, X)
    for block in vit.blocks:
        block.attn.fused_attn = False
    try:
        plain = attention_maps(vit, X)
    finally:
        for block in vit.blocks:
            block.attn.fused_attn = True
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a.map, b.map, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.apply(), b.apply(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layers, expected",
    [
        ("blocks.2.attn", [2]),
        ("blocks.[13].attn", [1, 3]),
        (-1, [5]),
        ([0, "blocks.4.*"], [0, 4]),
        (timm.layers.Attention, [0, 1, 2, 3, 4, 5]),
        (lambda name: name.startswith("blocks.1"), [1]),
    ],
    ids=["name", "pattern", "number", "list", "class", "function"],
)
def test_layers(vit, layers, expected):
    assert attention_maps(vit, X, layers).keys() == [f"blocks.{i}.attn" for i in expected]


def test_rows_and_heads(vit):
    whole = attention_maps(vit, X, 2)[0]
    some = attention_maps(vit, X, 2, queries=[0, -1, (0.5, 0.99)])[0]
    H, W = whole.query_grid
    assert (H, W) == (3, 5) and some.rows.tolist() == [0, 15, 1 + 1 * W + 4]
    torch.testing.assert_close(some.map, whole.map[:, :, some.rows])
    torch.testing.assert_close(some.apply(), whole.apply()[:, some.rows])
    mean = attention_maps(vit, X, 2, heads="mean")[0]
    torch.testing.assert_close(mean.map[:, 0], whole.map.mean(1))
    with pytest.raises(ValueError, match="values are not here"):
        mean.apply()
    assert mean.on_image().shape == (2, 1, 16, 3, 5)


def test_mean_of_routed_heads_is_weighted_by_the_gates():
    torch.manual_seed(0)
    layer = MoHAttention(16, 4, shared_head=1, routed_head=1).eval()
    nn.init.normal_(layer.wg.weight)
    x = torch.randn(2, 12, 16)
    full, mean = attention_maps(layer, x)[0], attention_maps(layer, x, heads="mean")[0]
    share = full.gates / full.gates.sum(1, keepdim=True)
    assert (full.gates > 0).sum(1).eq(2).all()
    torch.testing.assert_close(mean.map[:, 0], (full.map * share.unsqueeze(-1)).sum(1))


def test_memory_is_bounded(vit):
    """The limit counts what is kept; ``each`` keeps one map at a time, and rows are computed in chunks."""
    size = 2 * 2 * 16 * 16 * 4 / 2**20
    with pytest.raises(ValueError, match=r"blocks.1.attn: a map of 2 x \d x 16 x 16 would bring the maps to"):
        attention_maps(vit, X, limit_mib=size * 1.5)
    names = attention_maps(vit, X, limit_mib=size * 1.5, each=lambda amap: amap.layer)
    assert list(names) == [f"blocks.{i}.attn" for i in range(6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    """A model in 16 bit and autocast: maps in float32, of what the layers were given."""
    torch.manual_seed(0)
    model = timm.create_model("test_agent_deit", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    exact = attention_maps(model, x)
    with torch.autocast("cpu", dtype):
        under = attention_maps(model, x)
    low = attention_maps(model.to(dtype), x.to(dtype))
    for a, b, c in zip(exact, low, under, strict=True):
        assert b.map.dtype == c.map.dtype == torch.float32
        torch.testing.assert_close(b.map.sum(-1), torch.ones_like(b.map.sum(-1)), rtol=0, atol=1e-5)
        torch.testing.assert_close(a.map, b.map, rtol=0.1, atol=1e-3)
        torch.testing.assert_close(a.map, c.map, rtol=0.1, atol=1e-3)
    assert next(model.parameters()).dtype == dtype


def test_agent_factors_and_names():
    model = timm.create_model("test_agent_swin", num_classes=5)
    x = torch.randn(1, 3, 96, 96)
    amap = attention_maps(model, x, AgentAttention)[0]
    torch.testing.assert_close(amap.factors["spread"] @ amap.factors["gather"], amap.map)
    assert list(amap.added) == ["depthwise"] and amap.as_dict()["beside the product"] == ["depthwise"]
    layers = map_layers(model, x)
    assert layers["layers.0.blocks.0.attn"] == "AgentAttention" and list(layers.values())[-1] == "WindowAttention"
    registers = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        img_size=(28, 42),
        embed_dim=16,
        num_heads=2,
        depth=1,
        features_only=True,
        out_indices=1,
    )
    amap = attention_maps(registers, torch.randn(1, 3, 28, 42))[0]
    assert amap.num_prefix_tokens == 5 and amap.key_grid == (2, 3)
    compiled = torch.compile(model, backend="eager")
    assert attention_maps(compiled, x).keys() == list(layers)


def test_missed_softmax_is_named():
    """Talking heads mix the weights after the softmax: no map, and no silence either."""
    model = timm.create_model("cait_xxs24_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=5)
    maps = attention_maps(model, torch.randn(1, 3, 32, 32))
    assert maps.missed == ["blocks.0.attn"] and "blocks.0.attn" not in maps
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1), num_classes=5)
    assert not swin.layers[0].blocks[0].attn.fused_attn  # its softmax is a module of its own
    maps = attention_maps(swin, torch.randn(1, 3, 64, 64), heads="mean")
    assert not maps.missed and len(maps) == 2


def test_a_copy_in_another_type_copies_the_layer_only():
    """Hooks that are bound to the recorder would have every copied layer copy the whole model."""

    def refuse(memo):
        raise AssertionError("the model was copied")

    model = timm.create_model("test_agent_deit", num_classes=5)
    object.__setattr__(model, "__deepcopy__", refuse)
    with pytest.raises(AssertionError, match="was copied"):
        copy.deepcopy(nn.Sequential(model))
    assert attention_maps(model, torch.randn(1, 3, 64, 64), 1, dtype=torch.float64)[0].map.dtype == torch.float64


def test_a_layer_of_ones_own():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1, keepdim=True).expand_as(x)

    def explain(layer, call):
        n = call.x.shape[1]
        where = (visionattn.maps.Segment("tokens", (n,)),)
        return visionattn.maps.Explanation(
            "softmax", lambda i: torch.full((len(call.x), 1, len(i), n), 1 / n), 1, len(call.x), where, where,
            call.x.unsqueeze(1),
        )  # fmt: skip

    model, x = nn.Sequential(nn.Linear(8, 8), Mean()), torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match="no attention was seen in Sequential"):
        attention_maps(model, x)
    register_map(Mean)(explain)
    try:
        (amap,) = attention_maps(model, x)
        torch.testing.assert_close(amap.apply(), model(x))
        assert isinstance(amap, AttentionMap) and amap.layer == "1"
    finally:
        del _explainers[Mean]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(layers="head"), "layers='head' matches none of blocks.0.attn, "),
        (dict(layers=6), "there is no number 6: 6 layers were seen, 0 to 5"),
        (dict(heads="max"), "heads='max' is unknown: use None"),
        (dict(queries=[16]), "blocks.0.attn: there is no query 16 among 16"),
        (dict(queries=[(1.0, 0.5)]), r"the place \(1.0, 0.5\) is not \(y, x\) in \[0, 1\)"),
        (dict(queries=[]), "queries is empty"),
        (dict(dtype=torch.int32), "dtype=torch.int32 is not a floating type"),
    ],
    ids=str,
)
def test_errors(vit, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        attention_maps(vit, X, **arguments)
    assert "\n" not in str(error.value)


def test_rollout_is_the_papers_product(vit):
    maps = attention_maps(vit, X, dtype=torch.float64)
    expected = torch.eye(16, dtype=torch.float64)
    for amap in maps:
        expected = (amap.map.mean(1) + torch.eye(16)) / 2 @ expected
    found = rollout(vit, X, dtype=torch.float64)
    torch.testing.assert_close(found.shares, expected)
    torch.testing.assert_close(found.on_image(), expected[:, 0, 1:].unflatten(1, (3, 5)))
    assert found.layers == maps.keys()


@pytest.mark.parametrize(
    "name, size", [("test_agent_swin", (96, 96)), ("test_halo", (72, 100)), ("test_mala", (64, 96))]
)
def test_rollout_through_a_pyramid(name, size):
    """Strided queries, keys beyond the map, signed weights, grids that shrink: shares of each token sum to one."""
    torch.manual_seed(0)
    found = rollout(timm.create_model(name, num_classes=5), torch.randn(1, 3, *size))
    assert found.shares.shape[1] < found.shares.shape[2]
    torch.testing.assert_close(found.shares.sum(-1), torch.ones_like(found.shares[..., 0]))
    assert (found.shares >= 0).all() and found.on_image().shape[1:] == found.keys[-1].shape


def test_rollout_needs_tokens():
    with pytest.raises(ValueError, match="no chosen layer has queries and keys on a grid"):
        rollout(timm.create_model("test_ela", num_classes=5), torch.randn(1, 3, 64, 64))
