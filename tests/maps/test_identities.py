"""Rows that should sum to one do, and the map applied to the values is what the layer computed.

What the layer computed is captured independently: the input of its output projection, or its output where it has none.
Weights are drawn at random, also those that start as zeros, so that no term can be missing unseen.
"""

import pytest
import timm
import torch
from torch import nn

import visionattn
from visionattn.layers import (
    ELA,
    MALA,
    ULSAM,
    AgentAttention,
    AggregatedAttention,
    CosineAttention,
    GraphTransformerNet,
    HaloAttention,
    InLineAttention,
    MixerGatingUnit,
    MoHAttention,
    NeighborhoodAttention,
)
from visionattn.layers.graph_transformer import GraphAttention
from visionattn.layers.softmax import SoftmaxAttention
from visionattn.layers.window import SpatialReductionAttention, StripeAttention
from visionattn.maps import attention_maps, local_map
from visionattn.maps.softmax import explain_product
from visionattn.models.graph_vit import NeighbourAttention
from visionattn.ops.local import Cross, Disk, Neighborhood, local_attention


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with all its parameters and running statistics at random."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point() and "basis" not in name and "lines" not in name and p.numel():
            fan = p[0].numel() if p.ndim > 1 else 4
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.data.copy_(noise.abs() + 0.5 if "running_var" in name else noise * fan**-0.5)
    return model


def host(name: str, **kwargs) -> nn.Module:
    small = dict(num_classes=5, img_size=64)
    if "pvt" in name:
        small |= dict(embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(1, 1, 1, 1))
    elif "deit" in name:
        small |= dict(embed_dim=24, num_heads=3, depth=2)
    else:
        small |= dict(embed_dim=8, num_heads=(1, 2, 4, 8) if "swin" in name else (2, 4, 8, 16), depths=(2, 2, 1, 1))
    return timm.create_model(name, **{**small, **kwargs})


class Layer(nn.Module):
    """A mixer on tokens, as a model."""

    def __init__(self, layer: nn.Module, grid=None):
        super().__init__()
        self.layer, self.grid = layer, grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if self.grid is None else self.layer(x, self.grid)


def before_projection(layer: nn.Module) -> nn.Module | None:
    """The module whose input is what the map makes; None for the layer's own output."""
    if isinstance(layer, MoHAttention):
        return layer.norm
    if isinstance(layer, visionattn.layers.GraphTransformerLayer):
        return layer.O
    if isinstance(layer, ULSAM | ELA | MixerGatingUnit | GraphAttention | NeighbourAttention | StripeAttention):
        return None
    return getattr(layer, "proj", None)


def check(model: nn.Module, x, tolerance: float = 1e-10, expected: int | None = None) -> list:
    maps = attention_maps(model, x, dtype=torch.float64)
    assert expected is None or len(maps) == expected
    seen = {}
    hooks = []
    for amap in maps:
        layer = model.get_submodule(amap.layer)
        target = before_projection(layer)
        if target is None:
            hooks.append(layer.register_forward_hook(lambda m, a, out, n=amap.layer: seen.__setitem__(n, out)))
        else:
            hooks.append(target.register_forward_pre_hook(lambda m, a, n=amap.layer: seen.__setitem__(n, a[0])))
    with torch.no_grad():
        model(*x) if isinstance(x, tuple) else model(x)
    for hook in hooks:
        hook.remove()
    for amap in maps:
        truth = seen[amap.layer][0] if isinstance(seen[amap.layer], tuple) else seen[amap.layer]
        made = amap.apply()
        if amap.kind not in ("mask", "gate"):
            truth = _tokens(truth, amap)
        elif made.ndim == 4 and truth.ndim == 3:
            made = made.flatten(2).transpose(1, 2)
        torch.testing.assert_close(made, truth, rtol=tolerance, atol=tolerance, msg=lambda m, a=amap: f"{a}: {m}")
        assert made.std() > 1e-6, f"{amap}: nothing was compared"
        if amap.kind == "softmax":
            assert (amap.map >= 0).all()
        if amap.kind == "softmax" or amap.mechanism == "InLineAttention":
            sums = amap.map.sum(dim=-1)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-9)
    return maps


def _tokens(truth: torch.Tensor, amap) -> torch.Tensor:
    """What was captured, as (B, queries, C): maps flattened, windows put back, padding cut."""
    made = amap.map.shape[:3]
    if truth.ndim == 2:
        return truth.reshape(made[0], made[2], -1)
    if truth.ndim == 4 and truth.shape[1] * truth.shape[2] != made[2]:
        return truth.flatten(2).transpose(1, 2)
    if truth.ndim == 4:
        return truth.flatten(1, 2)
    if truth.shape[0] != made[0] or truth.shape[1] != made[2]:
        pytest.fail(f"{amap}: {list(truth.shape)} was captured")
    return truth


def tiny(name: str, **kwargs) -> nn.Module:
    return timm.create_model(f"test_{name}", num_classes=5, **kwargs)


def image(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MODELS = {
    "agent_deit": lambda: (host("agent_deit_tiny", agent_num=4), image(2, 3, 48, 80), 2),
    "agent_pvt": lambda: (host("agent_pvt_tiny", attn_type="AAAB", agent_sr_ratios="2111"), image(2, 3, 64, 96), 4),
    "agent_swin": lambda: (host("agent_swin_tiny", attn_type="AABB"), image(2, 3, 64, 64), 6),
    "agent_cswin": lambda: (host("agent_cswin_tiny", attn_type="AAAA"), image(2, 3, 72, 64), 6),
    "inline_deit": lambda: (host("inline_deit_tiny"), image(2, 3, 48, 80), 2),
    "inline_pvt": lambda: (host("inline_pvt_tiny", attn_type="IISS"), image(2, 3, 64, 96), 4),
    "inline_cswin": lambda: (host("inline_cswin_tiny", attn_type="IIII"), image(2, 3, 72, 64), 6),
    "mala": lambda: (tiny("mala"), image(2, 3, 64, 96), 5),
    "moh_vit": lambda: (tiny("moh_vit"), image(2, 3, 60, 104), 5),
    "halo": lambda: (tiny("halo"), image(2, 3, 72, 100), 5),
    "halo_mask": lambda: (tiny("halo", border="mask"), image(2, 3, 72, 100), 5),
    "nat": lambda: (tiny("nat"), image(2, 3, 72, 50), 6),
    "graph_vit": lambda: (
        tiny("graph_vit", img_size=(20, 32)),
        image(2, 3, 20, 32),
        3,
    ),
    "ninformer": lambda: (
        tiny("ninformer", img_size=(32, 24)),
        image(2, 3, 32, 24),
        3,
    ),
    "ela": lambda: (tiny("ela"), image(2, 3, 72, 100), 4),
    "ulsam": lambda: (tiny("ulsam"), image(2, 3, 72, 100), 2),
    "timm_vit": lambda: (tiny("vit", img_size=(48, 80)), image(2, 3, 48, 80), 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, x, count = MODELS[name]()
    check(drawn(model), x, expected=count)


LAYERS = {
    "agent_prefix": (lambda: AgentAttention(16, 2, 9, (6, 10), num_prefix_tokens=1), (6, 10), 1),
    "inline_exp": (lambda: InLineAttention(16, 2, (6, 10), kernel_func="exp", num_prefix_tokens=1), (6, 10), 1),
    "mala_prefix": (lambda: MALA(16, 2, num_prefix_tokens=2), (6, 10), 2),
    "mala_softmax": (lambda: MALA(16, 2, "softmax", num_prefix_tokens=2), (6, 10), 2),
    "halo_pooled": (lambda: HaloAttention(16, 24, 2, 2, block_size=3, halo_size=1, avg_down=True), (7, 10), 0),
    "halo_lucid": (lambda: HaloAttention(16, heads=2, dim_head=8, block_size=4, halo_size=2), (7, 10), 0),
    "dilated_prefix": (lambda: NeighborhoodAttention(16, 2, 3, (2, 3), num_prefix_tokens=2), (7, 10), 2),
    "causal_strided": (lambda: NeighborhoodAttention(16, 2, (3, 4), 1, 2, causal=(True, False)), (7, 10), 0),
    "one_axis": (lambda: NeighborhoodAttention(16, 2, 5, dims=1), (23,), 0),
    "padded": (lambda: NeighborhoodAttention(16, 2, 5, 2, num_prefix_tokens=1), (4, 12), 1),
    "moh_query": (lambda: MoHAttention(16, 4, shared_head=1, routed_head=1, router="query"), (6, 10), 0),
    "moh_all_shared": (lambda: MoHAttention(16, 4, shared_head=4, routed_head=0, qk_norm=True), (6, 10), 0),
    "cosine_routed": (lambda: CosineAttention(16, (6, 10), 4, shared_head=1, routed_head=2), (6, 10), 0),
    "aggregated": (lambda: AggregatedAttention(16, (6, 10), 2, 5, fixed_pool_size=(3, 4)), (7, 10), 0),
    "stripes_reduced": (lambda: SpatialReductionAttention(16, 2, 2), (6, 10), 0),
    "graph_grid": (lambda: visionattn.layers.GraphTransformerLayer(16, neighbours=4, num_heads=2), (6, 10), 0),
    "softmax": (lambda: SoftmaxAttention(16, 2), (6, 10), 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, grid, prefix = LAYERS[name]
    tokens = prefix + int(torch.tensor(grid).prod())
    (amap,) = check(drawn(Layer(make(), grid)), image(2, tokens, 16))
    assert amap.num_prefix_tokens == prefix
    if name != "softmax":  # nobody tells it the grid
        assert amap.query_grid == grid and amap.on_image().shape[3:] == amap.key_grid


def swin(attn_type: str, window: int = 6, **kwargs) -> nn.Module:
    return host("agent_swin_tiny", attn_type=attn_type, window_size=window, agent_num=4, **kwargs)


WINDOWED = {
    "shifted": lambda: (swin("BBBB"), image(2, 3, 60, 84)),
    "agent": lambda: (swin("AABB"), image(2, 3, 60, 84)),
    "inline": lambda: (host("inline_swin_tiny", attn_type="IISS", window_size=6), image(2, 3, 60, 84)),
    "timm_v1": lambda: (timm_swin("swin_tiny_patch4_window7_224"), image(2, 3, 60, 84)),
    "timm_v2": lambda: (timm_swin("swinv2_tiny_window8_256"), image(2, 3, 60, 84)),
    "timm_maxvit": lambda: (maxvit(), image(2, 3, 64, 128)),
}


def maxvit() -> nn.Module:
    sizes = dict(embed_dim=(32, 32), depths=(1, 1), stem_width=16, block_type=("M", "M"))
    return timm.create_model("maxvit_rmlp_pico_rw_256", img_size=(64, 128), num_classes=5, **sizes)


def timm_swin(name: str) -> nn.Module:
    return timm.create_model(
        name, embed_dim=12, depths=(2, 2), num_heads=(1, 2), window_size=4, img_size=(60, 84), num_classes=5
    )


OWN_WAYS = ("_windowed", "_attn", "_partition_attn")


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_lie_where_the_block_puts_them(name):
    """The blocks' own way from windows to the image is the judge, after the projection."""
    model, x = WINDOWED[name]()
    drawn(model)
    blocks, seen = {}, {}
    for path, block in model.named_modules():
        if any(hasattr(block, name) for name in OWN_WAYS):
            blocks[f"{path}.attn"] = block
            block.register_forward_pre_hook(lambda m, args, n=f"{path}.attn": seen.__setitem__(n, args[0]))
    maps = attention_maps(model, x, dtype=torch.float64)
    assert maps.keys() == list(blocks)
    placed = 0
    for amap in maps:
        block, inputs = blocks[amap.layer], seen[amap.layer]
        if getattr(block, "whole", False):
            continue
        with torch.no_grad():
            own = next(getattr(block, name) for name in OWN_WAYS if hasattr(block, name))
            truth = own(inputs if name == "timm_v2" else block.norm1(inputs)).flatten(1, 2)
            made = block.attn.proj(amap.apply())
        assert amap.query_grid == tuple(inputs.shape[1:3])
        torch.testing.assert_close(made, truth, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(amap.map.sum(-1), torch.ones_like(amap.map.sum(-1)), rtol=0, atol=1e-9)
        placed += len(amap.keys) == 2  # with padding
    assert placed or name == "timm_maxvit", "no window was padded: choose another size"


def test_timm_layers_that_reduce_or_pool():
    """Keys of a smaller map, a class token that alone asks, and attention across channels, which has no grid."""
    reduced = timm.create_model("pvt_v2_b0", num_classes=5, embed_dims=(8, 16, 40, 64), depths=(1, 1, 1, 1))
    maps = check(drawn(reduced), image(1, 3, 64, 96))
    assert [m.key_grid for m in maps] == [(2, 3)] * 4 and maps[0].query_grid == (16, 24)
    cait = timm.create_model("cait_xxs24_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=5)
    last = check_rows(drawn(cait), image(1, 3, 32, 32))[-1]
    assert last.map.shape[2:] == (1, 5) and last.key_grid == (2, 2)
    xcit = timm.create_model("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1, num_classes=5, img_size=64)
    channels = check_rows(drawn(xcit), image(1, 3, 64, 64))[0]
    assert channels.query_grid is None and channels.map.shape[2] == 32


def check_rows(model: nn.Module, x) -> list:
    maps = attention_maps(model, x, dtype=torch.float64)
    for amap in maps:
        torch.testing.assert_close(amap.map.sum(-1), torch.ones_like(amap.map.sum(-1)), rtol=0, atol=1e-9)
    return maps


@pytest.mark.parametrize("edge_feat", [False, True])
def test_graph_edges(edge_feat):
    """Weights of edges, duplicates and nodes without edges among them; the rows of nodes say the same."""
    torch.manual_seed(0)
    settings = dict(in_dim=6, n_classes=3, L=2, hidden_dim=16, n_heads=2)
    net = drawn(GraphTransformerNet(**settings, **(dict(in_dim_edge=4) if edge_feat else {})))
    src = torch.tensor([0, 1, 2, 3, 3, 1, 0, 5])
    dst = torch.tensor([1, 1, 0, 2, 2, 3, 6, 1])
    h = torch.randn(7, 6).double() if edge_feat else torch.arange(7) % 6
    inputs = ((src, dst), h, torch.randn(8, 4).double()) if edge_feat else ((src, dst), h)
    amap = attention_maps(net, inputs, layers=0, dtype=torch.float64)[0]
    seen = []
    net.layers[0].attention.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    with torch.no_grad():
        net(*inputs)
    torch.testing.assert_close(amap.apply()[0], seen[0], rtol=1e-10, atol=1e-10)
    has_edges = torch.isin(torch.arange(7), dst)
    sums = amap.map[0].sum(-1)
    torch.testing.assert_close(sums, has_edges.double().expand(2, -1), rtol=0, atol=1e-4 if edge_feat else 1e-9)
    weights = amap.edges[2]
    assert weights.shape == (8, 2)
    torch.testing.assert_close(amap.map[0, :, 2, 3], weights[3] + weights[4])


def test_dense_mask_and_grouped_heads():
    """Fused attention as timm and diffusers call it: boolean and additive masks, causal, fewer heads of keys."""
    from visionattn.maps.registry import Product

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 3)
    additive = torch.randn(2, 1, 6, 5)
    cases = [(None, False, 0.3), (additive, False, None), (additive[0, 0] > -1, False, 0.5), (None, True, None)]
    for mask, causal, scale in cases:
        truth = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        found = explain_product(Product(v, q, k, mask, scale, causal), torch.float32)
        torch.testing.assert_close(found.rows(torch.tensor([4, 0])) @ found.values, truth[:, :, [4, 0]])


@pytest.mark.parametrize("pattern", [Disk(2.5), Cross(3, 1), Neighborhood((3, 5), (1, 2))], ids=str)
def test_patterns_with_text(pattern):
    """CLEAR's and GNA's patterns as the diffusion side uses them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3 + 6 * 9, 2, 8, dtype=torch.float64) for _ in range(3))
    amap = local_map(q, k, v, (6, 9), pattern, text=3)
    truth = local_attention(q, k, v, (6, 9), pattern, text=3, backend="reference")
    torch.testing.assert_close(amap.apply(), truth.flatten(2), rtol=1e-10, atol=1e-10)
    assert amap.num_prefix_tokens == 3 and (amap.map[:, :, 3:, 3:] == 0).any() and (amap.map[:, :, :3] > 0).all()


def test_halo_lets_prefix_tokens_pass():
    layer = drawn(Layer(HaloAttention(16, num_heads=2, block_size=3, halo_size=1, num_prefix_tokens=2), (7, 10)))
    (amap,) = check(layer, image(2, 72, 16))
    assert amap.num_prefix_tokens == 0 and amap.query_grid == (7, 10)
