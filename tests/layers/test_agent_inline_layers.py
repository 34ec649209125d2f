"""Agent and InLine layers and the hosts' blocks: what the authors' modules compute, caches, errors."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import visionattn
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers import AgentAttention, InLineAttention, window
from visionattn.layers.agent import resize_lines
from visionattn.layers.cast import GroupedLinear, Linear, PatchConv2d
from visionattn.layers.window import StripeAttention, WindowAttention
from visionattn.models.cswin import CSWinBlock
from visionattn.models.swin import SwinBlock

TOLERANCE = 1e-6
MIXERS = sorted(p.stem for s in ("agent", "inline") for p in (FIXTURES / s).glob(f"{s}_attn_*.json"))
STRIPES = sorted(p.stem for p in (FIXTURES / "agent").glob("agent_lepe_*.json"))
BLOCKS = [
    "agent_swin_block",
    "agent_softmax_swin_block",
    "inline_swin_block",
    "agent_cswin_block",
    "inline_cswin_block",
]


def load(name: str):
    manifest, expected = fx.load(FIXTURES / name.partition("_")[0] / name)
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    inputs = {k: torch.from_numpy(v) for k, v in fx.inputs(manifest).items()}
    return manifest, state, inputs, expected


def filled(module: torch.nn.Module, manifest: dict, state: dict) -> torch.nn.Module:
    module.load_state_dict(state)
    assert sum(p.numel() for p in module.parameters()) == manifest["num_params"]
    return module.eval()


@pytest.mark.parametrize("name", MIXERS)
def test_mixers(name):
    manifest, state, inputs, expected = load(name)
    module = filled(visionattn.create_module(name.partition("_")[0], **manifest["config"]["args"]), manifest, state)
    grid = (10, 14) if name == "inline_attn_pvt" else (14, 14)
    kept = {}
    if module.proj is not None:
        module.proj.register_forward_pre_hook(lambda _, args: kept.update(pre_proj=args[0]))
    assert relative_error(module(inputs.pop("x"), grid, **inputs), expected["out"]) < TOLERANCE
    if "pre_proj" in expected:
        assert relative_error(kept["pre_proj"], expected["pre_proj"]) < TOLERANCE
    if "x_mean" in inputs:
        kernels = module.local_kernels(inputs["x_mean"])
        assert relative_error(kernels.reshape(kernels.shape[0], -1, 1), expected["dynamic_kernel"]) < TOLERANCE


@pytest.mark.parametrize("name", STRIPES)
def test_stripes(name):
    manifest, state, inputs, expected = load(name)
    module = filled(StripeAttention(**manifest["config"]["args"]), manifest, state)
    assert relative_error(module(inputs["x"], (14, 14)), expected["out"]) < TOLERANCE


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    manifest, state, inputs, expected = load(name)
    args = manifest["config"]["args"]
    dim, heads = args["dim"], args["num_heads"]
    if name == "agent_cswin_block":
        place = dict(resolution=14, split_size=7, agent_num=9)
        block = CSWinBlock(dim, [AgentAttention(dim // 2, heads // 2, idx=i, **place) for i in range(2)])
    elif name == "inline_cswin_block":
        block = CSWinBlock(dim, [InLineAttention(dim, heads, resolution=14, split_size=14)])
    else:
        window = min(args["window_size"], 14)
        attn = {
            "agent_swin_block": lambda: AgentAttention(dim, heads, agent_num=16, window_size=window),
            "agent_softmax_swin_block": lambda: WindowAttention(dim, heads, window),
            "inline_swin_block": lambda: InLineAttention(dim, heads, window_size=window),
        }[name]()
        shifts = args["shift_size"] > 0
        block = SwinBlock(dim, attn, (14, 14), (window, window), shifts, isinstance(attn, WindowAttention))
    block = filled(block, manifest, state)
    x = inputs["x"]
    assert relative_error(block(x.reshape(-1, 14, 14, dim)).reshape(x.shape), expected["out"]) < TOLERANCE


def test_every_fixture_is_used():
    from tests.models.test_hosts import CLASSIFIERS, DENSE, RESIZED

    used = {*MIXERS, *STRIPES, *BLOCKS, *CLASSIFIERS, *DENSE, *RESIZED}
    present = {p.stem for s in ("agent", "inline") for p in (FIXTURES / s).glob("*.npz")}
    assert present == used


def test_padding_is_not_attended_to():
    """A map that the stripes don't tile: the stripe that holds a rest attends to the rest alone."""
    torch.manual_seed(0)
    module = StripeAttention(8, 2, resolution=(4, 6), idx=0, split_size=4)
    x = torch.randn(3, 2, 24, 8)
    out = module(x, (4, 6)).reshape(2, 4, 6, 8)
    rest = x.reshape(3, 2, 4, 6, 8)[:, :, :, 4:].reshape(3, 2, 8, 8)
    alone = StripeAttention(8, 2, resolution=(4, 2), idx=-1)
    alone.load_state_dict(module.state_dict())
    torch.testing.assert_close(out[:, :, 4:].reshape(2, 8, 8), alone(rest, (4, 2)))


@pytest.fixture
def agent():
    torch.manual_seed(0)
    return AgentAttention(16, 2, agent_num=4, window_size=(3, 5), num_prefix_tokens=1).eval()


@torch.no_grad()
def test_eval_cache_is_used_and_follows_the_weights(agent):
    x = torch.randn(1, 16, 16)
    first = agent(x, (3, 5))
    assert len(agent._entries) == 1
    calls = []
    original = agent.biases
    agent.biases = lambda grid: calls.append(grid) or original(grid)
    assert torch.equal(agent(x, (3, 5)), first) and not calls

    agent.na_bias.add_(torch.randn_like(agent.na_bias))  # in place
    changed = agent(x, (3, 5))
    assert len(calls) == 1 and not torch.equal(changed, first)
    for tensor in agent.state_dict().values():  # as an average of weights does
        tensor.mul_(0.5)
    assert not torch.equal(agent(x, (3, 5)), changed) and len(calls) == 2
    state = {k: torch.randn_like(v) for k, v in agent.state_dict().items()}
    for assign in (False, True):
        agent.load_state_dict(state, assign=assign)
        fresh = AgentAttention(16, 2, agent_num=4, window_size=(3, 5), num_prefix_tokens=1).eval()
        fresh.load_state_dict(state)
        assert torch.equal(agent(x, (3, 5)), fresh(x, (3, 5)))
    agent.train()
    assert not agent._entries
    agent(x, (3, 5))
    assert not agent._entries


def test_eval_cache_gives_gradients_and_stays_out_of_copies(agent):
    x = torch.randn(1, 16, 16)
    with torch.inference_mode():
        agent(x, (3, 5))
    agent(x, (3, 5)).sum().backward()
    assert all(p.grad is not None for p in agent.parameters())
    with torch.no_grad():
        agent(x, (3, 5))
    names = set(agent.state_dict())
    assert not any("entries" in name for name in names)
    twin = copy.deepcopy(agent)
    assert not twin._entries and agent._entries
    buffer = io.BytesIO()
    torch.save(agent, buffer)
    assert buffer.tell() < 60_000
    for p in agent.parameters():  # frozen tables, gradients of the input
        p.requires_grad_(False)
    x.requires_grad_()
    agent(x, (3, 5)).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_dtype_after_a_forward(agent):
    x = torch.randn(1, 16, 16)
    agent(x, (3, 5))
    assert agent.double()(x.double(), (3, 5)).dtype == torch.float64
    assert agent.bfloat16()(x.bfloat16(), (3, 5)).dtype == torch.bfloat16


@torch.no_grad()
def test_any_grid_and_more_agents(agent):
    for grid in ((3, 5), (7, 7), (2, 9)):
        x = torch.randn(2, 1 + grid[0] * grid[1], 16)
        assert agent(x, grid).shape == x.shape
    dense = AgentAttention(16, 2, agent_num=4, window_size=(3, 5), num_prefix_tokens=1, agent_shape=(3, 4)).eval()
    dense.load_state_dict(agent.state_dict())
    keys, queries = dense.biases((6, 5))
    assert keys.shape == (2, 12, 31) and queries.shape == (2, 31, 12)


def test_resize_lines_is_linear():
    table = torch.arange(4.0).reshape(1, 1, 1, 4, 1)
    resized = resize_lines("ah_bias", table, 8).flatten()
    torch.testing.assert_close(resized, torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))
    assert resize_lines("ah_bias", table, 4) is table


@pytest.mark.parametrize("cls", [AgentAttention, InLineAttention])
def test_in_timms_vision_transformer(cls):
    attn = cls.configured(grid=(4, 4), num_prefix_tokens=1)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, attn_layer=attn)
    vit(torch.randn(2, 3, 32, 32)).mean().backward()
    assert all(p.grad is not None for p in vit.parameters())


@pytest.mark.parametrize(
    "cls, settings, message",
    [
        (AgentAttention, dict(dim=16, num_heads=3), "does not divide"),
        (AgentAttention, dict(dim=16, num_heads=2, agent_num=10), "not a square number"),
        (AgentAttention, dict(dim=16, num_heads=2, num_prefix_tokens=2), "0 or 1"),
        (InLineAttention, dict(dim=16, num_heads=3), "does not divide"),
        (InLineAttention, dict(dim=16, num_heads=2, sr_ratio=2), "use 1"),
        (InLineAttention, dict(dim=16, num_heads=2, kernel_func="elu"), "unknown"),
        (InLineAttention, dict(dim=16, num_heads=2, resolution=14, idx=0, split_size=7), "whole map"),
    ],
)
def test_bad_settings(cls, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        cls(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [AgentAttention, InLineAttention])
def test_tokens_that_are_not_the_grid(cls):
    with pytest.raises(AssertionError, match="pass their grid"):
        cls(16, 2)(torch.randn(1, 10, 16), (3, 3))


def test_stripes_leave_cudnn_out_where_a_gradient_is_wanted(monkeypatch):
    allowed = []
    attend = F.scaled_dot_product_attention

    def record(*args, **kwargs):
        allowed.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(window, "NO_CUDNN_GRADIENT", ("cpu",))
    module = StripeAttention(8, 2, resolution=(4, 4), idx=0, split_size=2)
    x = torch.randn(3, 2, 16, 8)
    before = (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
    module(x, (4, 4))
    module(x.requires_grad_(), (4, 4)).sum().backward()
    torch.backends.cuda.enable_flash_sdp(False)  # a caller's choice, which stays
    try:
        module(x, (4, 4))
    finally:
        torch.backends.cuda.enable_flash_sdp(before[1])
    assert allowed == [before, (False, before[1]), (False, False)]
    assert (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_stripes_without_cudnn_compile_whole(monkeypatch):
    monkeypatch.setattr(window, "NO_CUDNN_GRADIENT", ("cpu",))
    module = StripeAttention(8, 2, resolution=(4, 4), idx=0, split_size=2)
    x = torch.randn(3, 2, 16, 8, requires_grad=True)
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(x, (4, 4))
    torch.testing.assert_close(out, module(x, (4, 4)))
    out.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    torch.testing.assert_close(torch.jit.script(module)(x, (4, 4)), out)


def test_grouped_linear_is_the_grouped_convolution():
    torch.manual_seed(0)
    ours, conv = GroupedLinear(12, 36, 3), nn.Conv1d(12, 36, 1, groups=3)
    conv.load_state_dict(ours.state_dict())
    x, y = (t.requires_grad_() for t in torch.randn(1, 5, 12, 1).repeat(2, 1, 1, 1).unbind(0))
    out, expected = ours(x), conv(y)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, conv.weight.grad)
    torch.testing.assert_close(ours.bias.grad, conv.bias.grad)
    assert ours(x[:0]).shape == (0, 36, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = ours.eval()(x)
        assert low.dtype == torch.bfloat16 and ours._kept is not None
        torch.testing.assert_close(low.float(), expected.detach(), atol=2e-2, rtol=2e-2)


def test_patches_as_a_product():
    layer = PatchConv2d(3, 8, (4, 2), stride=(4, 2)).eval()
    x = torch.randn(2, 3, 13, 7)  # a rest on both sides
    expected = F.conv2d(x, layer.weight, layer.bias, stride=(4, 2))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=2e-2, atol=2e-2)


def test_no_copy_is_kept_of_what_is_trained():
    """A trained bias over a frozen weight, in eval mode, has its gradient, also after a copy was kept."""
    layer = Linear(8, 8).eval()
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            layer(x)
        assert layer._kept is not None
        layer(x).float().sum().backward()
    assert layer.bias.grad is not None and (layer.bias.grad == 4).all()


def test_kept_weights_follow_their_parameters():
    layer, x = Linear(4, 4).eval(), torch.randn(2, 4)
    changes = [
        lambda: layer.weight.add_(1),
        lambda: layer.bias.add_(1),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(4, 4))),
        lambda: setattr(layer, "bias", None),
        lambda: layer.load_state_dict({"weight": torch.randn(4, 4)}),
        lambda: setattr(layer.weight, "data", torch.randn(4, 4)),
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for change in changes:
            layer(x)
            assert layer.cast()[0] is layer.cast()[0]
            change()
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.float16):
            assert layer.cast()[0].dtype == torch.float16
        with torch.enable_grad():
            assert layer.cast()[0] is layer.weight
    assert layer.cast()[0] is layer.weight
