"""Compares visionattn's substitute for ``mmcv._ext`` with mmcv's own kernels, and records what those compute.

Not run by CI: it needs mmcv's kernels, built from the source distribution (its ``mmcv/ops/csrc`` folder)::

    pip download --no-deps --no-binary :all: --no-build-isolation onedl-mmcv==2.3.6 && tar xzf onedl_mmcv-2.3.6.tar.gz
    python tests/detection/make_mmcv_fixtures.py build onedl_mmcv-2.3.6/mmcv/ops/csrc FOLDER
    python tests/detection/make_mmcv_fixtures.py record FOLDER    # tests/fixtures/mmcv_ops/*.npz
    python tests/detection/make_mmcv_fixtures.py compare FOLDER   # the table of docs/mmcv-ops.md

mmcv has CPU kernels for some of the operators only (NMS, RoIAlign, deformable convolution). The CUDA kernels of the
others are written one element a thread, so they are compiled for the host too, with a loop for the threads
(``mmcv_host_kernels.cpp``).
"""

import argparse
import functools
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures" / "mmcv_ops"
# these define the same names or macros as others: a file of their own
ALONE = ("bezier_align", "modulated_deform_conv", "psamask", "roi_align", "roi_align_rotated", "rotated_feature_align")


@dataclass
class Case:
    """One call of an operator: tensors and numbers by argument name; ``written`` are the tensors it writes into."""

    operator: str
    tensors: dict[str, torch.Tensor]
    numbers: dict
    written: tuple[str, ...] = ()
    host: bool = False  # mmcv has no CPU kernel: the CUDA kernel, compiled for the host

    def run(self, module) -> dict[str, torch.Tensor]:
        """What ``module``'s operator writes and returns."""
        tensors = {name: t.clone() for name, t in self.tensors.items()}
        returned = getattr(module, self.operator)(**tensors, **self.numbers)
        results = {name: tensors[name] for name in self.written}
        if isinstance(returned, torch.Tensor):
            results["returned"] = returned
        elif returned is not None:
            results["returned"] = torch.tensor([[i, index] for i, group in enumerate(returned) for index in group])
        if self.operator == "softnms":  # rows beyond those taken are whatever memory held
            results["dets"] = results["dets"][: len(results["returned"])]
        return results


def boxes(rng, number: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    corner, side = rng.uniform(0, 60, (number, 2)), rng.uniform(1, 30, (number, 2))
    box = np.concatenate([corner, corner + side], axis=1)
    score = rng.uniform(0, 1, number)
    if whole:  # overlaps that are exactly a threshold
        box = np.round(box / 5) * 5 + [0, 0, 5, 5]
    return torch.tensor(box, dtype=torch.float32), torch.tensor(score, dtype=torch.float32)


def nms_cases(rng, number: int, ties: bool):
    """NMS, soft-NMS and NMS match; with equal scores where their order is the same on every machine, or with ``ties``.

    mmcv's NMS and NMS match sort with ``Tensor.sort``, which puts equal scores in another order on a GPU than on a CPU.
    """
    for whole in (False, True):
        box, score = boxes(rng, number, whole)
        rounded = (score * 10).round() / 10 if whole else score
        sorted_ = rounded if ties else score
        for offset, threshold in ((0, 0.3), (0, 0.6), (1, 0.5), (0, 0.7), (1, 0.7)):
            tensors = {"boxes": box, "scores": sorted_}
            yield Case("nms", tensors, {"iou_threshold": threshold, "offset": offset})
        for method in (0, 1, 2):
            tensors = {"boxes": box, "scores": rounded, "dets": torch.zeros(number, 5)}
            numbers = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.05, "method": method, "offset": method % 2}
            yield Case("softnms", tensors, numbers, ("dets",))
        tensors = {"dets": torch.cat([box, sorted_[:, None]], dim=1)}
        yield Case("nms_match", tensors, {"iou_threshold": 0.5})


def regions(rng, number: int, batch: int, size: tuple[int, int], scale: float, dtype) -> torch.Tensor:
    """RoIs inside, across and outside the map, thin ones, and one that covers it."""
    height, width = size[0] / scale, size[1] / scale
    corner = rng.uniform(-0.3, 1, (number, 2)) * [width, height]
    side = rng.uniform(0, 0.8, (number, 2)) ** 2 * [width, height]
    roi = np.concatenate([rng.integers(0, batch, (number, 1)), corner, corner + side], axis=1)
    roi[0, 1:] = [0, 0, width, height]
    return torch.tensor(roi, dtype=dtype)


def tensor(rng, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(rng.standard_normal(shape), dtype=dtype)


def roi_align_cases(reference, rng, number: int, channels: int):
    settings = [(1, 0, True), (1, 2, True), (1, 3, False), (1, 0, False), (0, 2, True), (0, 0, True), (0, 0, False)]
    for i, (mode, ratio, aligned) in enumerate(settings):
        dtype = (torch.float32, torch.float64)[i % 2]
        features, scale = tensor(rng, 2, channels, 11, 14, dtype=dtype), (0.25, 0.125, 0.3)[i % 3]
        rois = regions(rng, number, 2, (11, 14), scale, dtype)
        size = ((7, 7), (3, 2))[i % 2]
        numbers = {
            "aligned_height": size[0],
            "aligned_width": size[1],
            "spatial_scale": scale,
            "sampling_ratio": ratio,
            "pool_mode": mode,
            "aligned": aligned,
        }
        output = torch.zeros(number, channels, *size, dtype=dtype)
        argmax = {name: torch.zeros_like(output) if mode == 0 else output[:0] for name in ("argmax_y", "argmax_x")}
        written = ("output", "argmax_y", "argmax_x") if mode == 0 else ("output",)
        case = Case("roi_align_forward", {"input": features, "rois": rois, "output": output} | argmax, numbers, written)
        yield case
        if mode == 0:
            result = case.run(reference)
            argmax = {name: result[name] for name in argmax}
        grads = {"grad_output": tensor(rng, *output.shape, dtype=dtype), "rois": rois, "grad_input": features * 0}
        yield Case("roi_align_backward", grads | argmax, numbers, ("grad_input",))


def roi_pool_cases(host, rng, number: int, channels: int):
    for i, size in enumerate(((7, 7), (3, 2))):
        dtype = (torch.float32, torch.float64)[i]
        features, scale = tensor(rng, 2, channels, 11, 14, dtype=dtype), (0.25, 0.3)[i]
        rois = regions(rng, number, 2, (11, 14), scale, dtype)
        numbers = {"pooled_height": size[0], "pooled_width": size[1], "spatial_scale": scale}
        output = torch.zeros(number, channels, *size, dtype=dtype)
        tensors = {"input": features, "rois": rois, "output": output, "argmax": output.int()}
        case = Case("roi_pool_forward", tensors, numbers, ("output", "argmax"), host=True)
        yield case
        argmax = case.run(host)["argmax"]
        tensors = {"grad_output": tensor(rng, *output.shape, dtype=dtype), "rois": rois, "argmax": argmax}
        tensors["grad_input"] = features * 0
        yield Case("roi_pool_backward", tensors, numbers, ("grad_input",), host=True)


def focal_cases(rng, number: int, classes: int):
    for i, (gamma, alpha, weighted) in enumerate(((2.0, 0.25, False), (1.5, 0.6, True), (0.0, 0.5, False))):
        logits = tensor(rng, number, classes, dtype=(torch.float32, torch.float64)[i % 2]) * 4
        weight = torch.tensor(rng.uniform(0.5, 2, classes if weighted else 0), dtype=logits.dtype)
        numbers = {"gamma": gamma, "alpha": alpha}
        # background rows have no class weight: mmcv reads beyond its end there
        target = torch.tensor(rng.integers(0, classes + (not weighted), number))
        tensors = {"input": logits, "target": target, "weight": weight}
        empty = torch.zeros_like(logits)
        yield Case("sigmoid_focal_loss_forward", tensors | {"output": empty}, numbers, ("output",), host=True)
        yield Case("sigmoid_focal_loss_backward", tensors | {"grad_input": empty}, numbers, ("grad_input",), host=True)
        tensors = {"input": logits.softmax(1), "target": target.clamp_max(classes - 1), "weight": weight}
        row = empty[:, 0].clone()
        yield Case("softmax_focal_loss_forward", tensors | {"output": row}, numbers, ("output",), host=True)
        tensors |= {"buff": row, "grad_input": empty}
        yield Case("softmax_focal_loss_backward", tensors, numbers, ("buff", "grad_input"), host=True)


def deform_cases(rng, batch: int, channels: int, size: tuple[int, int]):
    # kernel, stride, padding, dilation (each (h, w)), groups, deformable groups
    layouts = [
        ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
        ((3, 2), (2, 1), (1, 0), (1, 2), 2, 2),
        ((1, 3), (1, 2), (0, 2), (1, 1), 1, 2),
        ((3, 3), (1, 1), (1, 1), (1, 1), 2, 1),
    ]
    for i, (kernel, stride, pad, dilation, groups, deformable) in enumerate(layouts):
        dtype = (torch.float32, torch.float64)[i % 2]
        make = functools.partial(tensor, rng, dtype=dtype)
        sides = zip(size, kernel, stride, pad, dilation, strict=True)
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
        filters, positions = 2 * channels, deformable * kernel[0] * kernel[1]
        features, weight = make(batch, channels, *size), make(filters, channels // groups, *kernel) / 3
        offset, mask = make(batch, 2 * positions, *out) * 2, make(batch, positions, *out).sigmoid()
        if i == len(layouts) - 1:  # samples on pixels, as they start: the derivative there is a convention
            offset = offset.round() * (torch.arange(batch) % 2)[:, None, None, None]
        bias, grad = make(filters), make(batch, filters, *out)
        scratch = {"columns": torch.zeros(0, dtype=dtype), "ones": torch.zeros(0, dtype=dtype)}
        first = {"kW": kernel[1], "kH": kernel[0], "dW": stride[1], "dH": stride[0], "padW": pad[1], "padH": pad[0]}
        first |= {"dilationW": dilation[1], "dilationH": dilation[0], "group": groups, "deformable_group": deformable}
        first["im2col_step"] = 2
        shared = {"input": features, "offset": offset}
        yield Case("deform_conv_forward", shared | scratch | {"weight": weight, "output": grad * 0}, first, ("output",))
        tensors = shared | {"gradOutput": grad, "gradInput": features * 0, "gradOffset": offset * 0, "weight": weight}
        tensors["columns"] = scratch["columns"]
        yield Case("deform_conv_backward_input", tensors, first, ("gradInput", "gradOffset"))
        tensors = shared | scratch | {"gradOutput": grad, "gradWeight": weight * 0}
        yield Case("deform_conv_backward_parameters", tensors, first | {"scale": 0.5}, ("gradWeight",))
        second = {"kernel_h": kernel[0], "kernel_w": kernel[1], "stride_h": stride[0], "stride_w": stride[1]}
        second |= {"pad_h": pad[0], "pad_w": pad[1], "dilation_h": dilation[0], "dilation_w": dilation[1]}
        second |= {"group": groups, "deformable_group": deformable, "with_bias": i != 1}
        shared |= scratch | {"mask": mask, "weight": weight, "bias": bias}
        yield Case("modulated_deform_conv_forward", shared | {"output": grad * 0}, second, ("output",))
        zeros = {f"grad_{n}": shared[n] * 0 for n in ("input", "weight", "bias", "offset", "mask")}
        yield Case("modulated_deform_conv_backward", shared | zeros | {"grad_output": grad}, second, tuple(zeros))


def attention_cases(rng, queries: int, heads: int, dim: int):
    for dtype in (torch.float32, torch.float64):
        shapes = torch.tensor([[6, 5], [3, 2]])
        start = torch.cat([torch.zeros(1, dtype=torch.long), shapes.prod(1).cumsum(0)[:-1]])
        value = tensor(rng, 2, int(shapes.prod(1).sum()), heads, dim, dtype=dtype)
        places = torch.tensor(rng.uniform(-0.2, 1.2, (2, queries, heads, 2, 3, 2)), dtype=dtype)
        weights = tensor(rng, 2, queries, heads, 6, dtype=dtype).softmax(-1).view(2, queries, heads, 2, 3)
        tensors = {"value": value, "value_spatial_shapes": shapes, "value_level_start_index": start}
        tensors |= {"sampling_locations": places, "attention_weights": weights}
        step = {"im2col_step": 2}
        yield Case("ms_deform_attn_forward", tensors, step, host=True)
        grads = {"grad_value": value * 0, "grad_sampling_loc": places * 0, "grad_attn_weight": weights * 0}
        names, grad = tuple(grads), {"grad_output": tensor(rng, 2, queries, heads * dim, dtype=dtype)}
        yield Case("ms_deform_attn_backward", tensors | grads | grad, step, names, host=True)


def all_cases(reference, host, seed: int, large: bool = False) -> dict[str, list[Case]]:
    """Random calls, by fixture file."""
    rng = np.random.default_rng(seed)
    return {
        "nms": list(nms_cases(rng, 500 if large else 40, ties=large)),
        "roi_align": list(roi_align_cases(reference, rng, 60 if large else 8, 8 if large else 2)),
        "roi_pool": list(roi_pool_cases(host, rng, 60 if large else 8, 8 if large else 2)),
        "focal_loss": list(focal_cases(rng, 300 if large else 12, 80 if large else 5)),
        "deform_conv": list(deform_cases(rng, 4 if large else 2, 16 if large else 4, (17, 15) if large else (7, 6))),
        "ms_deform_attn": list(attention_cases(rng, 50 if large else 4, 4 if large else 2, 16 if large else 3)),
    }


def record(folder: Path) -> None:
    reference, host = load(folder, "_ext"), load(folder, "_host")
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for file, cases in all_cases(reference, host, seed=0).items():
        arrays, calls = {}, []
        for i, case in enumerate(cases):
            results = case.run(host if case.host else reference)
            arrays |= {f"{i}/in/{name}": t.numpy() for name, t in case.tensors.items()}
            arrays |= {f"{i}/out/{name}": t.numpy() for name, t in results.items()}
            calls.append({"operator": case.operator, "numbers": case.numbers, "written": case.written})
        np.savez_compressed(FIXTURES / f"{file}.npz", calls=json.dumps(calls), **arrays)
        print(f"{file}.npz: {len(calls)} calls, {(FIXTURES / f'{file}.npz').stat().st_size / 1e3:.0f} kB")


def compare(folder: Path, seeds: int) -> None:
    """Prints, for every operator, the largest difference relative to the largest value of the tensor."""
    from visionattn.detection import ensure_mmcv_ops

    ensure_mmcv_ops()
    reference, host, ours = load(folder, "_ext"), load(folder, "_host"), importlib.import_module("mmcv._ext")
    rows: dict[tuple, dict] = {}
    for seed in range(seeds):
        print(f"seed {seed + 1} of {seeds}", file=sys.stderr)
        for case in [c for cases in all_cases(reference, host, seed + 1, large=True).values() for c in cases]:
            theirs, mine = case.run(host if case.host else reference), case.run(ours)
            row = rows.setdefault((case.operator, case.host), {"calls": 0})
            row["calls"] += 1
            for name, expected in theirs.items():
                kind, gap = difference(expected, mine[name])
                row[kind] = max(row.get(kind, 0), gap)
    print("| operator | compared with | calls | float32 | float64 | indices |\n|---|---|---|---|---|---|")
    for (operator, on_host), row in rows.items():
        kernel = "CUDA kernel, on the host" if on_host else "CPU kernel"
        cells = [f"{row[kind]:.1e}" if row.get(kind) else "0" if kind in row else "" for kind in ("float32", "float64")]
        indices = {None: "", 0: "all equal"}.get(row.get("indices"), "not equal")
        print(f"| `{operator}` | {kernel} | {row['calls']} | {' | '.join(cells)} | {indices} |")


def difference(expected: torch.Tensor, result: torch.Tensor) -> tuple[str, float]:
    """The type, and the largest difference relative to the largest value; of indices: whether any differs."""
    kind = str(expected.dtype).removeprefix("torch.") if expected.dtype.is_floating_point else "indices"
    if result.shape != expected.shape:
        return kind, float("inf")
    if kind == "indices":
        return kind, float(not torch.equal(result, expected))
    return kind, float((result - expected).abs().max() / expected.abs().max())


def build(sources: Path, folder: Path) -> None:
    """Compiles mmcv's C++ operators as few units (``_ext.so``) and its CUDA kernels for the host (``_host.so``).

    About four minutes of one core. A second call goes on where an interrupted one stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources, torch_folder = sources.resolve(), Path(torch.__file__).parent
    cpu, main = sorted((sources / "pytorch/cpu").glob("*.cpp")), sorted((sources / "pytorch").glob("*.cpp"))
    units = {"main": main, "cpu": [f for f in cpu if f.stem not in ALONE]}
    units |= {f.stem: [f] for f in cpu if f.stem in ALONE}
    include = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    flags = ["-O2", "-std=c++20", "-fPIC", "-w", *(f"-I{path}" for path in include)]
    link = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    link.append(f"-Wl,-rpath,{torch_folder / 'lib'}")
    objects = []
    for name, files in units.items():
        unit = folder / f"{name}.cpp"
        unit.write_text("".join(f'#include "{file}"\n' for file in files))
        objects.append(unit.with_suffix(".o"))
        own = ["-DTORCH_EXTENSION_NAME=_ext", f"-I{sources / 'common'}", f"-I{sources / 'pytorch'}"]
        if objects[-1].exists():
            continue
        print(f"{unit.name}: {len(files)} files", flush=True)
        part = unit.with_suffix(".part")
        subprocess.run(["g++", *flags, *own, "-c", unit, "-o", part], check=True)
        part.rename(objects[-1])
    subprocess.run(["g++", "-shared", *objects, "-o", folder / "_ext.so", *link], check=True)
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in ("pytorch_cuda_helper.hpp", "common_cuda_helper.hpp"):
        (stubs / name).write_text("")
    helper = (sources / "common/cuda/common_cuda_helper.hpp").read_text()
    (stubs / "bilinear.inc").write_text(helper[helper.index("template <typename T>") : helper.rindex("#endif")])
    for kernel in ("sigmoid_focal_loss", "softmax_focal_loss", "roi_pool", "ms_deform_attn"):
        name = f"{kernel}_cuda_kernel.cuh"  # a copy beside the stubs, which quotes then find before mmcv's headers
        (stubs / name).write_text((sources / "common/cuda" / name).read_text())
    host = ["g++", "-shared", *flags, f"-I{stubs}", HERE / "mmcv_host_kernels.cpp", "-o", folder / "_host.so", *link]
    subprocess.run(host, check=True)


def load(folder: Path, name: str):
    loader = importlib.machinery.ExtensionFileLoader(name, str(folder / f"{name}.so"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("build", help="compile mmcv's kernels")
    step.add_argument("sources", type=Path, help="mmcv/ops/csrc of the source distribution")
    step.add_argument("folder", type=Path, help="where the two modules go")
    step = steps.add_parser("record", help="write tests/fixtures/mmcv_ops")
    step.add_argument("folder", type=Path, help="what build wrote")
    step = steps.add_parser("compare", help="print the table of differences")
    step.add_argument("folder", type=Path, help="what build wrote")
    step.add_argument("--seeds", type=int, default=10, help="random draws of every case (default 10)")
    args = vars(parser.parse_args())
    {"build": build, "record": record, "compare": compare}[args.pop("step")](**args)
