"""Agent and InLine in their hosts: the authors' outputs through the user's door, counts, sizes, resizing."""

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import visionattn  # noqa: F401  registers the models
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn._meta import NoInit
from visionattn.layers import AgentAttention
from visionattn.layers.window import WindowAttention
from visionattn.models._plan import mixes, numbers

TOLERANCE = 5e-6
HOSTS = ("deit", "pvt", "swin", "cswin")
CLASSIFIERS = [f"{system}_{host}_tiny" for system in ("agent", "inline") for host in HOSTS]
DENSE = ["agent_swin_tiny_dense", "agent_pvt_tiny_dense"]
RESIZED = {
    "agent_swin_small_224_to_288": "agent_swin_small_288",
    "agent_deit_small_224_to_448": "agent_deit_small_448",
}
SMALL = ["test_agent_deit", "test_agent_swin", "test_inline_deit", "test_inline_swin"]


def load(name: str):
    manifest, expected = fx.load(FIXTURES / name.partition("_")[0] / name)
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    return manifest, state, expected


def created(name: str, state: dict, path, **kwargs):
    """The model, loaded as a user loads the authors' file, with the buffers that such a file has."""
    extra = {"layers.2.blocks.1.attn_mask": torch.zeros(4, 49, 49)} if "_swin" in name else {}
    extra |= {"layers.3.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long)} if extra else {}
    torch.save({"model": {**state, **extra}, "epoch": 299}, path / "official.pth")
    overlay = dict(file=str(path / "official.pth"))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def sampled(y: torch.Tensor) -> torch.Tensor:
    rows, columns = ([int((i + 0.5) * side // 4) for i in range(4)] for side in y.shape[2:])
    return y[:1, :, rows][:, :, :, columns]


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_classifiers(name, tmp_path):
    manifest, state, expected = load(name)
    model = created(name, state, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    deit = "_deit_" in name
    wanted = [2, 5, 8, 11] if deit else None
    features, maps = model.forward_intermediates(x, indices=wanted)
    assert relative_error(model.forward_head(features), expected["logits"]) < TOLERANCE
    assert relative_error(model.forward_head(features, pre_logits=True), expected["pre_logits"]) < TOLERANCE
    for i, y in enumerate(maps):
        key = f"block{3 * i + 3}" if deit else f"stage{i + 1}"
        assert relative_error(y.mean((2, 3)), expected[key]) < TOLERANCE
        assert relative_error(sampled(y), expected[f"{key}_grid"]) < TOLERANCE


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_dense(name, tmp_path):
    manifest, state, expected = load(name)
    args = manifest["config"]["args"]
    settings = dict(features_only=True, agent_shapes=args["downstream_agent_shapes"], out_norm="norm0.weight" in state)
    prefixed = {f"backbone.{k}": v for k, v in state.items()}
    model = created(name.removesuffix("_dense"), prefixed, tmp_path, **settings)
    assert sum(p.numel() for p in model.parameters()) == manifest["num_params"]
    maps = model(torch.from_numpy(fx.inputs(manifest)["x"]))
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for i, y in enumerate(maps):
        assert tuple(y.shape[2:]) == tuple(expected["out_hw"][i])
        assert relative_error(y.mean((2, 3)), expected[f"out{i}"]) < TOLERANCE
        assert relative_error(sampled(y), expected[f"out{i}_grid"]) < TOLERANCE


@pytest.mark.parametrize("fixture", sorted(RESIZED))
@torch.no_grad()
def test_another_resolution(fixture, tmp_path):
    """The authors' loader, by a file of another resolution and by ``set_input_size``."""
    _, state, expected = load(fixture)
    name = RESIZED[fixture]
    loaded = created(name, state, tmp_path)
    small = created(name.rpartition("_")[0], state, tmp_path)
    small.set_input_size(img_size=int(name.rpartition("_")[2]))
    for model in (loaded, small):
        parameters = model.state_dict()
        for key, value in expected.items():
            got = parameters["pos_embed"][:, :57, :32] if key == "pos_embed_part" else parameters[key]
            assert relative_error(got, value) < 1e-6, key
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), small.parameters(), strict=True))


@pytest.mark.parametrize("system", ["agent", "inline"])
@NoInit()
def test_counts(system):
    rows = json.loads((FIXTURES / system / "paper_table.json").read_text())["models"]
    registered = set(timm.list_models(f"{system}_*"))
    assert registered == set(rows)
    for name, row in rows.items():
        model = timm.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == row["official_num_params"], name
        assert model.pretrained_cfg["input_size"] == (3, row["resolution"], row["resolution"]), name
        assert model.pretrained_cfg["crop_mode"] == "squash"
    for name in SMALL:
        assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) <= 500_000


ROWS = {}
for _system in ("agent", "inline"):
    ROWS |= json.loads((FIXTURES / _system / "paper_table.json").read_text())["models"]


@pytest.mark.parametrize("name", [n if n in CLASSIFIERS else pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
@NoInit()
def test_flops(name):
    """PyTorch's counter over our model and over the authors'. InLine's subtraction is carried out on D x D sums, which
    saves a product, and CSWin's two convolutions of the same values are one: up to 0.2 % less."""
    row = ROWS[name]
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, row["resolution"], row["resolution"]))
    ratio = counter.get_total_flops() / 1e9 / row["torch_flop_counter_gflops"]
    assert -2e-3 < ratio - 1 < 5e-5 if name.startswith("inline") else abs(ratio - 1) < 5e-5


@pytest.mark.parametrize("name", CLASSIFIERS)
@NoInit()
def test_norm_epsilons(name):
    """A wrong one moves the outputs too little to trust the fixtures with it."""
    model = timm.create_model(name, device="meta")
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            block_norm = path.rpartition(".")[2] in ("norm1", "norm2")
            fine = 1e-6 if "_deit_" in name or ("_pvt_" in name and block_norm) else 1e-5
            assert module.eps == fine, path


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (70, 101), (33, 130)])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_any_size(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 5)
    if "swin" in name:
        shapes = [tuple(y.shape[2:]) for y in model.forward_intermediates(x, intermediates_only=True)]
        sides = [[-(-s // r) for s in size] for r in (4, 8, 16, 32)]
        assert shapes == [tuple(s) for s in sides]


HOST_MODELS = {
    "agent_pvt_tiny": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), agent_num=4),
    "inline_pvt_tiny": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "agent_cswin_tiny": dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), agent_num=4),
    "inline_cswin_tiny": dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2)),
    "agent_swin_tiny": dict(embed_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 2), agent_num=4),
    "agent_deit_tiny": dict(embed_dim=16, depth=2, num_heads=2, agent_num=4, patch_size=8),
}


@pytest.mark.parametrize("name", sorted(HOST_MODELS))
@torch.no_grad()
def test_hosts_at_any_size(name):
    torch.manual_seed(0)
    home, away = (256, (320, 288)) if "cswin" in name else (64, (128, 96))
    model = timm.create_model(name, num_classes=5, img_size=home, **HOST_MODELS[name]).eval()
    for size in ((home, home), away, (75, 110)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(1, 3, home, home)
    expected = model(x)
    model.set_input_size(img_size=home)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(model(x), expected)
    model.set_input_size(img_size=away)
    other = timm.create_model(name, num_classes=5, img_size=away, **HOST_MODELS[name]).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, *away)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", ["test_agent_swin", "agent_cswin_tiny"])
@torch.no_grad()
def test_dense_behaviour_at_another_size(name):
    """A classifier at a size that it was not made for is the dense backbone, up to the agents' number."""
    settings = dict(HOST_MODELS.get(name, {}), img_size=224)
    torch.manual_seed(0)
    model = timm.create_model(name, **settings).eval()
    x = torch.randn(1, 3, 64, 112)
    out = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in out] == [(16, 28), (8, 14), (4, 7), (2, 4)]
    if name == "test_agent_swin":
        dense = timm.create_model(name, **settings, agent_shapes=(3, 3, 2, 2)).eval()
        keys = dense.load_state_dict(model.state_dict(), strict=False)
        assert not keys.missing_keys and not keys.unexpected_keys
        for a, b in zip(out, dense.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(a, b)


@torch.no_grad()
def test_stripes_that_cover_the_map(tmp_path):
    """At 112 px CSWin's third stage has one branch over the whole map, where the file for 224 px has two of half."""
    settings = dict(HOST_MODELS["agent_cswin_tiny"], num_heads=(2, 2, 4, 4))
    source = timm.create_model("agent_cswin_tiny", **settings)
    assert len(source.stage3[0].attns) == 2
    torch.save(source.state_dict(), tmp_path / "file.pth")
    overlay = dict(file=str(tmp_path / "file.pth"))
    small = timm.create_model("agent_cswin_tiny", True, pretrained_cfg_overlay=overlay, img_size=112, **settings)
    assert len(small.stage3[0].attns) == 1
    source.set_input_size(img_size=112)
    x = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(small.eval()(x), source.eval()(x))


def test_windows_follow_the_size():
    model = timm.create_model("agent_swin_base", device="meta", img_size=384)
    soft = [m.window_size for m in model.modules() if isinstance(m, WindowAttention)]
    assert set(soft) == {(12, 12)} and len(soft) == 18
    assert [b.shift_at_home[0] for b in model.layers[2].blocks] == [0, 0] + [0, 6] * 8
    assert [b.shift_at_home[0] for b in model.layers[3].blocks] == [0, 0]
    assert {m.grid for m in model.modules() if isinstance(m, AgentAttention)} == {(96, 96), (48, 48), (24, 24)}
    assert sum(p.numel() for p in model.parameters()) == 88305016  # agent_swin_base_384
    cswin = timm.create_model("agent_cswin_base", device="meta", img_size=384)
    assert sum(p.numel() for p in cswin.parameters()) == 73328416  # agent_cswin_base_384
    assert {a.split_size for b in cswin.stage3 for a in b.attns} == {(12, 12)}


@pytest.mark.parametrize("name", SMALL)
def test_gradient_checkpointing_and_channels_last(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    x = torch.randn(2, 3, 64, 64)
    model(x).mean().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)).mean().backward()
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_export(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, *model.pretrained_cfg["input_size"][1:])
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_head_of_another_size(tmp_path):
    _, state, _ = load("agent_swin_tiny")
    state["head.weight"], state["head.bias"] = torch.zeros(7, 768), torch.zeros(7)
    torch.save({"model_ema": state, "model": {}}, tmp_path / "file.pth")
    overlay = dict(file=str(tmp_path / "file.pth"), num_classes=7)
    model = timm.create_model("agent_swin_tiny", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert model.head.out_features == 3
    assert torch.equal(model.norm.weight, state["norm.weight"])


@pytest.mark.parametrize("name", ["test_agent_swin", "test_agent_deit"])
def test_another_number_of_agents(name, tmp_path):
    """The tables of another agent_num stay the model's own; everything else loads."""
    source = timm.create_model(name)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    overlay = dict(file=str(tmp_path / "file.pth"))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, agent_num=(16, 16, 16, 16))
    theirs = source.state_dict()
    for key, value in model.state_dict().items():
        if value.shape == theirs[key].shape:
            assert torch.equal(value, theirs[key]), key
        else:
            assert key.endswith("_bias") and "attn" in key


def test_arguments():
    assert numbers("9-16-49-49", "agent_num", 4) == [9, 16, 49, 49]
    assert numbers(["9", "16"], "agent_num", 4) == [9, 16, 16, 16]
    assert numbers("1111", "sr_ratios", 4) == [1, 1, 1, 1]
    assert numbers(49, "agent_num", 4) == [49] * 4
    assert mixes("AAMB2", (1, 1, 3, 1)) == [[True], [True], [True, True, False], [False]]
    with pytest.raises(ValueError, match="list of integers"):
        numbers("9-x", "agent_num", 4)
    with pytest.raises(ValueError, match="4 letters"):
        mixes("AAX", (1, 1, 1, 1))
    with pytest.raises(ValueError, match="leading blocks"):
        mixes("AAMB", (1, 1, 1, 1))
    with pytest.raises(ValueError, match="one \\(p, r\\)"):
        timm.create_model("test_agent_swin", agent_shapes=(3, 3))
    with pytest.raises(TypeError):
        timm.create_model("test_agent_swin", window=3)
    with pytest.raises(ValueError, match="at least 32"):
        timm.create_model("agent_pvt_tiny", img_size=16)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_compiles_as_one_graph(name, training):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = timm.create_model(name).train(training)
    x = torch.randn(1, 3, 48, 64)  # not the built size: tables are resized inside the graph
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    if training:
        compiled(x).mean().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_classifiers_on_a_gpu(name, tmp_path):
    """The kernels' path, in float32 without TF32, against the same fixtures."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    manifest, state, expected = load(name)
    model = created(name, state, tmp_path).cuda()
    x = torch.from_numpy(fx.inputs(manifest)["x"]).cuda()
    assert relative_error(model(x), expected["logits"]) < 2 * TOLERANCE
    with torch.autocast("cuda", torch.bfloat16):
        assert relative_error(model(x).float(), expected["logits"]) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, "inline_cswin_tiny", "agent_pvt_tiny"])
@torch.no_grad()
def test_compiled_on_a_gpu(name):
    """Compiled inference has kernels of its own."""
    model = timm.create_model(name, device="cuda").eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"], device="cuda")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, "inline_cswin_tiny", "inline_pvt_tiny"])
def test_gradients_on_a_gpu(name):
    """Against the CPU's, which has other kernels; and the compiled step against the eager one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.0, **HOST_MODELS.get(name, {}), img_size=64)
    x, weights = torch.randn(2, 3, 64, 64), torch.randn(2, 1000)
    (model(x) * weights).sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    model, x, weights = model.cuda(), x.cuda(), weights.cuda()
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        (run(x) * weights).sum().backward()
        for k, p in model.named_parameters():  # the last block's mixing of patches reaches no class token: zeros
            error = (p.grad.cpu() - expected[k]).norm()
            assert error <= 1e-3 * expected[k].norm(), k
