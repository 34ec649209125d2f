"""Sparse attention in a transformer that this library has no adapter for: one's own, in twenty lines.

    python examples/custom_adapter.py                          # on a CPU, in seconds

The model is diffusers' BriaTransformer2DModel, tiny and with random weights: text first, then the image, whose grid
stands in the position ids of the call. Its attention goes through diffusers' dispatcher; for processors that do not, a
Site takes a processor of one's own (visionattn/diffusion/processors.py has three).
"""

import argparse

import torch
from diffusers import BriaTransformer2DModel

import visionattn
from visionattn.diffusion import Adapter, Layout, Site, register_adapter
from visionattn.diffusion.layout import grid_of_ids
from visionattn.diffusion.tiny import randomise


@register_adapter
class Bria(Adapter):
    models = ("BriaTransformer2DModel",)

    def sites(self, transformer):
        found = []
        for name in ("transformer_blocks", "single_transformer_blocks"):
            found += [Site(f"{name}.{i}.attn", block.attn) for i, block in enumerate(getattr(transformer, name))]
        return found

    def layout(self, transformer, call, cache):
        ids = call["img_ids"]  # (tokens, 3): unused, row, column
        grid = cache(ids, lambda ids: grid_of_ids(ids, rows=1, cols=2))  # read once: a GPU would wait for it
        return Layout(grid, text=call["encoder_hidden_states"].shape[1], text_first=True), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=2, default=(12, 10), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--tiny", action="store_true", help="it always is; every example has this option")
    rows, columns = parser.parse_args().grid

    model = randomise(
        BriaTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=[4, 6, 6],
        )
    )  # fmt: skip
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    torch.manual_seed(0)
    call = dict(
        hidden_states=torch.randn(1, rows * columns, 4), encoder_hidden_states=torch.randn(1, 8, 12),
        timestep=torch.tensor([500.0]), img_ids=ids.flatten(0, 1), txt_ids=torch.zeros(8, 3), return_dict=False,
    )  # fmt: skip
    with torch.no_grad():
        (dense,) = model(**call)
        with visionattn.sparsify(model, visionattn.Disk(3)) as handle:
            (sparse,) = model(**call)
            print(handle.report())
        (again,) = model(**call)
    print(f"largest difference of sparse and dense: {(sparse - dense).abs().max():.3f} of {dense.abs().max():.3f}")
    print(f"after removal equal to the bit: {torch.equal(again, dense)}")


if __name__ == "__main__":
    main()
