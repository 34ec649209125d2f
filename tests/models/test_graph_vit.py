"""GraphViT: its blocks are the paper's layer, its graphs are what they say, sizes and errors."""

import pytest
import timm
import torch

import visionattn  # noqa: F401
from visionattn.layers import GraphTransformerLayer
from visionattn.ops.graph import make_graph


def as_layer(block, dim, heads, norm):
    layer = GraphTransformerLayer(dim, num_heads=heads, layer_norm=norm == "ln", batch_norm=norm == "bn")
    long = {"bn": "batch_norm", "ln": "layer_norm"}[norm]
    layer.load_state_dict({k.replace("norm", long): v for k, v in block.state_dict().items()})
    return layer


@pytest.mark.parametrize("norm", ["bn", "ln"])
@pytest.mark.parametrize("options", [dict(k=8), dict(k=4), dict(k=5, knn=True)], ids=str)
def test_blocks_are_the_layer_on_an_edge_list(options, norm):
    torch.manual_seed(0)
    model = timm.create_model("test_graph_vit", img_size=(24, 16), norm=norm, **options)
    x = torch.randn(2, 24, 64)
    neighbour, valid = model.neighbours(x)
    if options.get("knn"):
        cosine = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
        cosine.diagonal(dim1=1, dim2=2).fill_(-2)
        assert torch.equal(neighbour.sort(-1)[0], cosine.topk(5)[1].sort(-1)[0])
        dst, src = torch.arange(48).repeat_interleave(5), (neighbour + torch.tensor([0, 24])[:, None, None]).flatten()
    else:
        node, place = valid.nonzero(as_tuple=True)
        dst = torch.cat([node, node + 24])
        src = torch.cat([neighbour[node, place], neighbour[node, place] + 24])
        assert valid.sum() == {8: 2 * (6 * 3 + 5 * 4 + 2 * 5 * 3), 4: 2 * (6 * 3 + 5 * 4)}[options["k"]]
    block = model.layers[0]
    expected = as_layer(block, 64, 4, norm)(x.flatten(0, 1), make_graph(src, dst, 48))
    assert torch.allclose(block(x, neighbour, valid).flatten(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(k=9, knn=True)], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (20, 45), (33, 64)])
def test_any_size_set_later_is_that_size_built(size, options):
    torch.manual_seed(0)
    model = timm.create_model("test_graph_vit", **options).eval()
    built = timm.create_model("test_graph_vit", img_size=size, **options).eval()
    built.load_state_dict(model.state_dict())
    model.set_input_size(size)
    x = torch.randn(1, 3, *size)
    out = model(x)
    assert torch.equal(out, built(x)) and torch.isfinite(out).all() and out.std() > 1e-4
    assert model.forward_features(x).shape[1] == -(-size[0] // 4) * -(-size[1] // 4)


def test_positions_are_used_and_layers_learn():
    torch.manual_seed(0)
    model = timm.create_model("test_graph_vit", num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.ndim > 1)
    model.eval()
    out = model(x)
    assert not torch.allclose(out, model(x.flip(-1)), atol=1e-4)
    model.basis.zero_()  # without positions the mean over a mirrored grid is the same but for the patches' own content
    assert not torch.allclose(model(x), out, atol=1e-4)


def test_small_models_and_errors():
    assert sum(p.numel() for p in timm.create_model("test_graph_vit").parameters()) < 5e5
    calls = [
        (lambda: timm.create_model("test_graph_vit", norm="gn"), "use 'bn' or 'ln'"),
        (lambda: timm.create_model("test_graph_vit", k=6), "k=4 or k=8"),
        (lambda: timm.create_model("test_graph_vit", knn=True, k=0), "1 nearest neighbour at least"),
        (lambda: timm.create_model("test_graph_vit", num_heads=7), "does not divide"),
        (lambda: timm.create_model("test_graph_vit", knn=True, k=9, img_size=8), "choose a smaller k"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(AssertionError, match="set_input_size"):
        timm.create_model("test_graph_vit")(torch.randn(1, 3, 64, 64))
