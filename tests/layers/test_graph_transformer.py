"""The graph transformer against what the released code computes, and against its own formulas."""

import json
import types

import pytest
import timm
import torch

import visionattn
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers import GraphTransformerNet
from visionattn.layers.graph_transformer import MLPReadout, batch_norm_rows, grid_neighbours
from visionattn.ops.graph import full_graph, make_graph

FOLDER = FIXTURES / "graph_transformer"
LAYERS = sorted(p.stem for p in FOLDER.glob("gt_layer_*.json"))
NETS = sorted({p.stem for p in FOLDER.glob("gt_*.json")} - set(LAYERS))


def load(module, manifest):
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    assert sum(p.numel() for p in module.parameters()) == manifest["num_params"]
    return module.eval()


def problem(name):
    manifest, expected = fx.load(FOLDER / name)
    inputs = {k: torch.from_numpy(v) for k, v in fx.inputs(manifest).items()}
    edges = [
        torch.from_numpy(expected[f"input_{key}"]) for key in ("src", "dst", "graph_id") if f"input_{key}" in expected
    ]
    return manifest, expected, inputs, edges


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    manifest, expected, inputs, (src, dst, _) = problem(name)
    config = dict(manifest["config"])
    scale, edge_feat = config.pop("input_scale"), "with edge" in config.pop("class")
    layer = load(visionattn.create_module("graph_transformer", edge_feat=edge_feat, **config), manifest)
    h, e = scale * inputs["h"], inputs.get("e")
    graph = make_graph(src, dst, h.shape[0])
    assert relative_error(layer.attention.weights(h, graph, e), expected["alpha"]) < 1e-6
    if edge_feat:
        assert relative_error(layer.attention(h, graph, e)[1], expected["edge_scores"]) < 1e-6
    for mode in ("", "_train"):
        layer.train(bool(mode))
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        for call in [(graph, e), (src, dst, e), ((src, dst), e)] if edge_feat else [(graph,), (src, dst)]:
            layer.load_state_dict(state)
            out = layer(h, *call)
            if edge_feat:
                assert relative_error(out[1], expected[f"e{mode}"]) < 1e-6
                out = out[0]
            assert relative_error(out, expected[f"h{mode}"]) < 1e-6


@pytest.mark.parametrize("name", NETS)
def test_net(name):
    manifest, expected, inputs, edges = problem(name)
    net = load(GraphTransformerNet(**manifest["config"]["net_params"]), manifest)
    states = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out if isinstance(out, tuple) else (out,)))
    h = inputs.pop("h")
    with torch.no_grad():
        out = net(tuple(edges), h, **inputs)
    assert relative_error(out, expected["out"]) < 5e-6
    assert relative_error(states[-1][0], expected["node_features"]) < 5e-6
    assert relative_error(states[0][0], expected["layer0_nodes"]) < 5e-6
    assert relative_error(torch.stack([s[0].mean(0) for s in states]), expected["layer_node_mean"]) < 5e-6
    if "edge_features" in expected:
        assert relative_error(states[-1][1], expected["edge_features"]) < 5e-6
        assert relative_error(states[0][1], expected["layer0_edges"]) < 5e-6
    # an object with PyTorch Geometric's attributes gives the same
    batch = types.SimpleNamespace(
        edge_index=torch.stack(edges[:2]), batch=edges[2], num_graphs=int(edges[2].max()) + 1, x=h[:, None],
        edge_attr=inputs.get("e"), lap_pos_enc=inputs.get("lap_pos_enc"), wl_pos_enc=inputs.get("wl_pos_enc"),
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(net(batch), out)


def test_mlp_readout():
    manifest, expected, inputs, _ = problem("mlp_readout")
    config = {k: v for k, v in manifest["config"].items() if k != "class"}
    assert relative_error(load(MLPReadout(**config), manifest)(inputs["x"]), expected["y"]) < 1e-6


DATA = {
    "ZINC": dict(num_atom_type=28, num_bond_type=4, hidden_dim=64, pos_enc_dim=8),
    "PATTERN": dict(in_dim=3, n_classes=2, pos_enc_dim=2),
    "CLUSTER": dict(in_dim=7, n_classes=6, pos_enc_dim=10),
}
TABLE = json.loads((FOLDER / "paper_table.json").read_text())


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
@pytest.mark.parametrize("data", DATA)
def test_counts(data, norm):
    """All nine published counts, for either norm."""

    def count(**kwargs):
        norms = dict(layer_norm=norm == "layer_norm", batch_norm=norm == "batch_norm")
        net = GraphTransformerNet(**DATA[data], **norms, **kwargs, device="meta")
        return sum(p.numel() for p in net.parameters())

    assert count() == TABLE[norm][f"{data} no PE"]["official_num_params"]
    assert count(lap_pos_enc=True) == TABLE[norm][f"{data} LapPE"]["official_num_params"]
    assert count(wl_pos_enc=True) == TABLE["wl_pe_batch_norm"][data]["official_num_params"]


def small_graph():
    torch.manual_seed(0)
    src, dst = (torch.rand(9, 9) < 0.4).nonzero(as_tuple=True)
    return src, dst


def test_isolated_node_is_zero_before_the_residual():
    layer = visionattn.create_module("graph_transformer", in_dim=8, num_heads=2)
    h = torch.randn(3, 8)
    attended, _ = layer.attention(h, make_graph(torch.tensor([0]), torch.tensor([1]), 3))
    assert (attended[[0, 2]] == 0).all() and torch.isfinite(layer(h, torch.tensor([[0], [1]]))).all()


def test_both_norms_are_applied():
    layer = visionattn.create_module(
        "graph_transformer", in_dim=8, num_heads=2, layer_norm=True, batch_norm=True
    ).eval()
    with torch.no_grad():
        layer.batch_norm2.running_mean.fill_(3.0)
    src, dst = small_graph()
    out = layer(torch.randn(9, 8), (src, dst))
    assert torch.allclose(out.mean(-1), torch.full((9,), -3.0), atol=1e-3)  # LN centres, BN then shifts


def test_padding_rows_leave_batch_norm_alone():
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    norms = [torch.nn.BatchNorm1d(5, dtype=torch.float64) for _ in range(2)]
    valid = torch.tensor([1.0] * 7 + [0.0] * 3, dtype=torch.float64)
    plain = norms[0](x)
    padded = batch_norm_rows(norms[1], torch.cat([x, 100 * torch.randn(3, 5, dtype=torch.float64)]), valid)
    assert torch.allclose(plain, padded[:7], atol=1e-12)
    for a, b in zip(norms[0].state_dict().values(), norms[1].state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (1, 1)])
def test_grid_equals_its_edge_list(grid, neighbours):
    torch.manual_seed(0)
    layer = visionattn.create_module(
        "graph_transformer", dim=8, num_heads=2, neighbours=neighbours, use_bias=True, dtype=torch.float64
    )
    N = grid[0] * grid[1]
    x = torch.randn(2, N, 8, dtype=torch.float64)
    index, valid = grid_neighbours(grid, neighbours)
    dst, place = valid.nonzero(as_tuple=True)
    src = index[dst, place]
    if N > 1:  # by distance, independently
        y, z = torch.arange(N) // grid[1], torch.arange(N) % grid[1]
        dy, dz = (y[:, None] - y).abs(), (z[:, None] - z).abs()
        near = (dy + dz == 1) if neighbours == 4 else (torch.maximum(dy, dz) == 1)
        assert set(zip(dst.tolist(), src.tolist(), strict=True)) == set(map(tuple, near.nonzero().tolist()))
    graph_id = torch.arange(2).repeat_interleave(N)
    union = make_graph(torch.cat([src, src + N]), torch.cat([dst, dst + N]), 2 * N, graph_id)
    assert torch.allclose(layer(x, grid), layer(x.reshape(2 * N, 8), union).reshape(2, N, 8), atol=1e-12)


def test_full_graph():
    ids = torch.tensor([0, 0, 1, 0, 1])
    edges = set(zip(*[t.tolist() for t in full_graph(ids, 5)], strict=True))
    assert edges == {(a, b) for a in range(5) for b in range(5) if a != b and ids[a] == ids[b]}
    torch.manual_seed(0)
    net = GraphTransformerNet(L=2, full_graph=True, **DATA["ZINC"]).eval()
    h, e = torch.randint(28, (5,)), torch.randint(4, (2,))
    sparse = (torch.tensor([0, 2]), torch.tensor([1, 4]), ids)
    complete = full_graph(ids, 5)
    plain = GraphTransformerNet(L=2, **DATA["ZINC"]).eval()
    plain.load_state_dict(net.state_dict())
    assert torch.allclose(net(sparse, h, e), plain((*complete, ids), h, torch.zeros(len(complete[0]))), atol=1e-6)


@pytest.mark.parametrize("readout", ["mean", "sum", "max"])
def test_graph_classification_and_its_gradients(readout):
    """Two graphs in a union give what each gives alone (layer norm); everything but the last edge update learns."""
    torch.manual_seed(0)
    kwargs = dict(in_dim=5, in_dim_edge=1, n_classes=10, hidden_dim=16, n_heads=2, L=2, readout=readout)
    net = GraphTransformerNet(**kwargs, layer_norm=True, batch_norm=False)
    src, dst = small_graph()
    ids = torch.tensor([0] * 9 + [1] * 9)
    h, e = torch.randn(18, 5), torch.rand(2 * len(src), 1)
    out = net((torch.cat([src, src + 9]), torch.cat([dst, dst + 9]), ids), h, e)
    assert out.shape == (2, 10)
    alone = net((src, dst), h[:9], e[: len(src)])
    assert torch.allclose(out[:1], alone, atol=1e-5)
    out.square().sum().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert without and all(name.startswith("layers.1.") and "_e" in name for name in without)
    assert not any("proj_e" in name for name in without)


def test_errors():
    layer = visionattn.create_module("graph_transformer", in_dim=8, num_heads=2)
    with pytest.raises(ValueError, match="the features have 4"):
        layer(torch.randn(4, 8), make_graph(torch.tensor([0]), torch.tensor([1]), 5))
    with pytest.raises(ValueError, match="renumber"):
        layer(torch.randn(4, 8), (torch.tensor([0]), torch.tensor([4])))
    with pytest.raises(ValueError, match="edge_feat"):
        layer(torch.randn(4, 8), (torch.tensor([0]), torch.tensor([1])), e=torch.randn(1, 8))
    with pytest.raises(TypeError, match="no graph"):
        layer(torch.randn(4, 8), "ring")
    with pytest.raises(ValueError, match="num_heads"):
        visionattn.create_module("graph_transformer", in_dim=9, num_heads=2)
    with pytest.raises(ValueError, match="residual=False"):
        visionattn.create_module("graph_transformer", in_dim=8, out_dim=16)
    with pytest.raises(ValueError, match="needs num_atom_type"):
        GraphTransformerNet(in_dim=3)
    with pytest.raises(ValueError, match="lap_pos_enc"):
        GraphTransformerNet(**DATA["PATTERN"], L=1, lap_pos_enc=True)(small_graph(), torch.zeros(9).long())


def test_is_an_attn_layer_of_timm():
    cls = type(visionattn.create_module("graph_transformer", dim=8, num_heads=2))
    attn = cls.configured(grid=(4, 6), num_prefix_tokens=1, layer_norm=True, batch_norm=False)
    model = timm.create_model("test_vit", img_size=(64, 96), attn_layer=attn).eval()
    out = model(torch.randn(1, 3, 64, 96))
    assert torch.isfinite(out).all() and out.std() > 0
