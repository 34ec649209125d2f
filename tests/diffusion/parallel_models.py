"""What test_parallel.py runs in forked processes: diffusers' context parallelism with a patch, against one process.

Run as ``python -m tests.diffusion.parallel_models FOLDER``; rank r of n writes FOLDER/n-r.json, {case: result}.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel

from tests.diffusion import tiny
from tests.ops.parallel_local import fork, join
from visionattn.diffusion import Disk, Neighborhood, sparsify
from visionattn.ops.local.exchange import gather

# name: processes, model, its inputs, pattern, diffusers' config
CASES = {
    "ulysses": (2, "flux", dict(batch=2), Disk(2), dict(ulysses_degree=2)),
    "ulysses, references": (2, "flux", dict(references=2), Disk(2.5), dict(ulysses_degree=2)),
    "ulysses, any length": (
        2, "flux", dict(grid=(5, 3), text=5), Disk(2), dict(ulysses_degree=2, ulysses_anything=True),
    ),
    "ulysses, padded text": (2, "qwen", dict(batch=2, lengths=[2, 4]), Disk(2), dict(ulysses_degree=2)),
    "ulysses, video": (2, "wan", {}, Neighborhood((2, 3, 3)), dict(ulysses_degree=2)),
    "bands": (2, "flux", dict(batch=2), Disk(2), dict(ring_degree=2)),
    "bands, references": (2, "flux2", dict(references=2), Neighborhood(3), dict(ring_degree=2)),
    "bands, any length": (
        2, "flux", dict(grid=(5, 3), text=5), Neighborhood(3), dict(ring_degree=2, ring_anything=True),
    ),
    "bands, pooled keys": (2, "flux", dict(grid=(4, 6)), Disk(2, downsample=2), dict(ring_degree=2)),
    "bands, padded text": (2, "qwen", dict(batch=2, lengths=[2, 4]), Disk(2), dict(ring_degree=2)),
    "bands, video": (2, "wan", {}, Neighborhood((3, 3, 2)), dict(ring_degree=2)),
    "bands over four": (4, "flux", dict(grid=(4, 6), references=2), Disk(2), dict(ring_degree=4)),
    "bands and ulysses": (
        4, "flux", dict(grid=(4, 6), batch=2), Neighborhood(3, 2), dict(ring_degree=2, ulysses_degree=2),
    ),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    return tiny.randomise(tiny.CASES[name].build()).double()


def inputs_of(name: str, options: dict) -> dict:
    options = dict(options)
    grid = options.pop("grid", tiny.grid_of(tiny.CASES[name], name))
    found = tiny.CASES[name].inputs(grid, **options)
    if name == "flux2":  # as its pipeline makes them; others are not split
        found |= {key: found[key][None] for key in ("img_ids", "txt_ids")}
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in found.items()}


def run_case(name: str) -> dict:
    """Largest difference to one process, patched and after the patch is gone, and what the report says."""
    _, model_name, options, pattern, degrees = CASES[name]
    model, inputs = build(model_name), inputs_of(model_name, options)
    dense = tiny.run(model, inputs)
    with sparsify(model, pattern):
        expected = tiny.run(model, inputs)
    handle = None
    if "references" in name:  # the patch may come first
        handle = sparsify(model, pattern)
    model.enable_parallelism(config=ContextParallelConfig(**degrees))
    handle = handle or sparsify(model, pattern)
    found = tiny.run(model, inputs)
    report = handle.report()
    handle.remove()
    after = 0.0
    if degrees == dict(ulysses_degree=2) and "padded" not in name:  # diffusers' other dense ways need a GPU
        after = (tiny.run(model, inputs) - dense).abs().max().item()
    return {
        "error": (found - expected).abs().max().item(),
        "sparse": (expected - dense).abs().max().item(),
        "removed": after,
        "dense calls": sum(row["dense"] for row in report.rows),
        "report": str(report),
    }


def run_compiled(degrees: dict) -> float:
    model, inputs = build("flux"), inputs_of("flux", {})
    model.enable_parallelism(config=ContextParallelConfig(**degrees))
    with sparsify(model, Disk(2)):
        eager = tiny.run(model, inputs)
        model.single_transformer_blocks[0].compile(fullgraph=True, backend="eager")
        return (tiny.run(model, inputs) - eager).abs().max().item()


def run_dense() -> dict:
    """Dense calls go to diffusers' own parallel attention; a backend that knows nothing of processes is refused."""
    model, inputs = build("flux"), inputs_of("flux", {})
    expected = tiny.run(model, inputs)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found = {}
    with sparsify(model, Neighborhood(16)) as handle:
        found["covers"] = (tiny.run(model, inputs) - expected).abs().max().item()
        found["reason"] = handle.report().rows[0]["reason"]
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = "_native_math"
    with sparsify(model, Neighborhood(16)):
        found["error"] = error_of(lambda: tiny.run(model, inputs))
    model = build("flux")
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    with sparsify(model, Neighborhood(16)):
        found["ring error"] = error_of(lambda: tiny.run(model, inputs))
    return found


def run_too_few_heads() -> str:
    model, inputs = build("flux"), inputs_of("flux", dict(grid=(4, 6)))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=4))
    with sparsify(model, Disk(2)):
        return error_of(lambda: tiny.run(model, inputs))


def run_example(rank: int) -> str:
    """What examples/flux_multi_gpu.py --tiny --ring 2 prints."""
    path = Path(__file__).parents[2] / "examples" / "flux_multi_gpu.py"
    if not path.exists():  # an installed source distribution
        return "no examples here"
    example = runpy.run_path(str(path))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        degrees = example["degrees"](argparse.Namespace(ulysses=None, ring=2), 2)
        example["compare"](argparse.Namespace(seed=0), torch.device("cpu"), degrees, rank)
    return printed.getvalue()


def error_of(call) -> str:
    try:
        call()
    except ValueError as e:
        return str(e)
    return "nothing was raised"


def gather_uneven(tensor: torch.Tensor, dim: int, group) -> torch.Tensor:
    sizes = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, tensor.shape[dim], group=group)
    return gather(tensor.movedim(dim, 0), tuple(sizes), group).movedim(0, dim)


def run_all(rank: int, size: int, folder: Path) -> None:
    # diffusers 0.42 counts accelerators to pick this rank's, and divides by their number: a CPU has none
    torch.accelerator.device_count = lambda: 1
    context_parallel._all_gather_anything = gather_uneven  # gloo's own gathers equal parts only
    join(rank, folder, f"models-{size}", size)
    results = {name: run_case(name) for name, case in CASES.items() if case[0] == size}
    if size == 2:
        results["compiled"] = [run_compiled(dict(ulysses_degree=2)), run_compiled(dict(ring_degree=2))]
        results["stays dense"] = run_dense()
        results["example"] = run_example(rank)
    else:
        results["too few heads"] = run_too_few_heads()
    dist.barrier()
    (folder / f"{size}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    sys.exit(sum(fork(lambda rank, n=n: run_all(rank, n, where), n) for n in (2, 4)))
