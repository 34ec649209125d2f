"""The MALA layer: what the released modules compute, its two types, prefix tokens, hosts."""

import pytest
import timm
import torch

import visionattn
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers import MALA

TYPES = {"mala_attn": "linear", "mala_attn_rect": "linear", "mala_softmax_attn": "softmax"}


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("name", sorted(TYPES))
def test_fixture(name, as_tokens):
    manifest, expected = fx.load(FIXTURES / "mala" / name)
    module = visionattn.create_module("mala", attn_type=TYPES[name], **manifest["config"]["args"]).eval()
    state = {k.removeprefix("attn."): torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    module.load_state_dict(state)
    assert sum(p.numel() for p in module.parameters()) == manifest["num_params"]
    seen = {}
    module.proj.register_forward_hook(lambda m, args, out: seen.update(pre_proj=args[0]))
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    grid = tuple(x.shape[2:])
    out = module(x.flatten(2).transpose(1, 2), grid).transpose(1, 2).unflatten(2, grid) if as_tokens else module(x)
    assert relative_error(out, expected["out"]) < 1e-6
    assert relative_error(seen["pre_proj"].transpose(1, 2).unflatten(2, grid), expected["pre_proj"]) < 1e-6


def test_fixtures_are_all_used():
    tests = ("layers/test_mala_layer.py", "models/test_mala.py", "ops/test_linear.py")
    source = "".join((FIXTURES.parent / test).read_text() for test in tests)
    names = [path.stem for path in (FIXTURES / "mala").glob("*.npz")]
    assert names and all(name in source for name in names)


def test_prefix_tokens():
    """They are attended to and attend, with no local term and no rotation: a patch's output depends on them."""
    torch.manual_seed(0)
    module = MALA(16, 2, num_prefix_tokens=2, grid=(3, 4))
    x = torch.randn(1, 14, 16)
    y = x.clone()
    y[:, 0] += 1
    assert not torch.allclose(module(x)[:, 5], module(y)[:, 5])
    z = x.clone()
    z[:, 2:] = x[:, 2:].flip(1)  # other positions of the same patches change them ...
    assert not torch.allclose(module(x)[:, 2:], module(z)[:, 2:].flip(1))
    with torch.no_grad():  # ... but, without local terms and rotation, nothing
        module.lepe.weight.zero_()
        module.rope.lines[0].zero_()
        module.rope.lines[1].fill_(1.0)
    torch.testing.assert_close(module(x)[:, 2:], module(z)[:, 2:].flip(1))


def test_in_timms_vision_transformer():
    attn = MALA.configured(grid=(4, 4), num_prefix_tokens=1)
    model = timm.create_model("test_vit", attn_layer=attn, img_size=64)
    model(torch.randn(1, 3, 64, 64)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tables_beyond_the_stored_lines():
    """Maps larger than what is stored get tables of the same formula; casts and to_empty leave them right."""
    torch.manual_seed(0)
    module = MALA(8, 1)
    sin, cos = module.rope((300, 2), 0, torch.float32)
    short_sin, short_cos = module.rope((200, 2), 0, torch.float32)
    torch.testing.assert_close(sin[:400], short_sin)
    torch.testing.assert_close(cos[:400], short_cos)
    module.to_empty(device="cpu")
    module.rope.lines.fill_(float("nan"))
    module.rope.init_non_persistent_buffers()
    torch.testing.assert_close(module.rope((300, 2), 0, torch.float32)[0], sin)


@pytest.mark.parametrize("how", ["script", "compile"])
@pytest.mark.parametrize("attn_type", ["linear", "softmax"])
def test_programs(attn_type, how):
    torch.manual_seed(0)
    module = MALA(16, 2, attn_type).eval()
    if how == "script":
        program = torch.jit.script(module)
    else:
        program = torch.compile(module, fullgraph=True, backend="aot_eager")
    for grid in ((3, 5), (4, 4)):
        x = torch.randn(2, grid[0] * grid[1], 16)
        torch.testing.assert_close(program(x, grid), module(x, grid))


def test_autocast_and_casts():
    torch.manual_seed(0)
    module = MALA(32, 2, grid=(6, 6))
    x = torch.randn(2, 36, 32)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16 and relative_error(low.float(), exact.detach().numpy()) < 0.05
    module.to(torch.bfloat16)
    assert module(x.bfloat16()).dtype == torch.bfloat16


def test_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        MALA(12, 2)
    with pytest.raises(ValueError, match="does not divide"):
        MALA(12, 5)
    with pytest.raises(ValueError, match="attn_type='cosine' is unknown"):
        MALA(12, 1, attn_type="cosine")
    with pytest.raises(ValueError, match="switch them off"):
        MALA(12, 1, qk_norm=True)
    with pytest.raises(AssertionError, match="pass their grid"):
        MALA(16, 1, grid=(3, 3))(torch.randn(1, 8, 16))
