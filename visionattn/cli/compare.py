"""``compare``: a diffusers pipeline dense and sparse with the same prompts and seeds, as HTML, CSV and pictures."""

import argparse
import ast
import functools
import sys
from pathlib import Path
from typing import Any

from .patterns import SYNTAX, parse_pattern

PROMPT = "a lighthouse on a cliff at dusk"
DTYPES = ("float32", "bfloat16", "float16")
PATCHES = f"{SYNTAX}; a preset (quality, balanced, fast); clear:FILE, CLEAR's weights; agent_sd, of a U-Net"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    p = commands.add_parser(
        "compare", parents=[common], help="a pipeline dense and sparse, the same seeds: pictures, metrics, times",
        description="Generates every prompt with every seed, dense and under each pattern, and compares the pictures. "
        "A run that was interrupted goes on when it is started again.",
    )  # fmt: skip
    p.add_argument("patterns", nargs="*", default=["disk:16"], metavar="PATTERN", help=PATCHES)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--pipeline", metavar="NAME", help="name or folder that diffusers' from_pretrained takes")
    what.add_argument("--tiny", action="store_true", help="a tiny FLUX.1 with random weights, for a try on a CPU")
    p.add_argument("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="where all goes")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--height", type=int, help="pixels; the pipeline's own by default, 256 with --tiny")
    p.add_argument("--width", type=int)
    p.add_argument("--steps", type=int, help="denoising steps; the pipeline's own by default, 4 with --tiny")
    p.add_argument("--dense-steps", type=int, default=0, help="leading steps that stay dense under the patterns")
    p.add_argument("--backend", default="auto", help="of the local attention")
    p.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU by default, float32 on a CPU")
    p.add_argument("--device", help="cuda where there is one, else cpu; cpu with --tiny")
    p.add_argument("--offload", choices=("none", "model", "sequential"), default="none", help="to the CPU's memory")
    p.add_argument("--vae-tiling", action="store_true", help="decode in tiles: less memory")
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="for the pipeline's call: guidance_scale=3.5"
    )
    p.add_argument("--no-warmup", action="store_true", help="time the first picture of a method too")
    p.set_defaults(run=compare)


class Compared:
    """A comparison, printed as a table."""

    def __init__(self, comparison: Any):
        self.comparison = comparison

    def as_dict(self) -> dict[str, Any]:
        return self.comparison.as_dict()

    def __str__(self) -> str:
        from visionattn.diffusion.compare_page import HEADER, cells

        from .table import Table

        found = self.comparison
        notes = [*found.notes, f"page: {found.page}", f"table: {found.folder / 'results.csv'}"]
        return str(Table(HEADER, [cells(entry) for entry in found.summary()], notes=notes))


def compare(args: argparse.Namespace) -> Compared:
    if not args.tiny and args.pipeline is None:
        raise ValueError("no pipeline: give --pipeline NAME, or --tiny to try the command")
    for name in ("height", "width", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: give a positive number")
    if args.dense_steps < 0:
        raise ValueError(f"--dense-steps {args.dense_steps}: give 0 or more")
    prompts = read_prompts(args.prompt, args.prompts)
    arguments = call_arguments(args)
    methods = dict(method(text, args.dense_steps, args.backend) for text in args.patterns)
    if len(methods) < len(args.patterns):
        raise ValueError("a pattern is given twice")

    from visionattn.diffusion.compare import compare as run
    from visionattn.diffusion.loading import load_pipeline

    pipe, settings = load_pipeline(
        args.pipeline, dtype=args.dtype, device=args.device, offload=args.offload, vae_tiling=args.vae_tiling
    )
    progress = functools.partial(print, file=sys.stderr, flush=True)
    return Compared(
        run(
            pipe, methods, prompts, args.out, seeds=args.seeds, arguments=arguments, settings=settings,
            warmup=not args.no_warmup, progress=progress,
        )
    )  # fmt: skip


def read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """Those given and those of the file; lines that are empty or begin with ``#`` are none."""
    prompts = list(given or [])
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"--prompts {file} is not a file: give a text file with one prompt a line")
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {file} is not text in UTF-8") from None
        prompts += [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise ValueError(f"--prompts {file} has no prompt: write one a line")
    return list(dict.fromkeys(prompts)) or [PROMPT]


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with."""
    height, width, steps = args.height, args.width, args.steps
    if args.tiny:
        height, width, steps = height or width or 256, width or height or 256, steps or 4
    found = {"height": height, "width": width, "num_inference_steps": steps}
    found = {name: value for name, value in found.items() if value is not None}
    if args.tiny:
        found["max_sequence_length"] = 32
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {text!r}: write NAME=VALUE, as guidance_scale=3.5")
        if name in ("prompt", "generator", "output_type", "return_dict"):
            raise ValueError(f"--set {text!r}: {name} is set by the comparison itself")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def method(text: str, dense_steps: int, backend: str) -> tuple[str, Any]:
    """Name of a patch and the function that puts it on."""
    kind, _, rest = text.partition(":")
    options = {"backend": backend}
    if dense_steps:
        options["dense_steps"] = dense_steps
    name = " ".join([text, *(f"{k}={v}" for k, v in options.items() if v != "auto")])
    if text == "agent_sd":
        return text, text
    if kind == "clear":
        if not Path(rest).is_file():
            raise FileNotFoundError(
                f"{text}: {rest or 'nothing'} is not a file: write clear:clear_local_16.safetensors"
            )
        return f"clear:{Path(rest).stem}{name[len(text) :]}", functools.partial(_load_clear, file=rest, **options)
    pattern = _preset(text) if ":" not in text else parse_pattern(text)
    return name, functools.partial(_sparsify, pattern=pattern, **options)


def _preset(name: str) -> str:
    from visionattn.diffusion import PRESETS

    if name not in PRESETS:
        raise ValueError(f"pattern {name!r} is unknown: write {PATCHES}")
    return name


def _sparsify(pipe: Any, **options: Any) -> Any:
    from visionattn.diffusion import sparsify

    return sparsify(pipe, **options)


def _load_clear(pipe: Any, file: str, **options: Any) -> Any:
    from visionattn.diffusion import load_clear

    return load_clear(pipe, file, **options)
