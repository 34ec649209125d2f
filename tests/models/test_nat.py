"""NAT, DiNAT and DiNAT_s: what the released code computes, published counts, names of released files, sizes, recipe."""

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import param_groups_weight_decay
from torch import nn

import visionattn  # noqa: F401  registers the models
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn._meta import NoInit
from visionattn.layers import NeighborhoodAttention
from visionattn.models._checkpoint import CheckpointError
from visionattn.models.nat import NATBlock

TOLERANCE = 5e-6
TABLE = json.loads((FIXTURES / "nat/paper_table.json").read_text())
ROWS = {**TABLE["models"], **{k: v for k, v in TABLE["optional_models"].items() if timm.is_model(k)}}
NETWORKS = {"nat_mini": "nat_mini", "dinat_tiny_256x224": "dinat_tiny", "dinat_s_tiny": "dinat_s_tiny"}
PRINTED_OTHERWISE = {"dinat_s_small": 8.8, "dinat_s_base": 15.5}  # the paper: 8.7 and 15.4, cut off instead of rounded


def official(name: str):
    manifest, expected = fx.load(FIXTURES / "nat" / name)
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    return state, torch.from_numpy(fx.inputs(manifest)["x"]), expected, manifest


def load(name: str, state: dict, folder: Path, **kwargs) -> nn.Module:
    """As a user loads the authors' file."""
    torch.save(state, folder / "official.pth")
    overlay = dict(file=str(folder / "official.pth"))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def sampled(y: torch.Tensor) -> torch.Tensor:
    """The fixtures' 4 x 4 positions of the first image's map."""
    rows, cols = ([math.floor((i + 0.5) * n / 4) for i in range(4)] for n in y.shape[2:])
    return y[:1, :, rows][..., cols]


@pytest.mark.parametrize("fixture", sorted(NETWORKS))
def test_released_networks(fixture, tmp_path):
    state, x, expected, manifest = official(fixture)
    model = load(NETWORKS[fixture], state, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert relative_error(model.forward_head(last), expected["logits"]) < TOLERANCE
        assert relative_error(model.forward_head(last, pre_logits=True), expected["pre_logits"]) < TOLERANCE
    for i, y in enumerate(maps, 1):
        assert relative_error(y.mean((2, 3)), expected[f"stage{i}"]) < TOLERANCE
        assert relative_error(sampled(y), expected[f"stage{i}_grid"]) < TOLERANCE


@pytest.mark.parametrize("wrapped", [False, True])
def test_released_dense_backbone(wrapped, tmp_path):
    """Its norms come with the file; mmdetection's wrapper and prefix are opened."""
    state, x, expected, _ = official("nat_mini_dense_250x186")
    if wrapped:
        state = {"state_dict": {**{f"backbone.{k}": v for k, v in state.items()}, "neck.conv.bias": torch.zeros(3)}}
    out_norm = {} if wrapped else dict(out_norm=True)
    model = load("nat_mini", state, tmp_path, features_only=True, **out_norm)
    with torch.no_grad():
        for i, y in enumerate(model(x)):
            assert relative_error(y.mean((2, 3)), expected[f"feat{i}"]) < TOLERANCE
            assert relative_error(sampled(y), expected[f"feat{i}_grid"]) < TOLERANCE


def test_some_features_of_a_dense_backbone(tmp_path):
    """A network cut after its third stage keeps that stage's norm."""
    state, x, expected, _ = official("nat_mini_dense_250x186")
    model = load("nat_mini", state, tmp_path, features_only=True, out_indices=(0, 2))
    with torch.no_grad():
        for i, y in zip((0, 2), model(x), strict=True):
            assert relative_error(y.mean((2, 3)), expected[f"feat{i}"]) < TOLERANCE
    used = sum(p.numel() for p in model.parameters())
    (sum(y.sum() for y in model(x[..., :64, :64]))).backward()
    assert used == sum(p.numel() for p in model.parameters() if p.grad is not None)


def test_released_block():
    manifest, expected = fx.load(FIXTURES / "nat/nat_block_layer_scale")
    block = NATBlock(**manifest["config"]["args"]).eval()
    block.load_state_dict({k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()})
    x = torch.from_numpy(fx.inputs(manifest)["x"]) * manifest["config"]["input_scale"]
    with torch.no_grad():
        branch = block.attn(block.norm1(x))
        middle = x + block.gamma1 * branch
        assert relative_error(branch, expected["attn_out"]) < 1e-6
        assert relative_error(block.mlp(block.norm2(middle)), expected["mlp_out"]) < 1e-6
        assert relative_error(block(x), expected["out"]) < 1e-6


def test_every_fixture_is_used():
    used = {*NETWORKS, "nat_mini_dense_250x186", "nat_block_layer_scale"}
    used |= {"na_k3_d2_13x9", "na_k7_d1_14x11", "na_k7_d2_13x9_padded"}  # tests/layers/test_neighborhood.py
    assert used == {p.stem for p in (FIXTURES / "nat").glob("*.npz")}


def multiply_adds(name: str) -> float:
    """G multiply-adds at 224 px, padding included, under the table's rule."""
    model = timm.create_model(name, device="meta").eval()
    total = 0

    def count(module, args, output):
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        else:
            sides = [max(n, least) for n, least in zip(args[0].shape[1:3], module.least, strict=True)]
            total += 2 * sides[0] * sides[1] * args[0].shape[3] * math.prod(module.kernel_size)

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, NeighborhoodAttention)):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    return total / 1e9


@pytest.mark.parametrize("name", sorted(ROWS))
@NoInit()
def test_published_counts(name):
    row = ROWS[name]
    params = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    assert params == row["official_num_params"] and round(params / 1e6) == row["params_M"]
    assert abs(multiply_adds(name) - row["macs_G_computed"]) < 1e-4
    # what is printed also counts norms and biases of offsets: the table's second number
    printed = round(row["fvcore_like_G_computed"], 1)
    assert printed == PRINTED_OTHERWISE.get(name, row["flops_G"])


@NoInit()
def test_all_variants_are_published_ones():
    assert set(timm.list_models(module="nat")) - {"test_nat"} == set(ROWS)
    for name in ROWS:
        layer_scale = name in ("nat_small", "nat_base", "dinat_base")
        assert any("gamma1" in k for k in timm.create_model(name, device="meta").state_dict()) == layer_scale
    assert sum(p.numel() for p in timm.create_model("test_nat", device="meta").parameters()) <= 500_000


def dilations(name: str) -> list[list[int]]:
    model = timm.create_model(name, device="meta")
    return [[block.attn.dilation[0] for block in level.blocks] for level in model.levels]


def test_dilations():
    assert dilations("nat_tiny") == [[1] * 3, [1] * 4, [1] * 18, [1] * 5]
    assert dilations("dinat_base") == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]
    assert dilations("dinat_s_tiny") == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]


def released(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict under the released names: downsamplers at the end of the stage before."""
    names = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "levels" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        names[".".join(parts)] = value
    return names


def transformers_names(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """transformers' layout of a released state dict (its ``dinat`` model), written down the other way round."""
    swap = [
        ("attn.rpb", "attention.self.rpb"), ("attn.proj.", "attention.output.dense."), ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."), ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense."),
    ]  # fmt: skip
    out = {}
    for name, value in state.items():
        if name.startswith("head."):
            out[name.replace("head", "classifier")] = value
        elif name.startswith("norm."):
            out[f"{prefix}.layernorm.{name[5:]}"] = value
        elif name.startswith("patch_embed.proj."):
            out[f"{prefix}.embeddings.patch_embeddings.projection.{name[17:]}"] = value
        elif name.startswith("patch_embed.norm."):
            out[f"{prefix}.embeddings.norm.{name[17:]}"] = value
        elif ".downsample." in name:
            out[f"{prefix}.encoder.{name}"] = value
        elif name.endswith("gamma1"):
            gammas = torch.stack([value, state[name.replace("gamma1", "gamma2")]])
            name = name.replace("blocks", "layers").replace("gamma1", "layer_scale_parameters")
            out[f"{prefix}.encoder.{name}"] = gammas
        elif ".qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                own = name.replace("blocks", "layers").replace("attn.qkv.", f"attention.self.{part}.")
                out[f"{prefix}.encoder.{own}"] = third
        elif not name.endswith("gamma2"):
            for ours, theirs in swap:
                name = name.replace(ours, theirs)
            out[f"{prefix}.encoder.{name.replace('blocks', 'layers')}"] = value
    return out


def drawn(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("layout", ["ours", "released", "nat", "dinat"])
def test_layouts_of_files(layout, tmp_path):
    model = drawn("test_nat")
    state = model.state_dict() if layout == "ours" else released(model)
    if layout in ("nat", "dinat"):
        state = transformers_names(state, layout)
    loaded = load("test_nat", state, tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_head_of_another_size(tmp_path):
    model = drawn("test_nat")
    loaded = load("test_nat", released(model), tmp_path, num_classes=7)
    assert loaded.head.out_features == 7
    assert torch.equal(loaded.levels[2].downsample.norm.weight, model.levels[2].downsample.norm.weight)


def test_backbone_of_transformers(tmp_path):
    """Its dense backbone: no prefix, and the norms of the four maps."""
    model = drawn("test_nat", out_norm=True, num_classes=0)
    state = {}
    for name, value in transformers_names(released(model), "dinat").items():
        name = name.removeprefix("dinat.").replace("layernorm.", "hidden_states_norms.stage4.")
        if found := re.match(r"encoder\.levels\.(\d)\.out_norm\.(.*)", name):
            name = f"hidden_states_norms.stage{int(found[1]) + 1}.{found[2]}"
        state[name] = value
    assert sum(name.startswith("hidden_states_norms.") for name in state) == 8
    loaded = load("test_nat", state, tmp_path, features_only=True)
    x = torch.randn(1, 3, 49, 66)
    with torch.no_grad():
        for y, expected in zip(loaded(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(y, expected)
    del state["hidden_states_norms.stage1.bias"], state["hidden_states_norms.stage1.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 2 of .*levels.0.out_norm.weight"):
        load("test_nat", state, tmp_path, features_only=True)


def test_classifier_under_out_norm(tmp_path):
    """Where a dense backbone starts from a classifier: the norms that the file lacks are fresh."""
    model = drawn("test_nat")
    loaded = load("test_nat", released(model), tmp_path, features_only=True, out_norm=True).model
    assert torch.equal(loaded.levels[0].out_norm.weight, torch.ones(16))
    assert torch.equal(loaded.norm.weight, model.norm.weight)


def test_wrong_variant(tmp_path):
    """Layer scale tells files apart."""
    state = released(drawn("test_nat", layer_scale=0))
    with pytest.raises(CheckpointError, match="gamma1") as error:
        load("test_nat", state, tmp_path)
    assert "\n" not in str(error.value)


def test_tables_of_another_window(tmp_path):
    model = drawn("test_nat")
    loaded = load("test_nat", released(model), tmp_path, kernel_size=5)
    table, wider = model.levels[1].blocks[0].attn.rpb, loaded.levels[1].blocks[0].attn.rpb
    expected = nn.functional.interpolate(table[None], (9, 9), mode="bicubic", align_corners=False)[0]
    assert wider.shape == (2, 9, 9) and torch.equal(wider, expected)


@pytest.mark.parametrize("name", ["test_nat", "swin_layout"])
@pytest.mark.parametrize("size", [(96, 96), (64, 160), (97, 75), (32, 33), (30, 18)])
def test_sizes(name, size):
    kwargs = dict(swin_layout=True) if name == "swin_layout" else {}
    model = drawn("test_nat", **kwargs)
    features = timm.create_model("test_nat", features_only=True, **kwargs).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert model(x).isfinite().all()
        for y, r in zip(features(x), (4, 8, 16, 32), strict=True):
            assert y.shape[2:] == (-(-size[0] // r), -(-size[1] // r))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(num_heads=(2, 4, 8)), "differ in length"),
        (dict(dilations=0), "dilations=0"),
        (dict(dilations=((1,), (1, 1), (1, 0), (1,))), r"dilations\[2\]"),
        (dict(dilations=((1, 1), (1, 1), (1, 1), (1,))), r"dilations\[0\]"),
        (dict(num_heads=(3, 4, 8, 16)), "num_heads=3 does not divide stage width 16"),
        (dict(kernel_size=0), "kernel_size=0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model("test_nat", **arguments)


def test_dropouts_act():
    x = torch.randn(2, 3, 64, 64)
    for rate in ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
        model = drawn("test_nat", **{rate: 0.5}).train()
        assert not torch.equal(model(x), model(x)), rate
        model.eval()
        assert torch.equal(model(x), model(x)), rate


def test_weight_decay_is_the_recipes():
    """Tables of offsets are decayed, vectors are not."""
    model = timm.create_model("test_nat")
    assert model.no_weight_decay() == set()
    no_decay, decay = param_groups_weight_decay(model, 0.05)
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.05)
    ids = {id(p) for p in decay["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in ids}
    assert "levels.0.blocks.0.attn.rpb" in names and "levels.0.blocks.0.gamma1" not in names


def test_evaluation_transform():
    for name in ROWS:
        data = resolve_data_config(timm.create_model(name, device="meta").pretrained_cfg)
        assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")


def test_recipe():
    """The published schedule, as train.py reads it."""
    from visionattn.training import build, config

    cfg = config.make(config.read_yaml(Path(__file__).parents[2] / "configs/train/nat.yaml"))
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    schedule, epochs = build.build_schedule(cfg, optimizer, 10)
    assert epochs == 310

    def lr(epoch: float) -> float:
        schedule.step_update(round(epoch * 10))
        return optimizer.param_groups[0]["lr"]

    assert lr(0) == pytest.approx(1e-6) and lr(20) == pytest.approx(1e-3, rel=0.02)
    assert lr(300) == pytest.approx(5e-6) and lr(309) == pytest.approx(5e-6)
