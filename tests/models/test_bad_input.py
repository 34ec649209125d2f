"""Wrong names, options, sizes and counts: one line that says what was given, what is allowed, what to do.

Files of weights: test_loading.py. Modules and insert(): tests/layers.
"""

import pytest
import timm
import torch

import visionattn

BUILD = {
    # a published row that can't be built: 144 channels under 32 norm groups
    "groups": ("ela_b_mobilenetv2", dict(version="t"), ["144", "32", "use version b, s, l"]),
    "version": ("ela_b_resnet18", dict(version="x"), ["'x'"]),
    "position": ("ela_b_resnet18", dict(position="here"), ["'here'", "conv, block, stage"]),
    "border": ("halo_h0", dict(border="none"), ["'none'", "'zero' or 'mask'"]),
    "block size": ("halo_h0", dict(block_size=0), ["block_size=0", ">= 1"]),
    "halo size": ("halo_h0", dict(halo_size=-1), ["halo_size=-1", ">= 0"]),
    "heads": ("halo_h0", dict(head_dim=24), ["head_dim=24", "choose"]),
    "head width": ("halo_h0", dict(head_dim=0), ["head_dim=0", "a channel"]),
    "no output": ("halo_h0", dict(rb=0), ["rb=0", "a channel"]),
    "empty stage": ("halo_h0", dict(depths=(3, 0, 7, 3)), ["(3, 0, 7, 3)", "needs a block"]),
    "one stage": ("halo_h0", dict(conv_stages=2), ["conv_stages=2", "(2,)"]),
    "stages": ("halo_h0", dict(conv_stages=(5,)), ["(5,)", "1 to 4"]),
    "depths": ("halo_h0", dict(depths=(1, 2)), ["(1, 2)", "give one of each"]),
    "subspaces": ("ulsam_mobilenetv1_100", dict(groups=3), ["groups=3", "512", "choose a divisor"]),
    "no subspace": ("ulsam_mobilenetv1_100", dict(groups=0), ["groups=0", "choose a divisor"]),
    "layer": ("ulsam_mobilenetv1_100", dict(insert_after=(99,)), ["(99,)", "2 to 14"]),
    "layer twice": ("ulsam_mobilenetv1_100", dict(insert_after=(9,), replace=(9,)), ["(9,)", "each in one of the two"]),
    "strided layer": ("ulsam_mobilenetv1_100", dict(replace=(3,)), ["layer 3", "insert after it instead"]),
    "one layer": ("ulsam_mobilenetv2_100", dict(insert_after=17), ["insert_after=17", "(17,)"]),
    "form": ("ulsam_mobilenetv1_100", dict(form="x"), ["'x'", "'released' or 'printed'"]),
    "image size": ("ninformer_patch4_32", dict(img_size=33), ["33", "multiple of patch_size"]),
    "no image": ("ninformer_patch4_32", dict(img_size=0), ["img_size=0", "multiple of patch_size"]),
    "depth": ("ninformer_patch4_32", dict(depth=0), ["depth=0", "1 block or more"]),
    "dropout": ("ninformer_patch4_32", dict(drop_rate=2), ["2", "between 0 and 1"]),
    "pooling": ("ninformer_patch4_32", dict(global_pool="x"), ["'x'", "'avg'"]),
    "feature maps": ("test_halo", dict(features_only=True, out_indices=(9,)), ["(9,)", "feature_info"]),
}


@pytest.mark.parametrize("name, kwargs, parts", BUILD.values(), ids=BUILD)
def test_build(name, kwargs, parts):
    with pytest.raises(ValueError) as error:
        timm.create_model(name, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "name", ["ela_b_resnet18", "ela_b_mobilenetv2", "ulsam_mobilenetv1_100", "halo_h0", "test_ninformer"]
)
def test_unknown_option(name):
    with pytest.raises(TypeError, match="block_sise") as error:
        timm.create_model(name, block_sise=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["halo_h9", "ela_t_mobilenetv2"])
def test_unknown_name(name):
    """timm's error; ``train.py`` and the command line name the nearest."""
    with pytest.raises(RuntimeError, match=name) as error:
        timm.create_model(name)
    assert "\n" not in str(error.value)


FORWARD = {
    "size": ("ninformer_patch4_32", (1, 3, 28, 28), ["32 x 32", "resize it, or build the model with its img_size"]),
    "one side": ("ninformer_patch4_32", (1, 3, 32, 36), ["32 x 32"]),
    "channels": ("ninformer_patch4_32", (1, 1, 32, 32), ["3 channels", "got 1"]),
    "channels of a map": ("test_halo", (1, 1, 32, 32), ["3 channels", "got 1"]),
    "channels of patches": ("test_inline_deit", (1, 4, 64, 64), ["3 channels", "got 4"]),
    "channels of a pyramid": ("test_agent_swin", (1, 1, 96, 96), ["3 channels", "got 1"]),
    "no batch": ("test_halo", (3, 32, 32), ["4D", "3D"]),
}


@pytest.mark.parametrize("name, shape, parts", FORWARD.values(), ids=FORWARD)
def test_forward(name, shape, parts):
    model = timm.create_model(name).eval()
    with pytest.raises((AssertionError, ValueError, RuntimeError)) as error:
        model(torch.zeros(shape))
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def test_nothing_is_half_changed():
    """A refused pooling leaves the head as it was."""
    model = timm.create_model("test_ninformer", num_classes=7)
    with pytest.raises(ValueError, match="'x' is unknown"):
        model.reset_classifier(3, "x")
    assert model.num_classes == 7
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    "name", ["test_agent_deit", "test_inline_swin", "agent_pvt_tiny", "agent_cswin_tiny", "test_mala"]
)
def test_refused_size_changes_nothing(name):
    model = timm.create_model(name, device="meta")
    known = {k: v for k, v in vars(model).items() if k in ("img_size", "grid", "grids")}
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    for size in (0, (64, -1)):
        with pytest.raises(ValueError, match=r"img_size=|positive image size"):
            model.set_input_size(img_size=size)
    assert {k: v for k, v in vars(model).items() if k in known} == known
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


def test_channel_module_on_tokens_is_an_error():
    with pytest.raises(ValueError, match="nothing in NiNformer matches at='conv'"):
        visionattn.insert(timm.create_model("test_ninformer"), "ela_b", at="conv")
