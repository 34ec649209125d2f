"""A FLUX.1 picture with sparse attention.

python examples/flux_sparse.py "a lighthouse at dusk" --size 4096 --pattern balanced
python examples/flux_sparse.py --tiny                      # random weights, on a CPU in seconds
"""

import argparse
import time
from pathlib import Path

import torch

import visionattn
from visionattn.cli.patterns import SYNTAX, parse_pattern


def load(args: argparse.Namespace):
    if args.tiny:
        from visionattn.diffusion.tiny import tiny_flux

        return tiny_flux()
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    pipe.vae.enable_tiling()
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a lighthouse on a cliff at dusk")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="name or folder of a FLUX.1 pipeline")
    parser.add_argument("--pattern", default="disk:16", help=f"{SYNTAX}; or quality, balanced, fast")
    parser.add_argument("--size", type=int, default=4096, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("flux.png"))
    parser.add_argument("--tiny", action="store_true", help="a tiny pipeline, 256 px, disk:2, 4 steps")
    args = parser.parse_args()
    if args.tiny:
        args.pattern, args.size, args.steps = "disk:2", 256, 4

    pipe = load(args)
    pattern = parse_pattern(args.pattern) if ":" in args.pattern else args.pattern
    with visionattn.sparsify(pipe, pattern, timing=True) as handle:
        start = time.perf_counter()
        (image,) = pipe(
            args.prompt, height=args.size, width=args.size, num_inference_steps=args.steps,
            generator=torch.Generator("cpu").manual_seed(args.seed),
        ).images  # fmt: skip
        print(f"{time.perf_counter() - start:.1f} s")
        print(handle.report())
    # here the pipeline is what it was
    image.save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
