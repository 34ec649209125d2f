"""The registry of modules: names, kinds, errors."""

import pytest
import torch

import visionattn
from visionattn.layers.registry import register_module


def test_names_and_kinds():
    assert {"ela_t", "ela_b", "ela_s", "ela_l", "ulsam"} <= set(visionattn.list_modules("channel"))
    assert {"halo", "nin"} <= set(visionattn.list_modules("mixer"))
    assert set(visionattn.list_modules()) == set(visionattn.list_modules("channel") + visionattn.list_modules("mixer"))


@pytest.mark.parametrize("name", visionattn.list_modules("channel"))
@pytest.mark.parametrize("shape", [(2, 64, 7, 11), (1, 128, 1, 5), (1, 64, 16, 16)])
def test_channel_modules_keep_their_map(name, shape):
    module = visionattn.create_module(name, channels=shape[1])
    x = torch.randn(shape, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape and not torch.equal(out, x)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("name", visionattn.list_modules("channel"))
def test_modules_take_device_and_dtype(name):
    module = visionattn.create_module(name, channels=64, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in module.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: visionattn.create_module("ela_x", channels=64), "did you mean 'ela_"),
        (lambda: visionattn.create_module("zzz"), "registered are"),
        (lambda: visionattn.list_modules("conv"), "use one of channel, mixer"),
        (lambda: visionattn.create_module("ela_t", channels=144), "got 144: use version b, s, l"),
        (lambda: visionattn.create_module("ela_b", channels=0), "got 0"),
        (lambda: visionattn.create_module("ela_b", channels=64, version="q"), "use one of t, b, s, l"),
        (lambda: visionattn.create_module("ela_b", channels=64, kernel_size=4), "not odd and positive"),
        (
            lambda: visionattn.create_module("ela_b", channels=64, gn_groups=10),
            "got 64: choose gn_groups that divide it",
        ),
        (lambda: visionattn.create_module("halo", dim=64, dim_out=32, num_prefix_tokens=1), "use dim_out=64"),
        (lambda: visionattn.create_module("ela_b", channels=64, kernel_size=0), "kernel_size=0 is not odd"),
        (lambda: visionattn.create_module("ela_b", channels=64, gn_groups=-4), "gn_groups=-4 is not positive"),
        (lambda: visionattn.create_module("ela_b", channels=64, conv_groups=0), "conv_groups=0 does not divide"),
        (lambda: visionattn.create_module("ulsam", channels=64, num_splits=0), "groups=0 does not divide channels=64"),
        (lambda: visionattn.create_module("ela_b", channels=64, conv_groups=7), "choose a divisor"),
        (lambda: visionattn.create_module("ulsam", channels=64, groups=5), "groups=5 does not divide channels=64"),
        (lambda: visionattn.create_module("ulsam", channels=64, form="both"), "'released' or 'printed'"),
        (lambda: visionattn.create_module("ulsam"), "give the number of channels"),
        (lambda: visionattn.create_module("ulsam", nin=64, nout=32), "keeps its channels"),
        (lambda: visionattn.create_module("halo", dim=64, num_heads=7), "num_heads=7 does not divide"),
        (lambda: visionattn.create_module("halo", dim=64, stride=3), "use 1 or 2"),
        (lambda: visionattn.create_module("halo", dim=32, num_heads=16, qk_ratio=0.1), "dim_head=0: use 1 channel"),
        (lambda: visionattn.create_module("halo", dim=64, border="reflect"), "use 'zero' or 'mask'"),
        (lambda: visionattn.create_module("halo", dim=64)(torch.randn(1, 16, 64)), "pass grid="),
        (lambda: visionattn.create_module("halo", dim=64)(torch.randn(1, 16, 64), (3, 5)), "16 tokens are not a 3 x 5"),
        (lambda: visionattn.create_module("nin", d_model=8, d_ffn=8, seq_len=6)(torch.randn(1, 6, 8), (2, 2)), "2, 2"),
        (lambda: visionattn.create_module("nin", d_model=8), "needs d_model, d_ffn and seq_len"),
        (lambda: register_module("ela_b", "channel"), "registered already"),
        (lambda: register_module("new", "pixel"), "use one of channel, mixer"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError):
        visionattn.create_module("ela_b", channels=64, chanels=3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224"])
def test_halo_is_an_attn_layer_of_timm(name):
    """timm hands an ``attn_layer`` no grid: the class is configured with it, and with the class token in front."""
    import timm

    from visionattn.layers import HaloAttention

    attn = HaloAttention.configured(grid=(4, 6), num_prefix_tokens=1, block_size=4, halo_size=1)
    model = timm.create_model(name, img_size=(64, 96), depth=2, attn_layer=attn)
    assert isinstance(model.blocks[0].attn, HaloAttention) and model.blocks[0].attn.block_size == 4
    out = model(torch.randn(2, 3, 64, 96))
    out.sum().backward()
    assert out.shape == (2, 1000) and model.blocks[0].attn.q.weight.grad is not None
