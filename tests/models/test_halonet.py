"""HaloNet where no fixture looks: odd blocks on odd maps."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn


def test_pooling_of_odd_maps():
    """Averages of whole 2 x 2 squares as in timm's layer; what is left at the border is averaged over what there is."""
    torch.manual_seed(0)
    layer = visionattn.create_module("halo", dim=16, num_heads=2, stride=2, block_size=5, halo_size=1).double()
    full = visionattn.create_module("halo", dim=16, num_heads=2, block_size=5, halo_size=1).double()
    full.load_state_dict(layer.state_dict())
    x = torch.randn(1, 16, 7, 8, dtype=torch.float64)
    out, attended = layer(x), full(x)
    assert out.shape == (1, 16, 4, 4)
    torch.testing.assert_close(out[:, :, :3], F.avg_pool2d(attended, 2, 2))
    torch.testing.assert_close(out[:, :, 3:], F.avg_pool2d(attended[:, :, 6:], (1, 2), (1, 2)))


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_odd_blocks_take_any_size(border):
    model = timm.create_model("test_halo", block_size=5, border=border, num_classes=3).eval()
    out = model(torch.randn(1, 3, 101, 67))
    assert out.shape == (1, 3) and torch.isfinite(out).all()
