# ruff: noqa: RUF009  (option() makes dataclass fields)
"""Every option of a distillation, once: the dataclass is the YAML schema, the ``key=value`` arguments and the manual.

Precedence: dataclass defaults < YAML (``--config``) < ``key=value`` on the command line.
``python -m visionattn.diffusion.distill.config`` prints the table of ``docs/distill.md``.
"""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml


class UserError(Exception):
    """Something the user can put right: one line, exit status ``status``."""

    status = 2


class RunError(UserError):
    """A run that was set up well but can't go on (a loss that is not finite, a lost rank)."""

    status = 1


def option(default: Any, help: str, *, low: float | None = None, choices: tuple = ()) -> Any:
    """A field with its help and what is allowed (``low`` inclusive, for each element of a list)."""
    metadata = {"help": help, "low": low, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """One distillation. Sizes are pixels of the picture, radii tokens, intervals optimizer updates."""

    # model
    model: str = option("", "FLUX.1 pipeline to distil: a folder of save_pretrained, or a name on the hub")
    radius: int = option(16, "radius of the student's disk, in tokens", low=1)
    downsample: int | None = option(
        None, "edge f of the pooled variant's blocks (published: 4); none: no pooling", low=2
    )
    layers: list[str] = option([], "attentions that become local: numbers or names with *; default: all")
    loss_layers: list[str] = option(
        [], "attentions whose outputs are compared: numbers or names with *; default: every fourth single-stream block"
    )
    guidance: float = option(3.5, "guidance scale told to a guidance-distilled transformer", low=0)
    # data
    images: str = option("", "for --build-cache: folder of pictures with prompts beside them, or a .jsonl or .csv list")
    cache: str = option("", "folder of cached latents and prompt embeddings")
    height: int = option(1024, "of the cached pictures", low=16)
    width: int = option(1024, "of the cached pictures", low=16)
    max_sequence_length: int = option(512, "text tokens of the cached prompts", low=1)
    # losses
    flow_weight: float = option(1.0, "weight of the flow-matching loss", low=0)
    output_weight: float = option(0.5, "weight of the distance to the teacher's prediction", low=0)
    attention_weight: float = option(0.5, "weight of the distance between attention outputs", low=0)
    # optimizer
    optimizer: str = option("adamw", "prodigy needs the package prodigyopt", choices=("adamw", "prodigy"))
    lr: float = option(1e-4, "learning rate (prodigy: 1)", low=0)
    weight_decay: float = option(0.0, "weight decay", low=0)
    warmup_steps: int = option(0, "updates of linear warm-up", low=0)
    decay_steps: int = option(0, "last updates, in which the learning rate falls linearly to zero", low=0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0: no limit", low=0)
    batch_size: int = option(1, "pictures in a batch of one rank", low=1)
    grad_accum: int = option(1, "batches that make one update", low=1)
    steps: int = option(10000, "updates in all", low=1)
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ..")
    dtype: str = option("bfloat16", "of frozen weights and of the computation; what is trained is kept in float32",
                        choices=("bfloat16", "float32"))  # fmt: skip
    gradient_checkpointing: bool = option(True, "recompute the student's blocks in the backward pass")
    fsdp: bool = option(False, "shard teacher, student and optimizer over the ranks that torchrun starts (FSDP2)")
    dist_timeout: int = option(600, "seconds a rank waits for the others before it gives up", low=1)
    threads: int = option(0, "CPU threads of a process; 0: torch's choice", low=0)
    # run
    output: str = option("", "run folder; a run that it holds is gone on with")
    seed: int = option(0, "of the order, noise and timesteps", low=0)
    log_interval: int = option(10, "updates between progress lines, and between looks at the loss", low=1)
    save_interval: int = option(500, "updates between checkpoints", low=1)
    sample_interval: int = option(500, "updates between sample pictures; 0: none", low=0)
    samples: int = option(4, "sample pictures: the first so many prompts of the cache", low=1)
    sample_steps: int = option(20, "denoising steps of a sample picture", low=1)
    stop_step: int = option(0, "save and stop after this update, as Ctrl-C would; 0: go to the end", low=0)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
KINDS = typing.get_type_hints(Config)
# a resume may change these; anything else makes another run
FREE = ("steps", "device", "fsdp", "dist_timeout", "threads", "gradient_checkpointing", "log_interval",
        "save_interval", "sample_interval", "samples", "sample_steps", "stop_step", "images", "output", "cache",
        "batch_size", "grad_accum", "model")  # fmt: skip


def _convert(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType):  # X | None
        return None if value in (None, "none", "null", "") else _convert(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is list:
        items = (
            value if isinstance(value, list | tuple) else str("" if value is None else value).replace(",", " ").split()
        )
        return [str(item) for item in items]
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return value if isinstance(value, bool) else words[str(value).lower()]
    if kind is str:
        if isinstance(value, dict | list):
            raise ValueError
        return "" if value is None else str(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError
    return int(number) if kind is int else number


def coerce(name: str, value: Any, where: str = "") -> Any:
    """The value of option ``name`` in its type and range. Raises UserError."""
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"{where}unknown option '{name}'.{hint} docs/distill.md lists them all.")
    kind, meta = KINDS[name], FIELDS[name].metadata
    try:
        result = _convert(kind, value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{where}{name}={value!r} is not of type {kind_name(kind)}; {meta['help']}.") from None
    if meta["choices"] and result not in meta["choices"]:
        raise UserError(f"{where}{name}={result!r} is not one of {', '.join(meta['choices'])}.")
    if meta["low"] is not None and isinstance(result, int | float) and result < meta["low"]:
        raise UserError(f"{where}{name}={result!r} is out of range: it must be at least {meta['low']}.")
    return result


def kind_name(kind: Any) -> str:
    """The type as messages and the manual name it."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def make(values: dict[str, Any], where: str = "") -> Config:
    """A checked Config out of plain values. Raises UserError that names the bad one."""
    cfg = Config(**{str(k): coerce(str(k), v, where) for k, v in values.items()})
    rules = [
        (not cfg.model, "model= is not given: the folder or hub name of the pipeline to distil"),
        (not cfg.cache, "cache= is not given: the folder of cached latents and prompt embeddings"),
        (not (cfg.flow_weight or cfg.output_weight or cfg.attention_weight), "all three loss weights are 0"),
    ]
    for broken, message in rules:
        if broken:
            raise UserError(message + ".")
    return cfg


def recipes_dir() -> Path:
    """Where the recipes stand: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "configs" / "diffusion"
    return installed if installed.is_dir() else package.parent / "configs" / "diffusion"


def read_yaml(name: str | Path) -> dict[str, Any]:
    """The options of a YAML file, or of a recipe that ships (by its bare name). Raises UserError."""
    path = Path(name)
    recipe = recipes_dir() / f"{path.name.removesuffix('.yaml')}.yaml"
    if not path.exists() and path.parent in (Path("."), Path("configs/diffusion")) and recipe.is_file():
        path = recipe
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in recipes_dir().glob("*.yaml")))
        raise UserError(f"config file {path} does not exist. Give a path, or a recipe that ships: {known}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"config file {path} is not readable YAML: {' '.join(str(e).split())}.") from None
    if not isinstance(data, dict | None):
        raise UserError(f"config file {path} holds a {type(data).__name__}; it must hold 'option: value' lines.")
    return {str(k): coerce(str(k), v, f"{path}: ") for k, v in (data or {}).items()}


def pairs(arguments: list[str]) -> dict[str, Any]:
    """``key=value`` arguments as options. Raises UserError."""
    values = {}
    for argument in arguments:
        key, sep, text = argument.partition("=")
        if not sep:
            raise UserError(f"{argument!r} is not key=value.")
        values[key] = coerce(key, text)
    return values


def make_folder(path: str | Path, name: str) -> Path:
    """The folder that the option ``name`` gives, made if it is not there. Raises UserError where that can't be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{name}={path} can't be made ({e.strerror}): give another folder.") from None
    return path


def options_table() -> str:
    """The Markdown table of all options."""
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name, f in FIELDS.items():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        text = f.metadata["help"]
        if f.metadata["choices"]:
            text += ": " + ", ".join(f.metadata["choices"])
        kind = kind_name(KINDS[name]).replace(" | None", "")
        rows.append(f"| `{name}` | {kind} | {'' if default in (None, '', []) else f'`{default}`'} | {text} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(options_table())
