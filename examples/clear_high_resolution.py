"""CLEAR's distilled FLUX.1, and its recipe for high resolutions (arXiv 2412.16112, section 4.3).

    python examples/clear_high_resolution.py clear_local_16.safetensors "a lighthouse at dusk" --size 4096
    python examples/clear_high_resolution.py --tiny            # random weights, on a CPU in seconds

The authors publish the weights (they derive from FLUX.1-dev: non-commercial). A pass at 1024 px, upscaled, then image
to image at the full size with the rotary base scaled.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from visionattn.diffusion import load_clear, upscale_generate


def tiny(folder: Path):
    """A pipeline with random weights, and a file in the layout of CLEAR's."""
    from safetensors.torch import save_file

    from visionattn.diffusion.tiny import tiny_flux

    pipe = tiny_flux()
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    named = pipe.transformer.named_parameters()
    state = {name: 1.1 * p.detach() for name, p in named if any(f".attn.{part}." in name for part in parts)}
    save_file(state, folder / "clear_local_2.safetensors")
    return pipe, folder / "clear_local_2.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", help="clear_local_{8,16,32}[_down_4].safetensors")
    parser.add_argument("prompt", nargs="?", default="a lighthouse on a cliff at dusk")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="name or folder of a FLUX.1 pipeline")
    parser.add_argument("--size", type=int, default=4096, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("clear.png"))
    parser.add_argument("--tiny", action="store_true", help="a tiny pipeline, 256 px from 128 px")
    args = parser.parse_args()
    if not args.tiny and args.weights is None:
        parser.error("give the path of CLEAR's weights, or --tiny")

    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            pipe, weights = tiny(Path(folder))
            sizes = dict(height=256, width=256, base_height=128, base_width=128, num_inference_steps=4)
        else:
            from diffusers import FluxPipeline

            pipe, weights = FluxPipeline.from_pretrained(args.model, dtype=torch.bfloat16), args.weights
            pipe.to("cuda")
            sizes = dict(height=args.size, width=args.size)
        with load_clear(pipe, weights, proportional=True) as handle:
            seed = torch.Generator("cpu").manual_seed(args.seed)
            (image,) = upscale_generate(pipe, args.prompt, generator=seed, **sizes).images
            print(handle.report())
    # here the pipeline has its own weights and dense attention again
    image.save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
