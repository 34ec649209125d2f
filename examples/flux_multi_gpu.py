"""One FLUX.1 picture by several GPUs, with sparse attention (docs/parallel.md).

    torchrun --nproc-per-node 4 examples/flux_multi_gpu.py "a lighthouse at dusk" --size 4096
    torchrun --nproc-per-node 8 examples/flux_multi_gpu.py "a lighthouse at dusk" --size 8192 --ring 8
    torchrun --nproc-per-node 2 examples/flux_multi_gpu.py --tiny --ring 2

The last one needs no weights and no GPU: a tiny transformer with random weights, whose output over the processes is
compared with one process's.
"""

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxPipeline, FluxTransformer2DModel

import visionattn


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a lighthouse on a cliff at dusk")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="name or folder of a FLUX.1 pipeline")
    parser.add_argument("--size", type=int, default=4096, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--dense-steps", type=int, default=0, help="leading steps that stay dense")
    parser.add_argument("--radius", type=int, default=16, help="of the disk, in tokens of 16 pixels")
    parser.add_argument("--ring", type=int, default=1, help="bands of rows: processes that exchange halos")
    parser.add_argument("--ulysses", type=int, help="processes that share the heads; what --ring leaves by default")
    parser.add_argument("--output", type=Path, default=Path("flux.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="random weights, a few tokens, compared with one process")
    return parser.parse_args()


def degrees(args: argparse.Namespace, size: int) -> dict[str, int]:
    ulysses = args.ulysses or max(size // args.ring, 1)
    if size < 2 or ulysses * args.ring != size:
        sys.exit(
            f"--ulysses {ulysses} x --ring {args.ring} is not the number of processes, {size}: "
            "start two or more with torchrun --nproc-per-node N"
        )
    return dict(ulysses_degree=ulysses, ring_degree=args.ring)


def generate(args: argparse.Namespace, device: torch.device, parallel: dict[str, int], rank: int) -> None:
    pipe = FluxPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=rank != 0)
    pipe.vae.enable_tiling()
    pipe.transformer.set_attention_backend("_native_cudnn")  # of dense steps: PyTorch's default has no ring attention
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**parallel))
    with visionattn.sparsify(pipe, visionattn.Disk(args.radius), dense_steps=args.dense_steps) as handle:
        start = time.perf_counter()
        images = pipe(
            args.prompt, height=args.size, width=args.size, num_inference_steps=args.steps,
            generator=torch.Generator("cpu").manual_seed(args.seed),  # the same noise at every process
            output_type="pil" if rank == 0 else "latent",
        ).images  # fmt: skip
        if rank == 0:
            print(f"{time.perf_counter() - start:.1f} s", handle.report(), sep="\n")
            part = args.output.with_name(f".{args.output.name}.part")
            images[0].save(part, format=args.output.suffix.lstrip(".") or "png")
            part.replace(args.output)
            print(f"wrote {args.output}")


def compare(args: argparse.Namespace, device: torch.device, parallel: dict[str, int], rank: int) -> None:
    """A tiny transformer over the processes against the same one on its own."""
    torch.manual_seed(args.seed)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=8,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    rows = cols = 32
    ids = torch.zeros(rows, cols, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    call = dict(
        hidden_states=torch.randn(1, rows * cols, 16), encoder_hidden_states=torch.randn(1, 64, 32),
        pooled_projections=torch.randn(1, 16), timestep=torch.tensor([0.5]), img_ids=ids.flatten(0, 1),
        txt_ids=torch.zeros(64, 3), return_dict=False,
    )  # fmt: skip
    model, call = model.to(device), {k: v.to(device) if torch.is_tensor(v) else v for k, v in call.items()}
    with torch.no_grad(), visionattn.sparsify(model, visionattn.Disk(6)) as handle:
        (alone,) = model(**call)
        model.enable_parallelism(config=ContextParallelConfig(**parallel))
        (together,) = model(**call)
        if rank == 0:
            print(handle.report())
            print(f"largest difference to one process: {(together - alone).abs().max():.2e} of {alone.abs().max():.2e}")


def main() -> None:
    args = arguments()
    size = int(os.environ.get("WORLD_SIZE", 1))
    parallel = degrees(args, size)
    cuda = torch.cuda.is_available()
    if not cuda:
        if not args.tiny:
            sys.exit("no CUDA device here: --tiny runs on a CPU")
        torch.accelerator.device_count = lambda: 1  # diffusers 0.42 divides the rank by it, and a CPU has none
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # a lost process ends the others after this long
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=10))
    try:
        (compare if args.tiny else generate)(args, device, parallel, dist.get_rank())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
