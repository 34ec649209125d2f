# ruff: noqa: RUF009  (option() makes dataclass fields)
"""Every option of a training run, once: the dataclass below is the YAML schema, the command line and the manual.

Precedence: dataclass defaults < YAML (``--config``) < command line. ``python -m visionattn.training.config`` prints
the table of ``docs/training.md``.
"""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

import yaml

from visionattn._files import atomic_write


class UserError(Exception):
    """Something the user can put right. ``cli.main`` prints it as one line and exits with ``status``."""

    status = 2


class RunError(UserError):
    """A run that was set up well but can't go on (non-finite loss, a lost rank)."""

    status = 1


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field with its help and its allowed range (inclusive; for lists it holds for each element)."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """One run. Sizes are pixels, intervals optimizer updates, times seconds, unless the help says otherwise."""

    # data
    dataset: str = option("", "'' or 'folder' (class folders, or .tar files), 'digits', 'synthetic', or timm's: "
                           "'wds/..', 'hfds/..', 'hfids/..', 'tfds/..', 'torch/cifar10' ..")  # fmt: skip
    data_dir: str = option("", "root of the data set")
    train_split: str = option("train", "split to learn from")
    val_split: str = option("validation", "split to evaluate on")
    class_map: str = option("", "file with one class name a line, instead of the sorted folder names")
    data_kwargs: dict = option({}, "further arguments of timm.data.create_dataset, as key=value")
    num_classes: int | None = option(None, "classes; default: what the data set says, else the model's own", low=1)
    in_chans: int | None = option(None, "image channels (1: grey, 3: RGB); default: the model's own", low=1)
    img_size: int | None = option(None, "side of the input; default: the model's own", low=1)
    mean: list[float] = option([], "normalisation means; default: the model's own")
    std: list[float] = option([], "normalisation deviations; default: the model's own")
    interpolation: str = option("", "resize filter: bilinear, bicubic, random ..; default: the model's own")
    crop_pct: float | None = option(None, "evaluation crop over resized side; default: the model's own", low=0.01)
    workers: int = option(4, "data loading processes a rank; 0 loads in the training process", low=0)
    synthetic_images: int = option(12800, "images in an epoch of the synthetic data", low=1)
    # model
    model: str = option("test_ela", "a name that timm.create_model knows; the zoo's are registered")
    pretrained: bool = option(False, "start from the model's published weights")
    checkpoint: str = option("", "weights to start from, or to validate: .safetensors, or a .pth of tensors only")
    model_kwargs: dict = option({}, "further arguments of timm.create_model, as key=value")
    moh_active: float | None = option(
        None, "visionattn.to_moh: a dense Vision Transformer goes on with this share of its heads", low=0.01, high=1
    )
    drop: float | None = option(None, "dropout before the classifier (drop_rate)", low=0, high=0.99)
    drop_path: float | None = option(None, "stochastic depth (drop_path_rate)", low=0, high=0.99)
    aux_weight: float = option(
        1.0, "factor of the model's own losses, which have their published weight in them", low=0
    )
    # optimizer
    opt: str = option("adamw", "any optimizer of timm.optim")
    lr: float = option(1e-3, "learning rate", low=0)
    momentum: float = option(0.9, "for the optimizers that have one", low=0, high=1)
    weight_decay: float = option(0.0, "weight decay", low=0)
    decay_all: bool = option(False, "decay biases and norms too")
    opt_kwargs: dict = option({}, "further arguments of the optimizer, as key=value")
    layer_decay: float | None = option(None, "factor of the learning rate from each layer to the one before", low=0.01,
                                    high=1)  # fmt: skip
    batch_size: int = option(128, "images in a batch of one rank", low=1)
    grad_accum: int = option(1, "batches that make one update", low=1)
    clip_grad: float | None = option(None, "clip gradients at this value", low=0)
    clip_mode: str = option("norm", "what clip_grad limits", choices=("norm", "value", "agc"))
    # schedule
    epochs: int = option(100, "passes over the data, warm-up included", low=1)
    sched: str = option("cosine", "schedule of timm.scheduler, stepped at every update",
                     choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"))  # fmt: skip
    warmup_epochs: float = option(0, "linear warm-up", low=0)
    warmup_lr: float = option(1e-6, "learning rate at its start", low=0)
    min_lr: float = option(0.0, "lowest learning rate of the schedule", low=0)
    sched_kwargs: dict = option({}, "further arguments of create_scheduler_v2, as key=value (decay_rate=0.97 ..)")
    # loss and augmentation
    loss: str = option("ce", "criterion of timm.loss", choices=("ce", "bce", "asl", "poly"))
    bce_target_thresh: float | None = option(None, "binarise soft targets for bce above this value", low=0, high=1)
    smoothing: float = option(0.0, "label smoothing", low=0, high=0.99)
    crop_mode: str = option("rrc", "training crop: random resized; keep-ratio centre or random; resize, pad and crop",
                         choices=("rrc", "rkrc", "rkrr", "pad"))  # fmt: skip
    crop_pad: int = option(4, "border that crop_mode pad adds on each side", low=0)
    scale: list[float] = option([0.08, 1.0], "area range of the random resized crop", low=0.001, high=4)
    ratio: list[float] = option([0.75, 1.3333], "aspect range of the random resized crop", low=0.01, high=100)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    vflip: float = option(0.0, "probability of a vertical flip", low=0, high=1)
    color_jitter: float = option(0.0, "colour jitter; off where auto_augment is on", low=0)
    auto_augment: str = option("", "timm's string: rand-m9-mstd0.5-inc1, original, augmix-m3-w3 ..")
    aug_repeats: int = option(1, "repeated augmentation: copies of an image in an epoch", low=1)
    random_erasing: float = option(0.0, "probability of random erasing", low=0, high=1)
    erasing_mode: str = option("pixel", "what random erasing writes", choices=("const", "rand", "pixel"))
    mixup: float = option(0.0, "mixup alpha", low=0)
    cutmix: float = option(0.0, "cutmix alpha", low=0)
    mixup_prob: float = option(1.0, "probability of either", low=0, high=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", low=0, high=1)
    mixup_mode: str = option("batch", "one draw for each", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = option(0, "no mixup nor cutmix from this epoch on; 0: never off", low=0)
    # averaging and distillation
    ema: bool = option(False, "evaluate and keep an exponential moving average of the weights")
    ema_decay: float = option(0.9998, "its decay an update", low=0, high=1)
    ema_warmup: bool = option(False, "let the decay rise from 0")
    teacher: str = option("", "distil from this timm model (pretrained, or teacher_checkpoint)")
    teacher_checkpoint: str = option("", "the teacher's weights")
    distill: str = option("logit", "what the student learns from it", choices=("logit", "feature", "token"))
    distill_weight: float = option(1.0, "weight of the distillation loss", low=0)
    task_weight: float = option(1.0, "weight of the label's loss beside it", low=0)
    temperature: float = option(1.0, "softmax temperature of logit and token distillation", low=0.01)
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ..")
    amp: str = option("none", "automatic mixed precision; fp16 scales the loss", choices=("none", "bf16", "fp16"))
    channels_last: bool = option(False, "NHWC memory layout")
    compile: bool = option(False, "torch.compile the model")
    compile_mode: str = option("", "torch.compile's mode: max-autotune ..")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass")
    threads: int = option(0, "CPU threads of a process; 0: torch's choice", low=0)
    fsdp: bool = option(False, "shard weights and optimizer over the ranks (FSDP2) instead of copying them (DDP)")
    sync_bn: bool = option(False, "BatchNorm over the batches of all ranks (CUDA only)")
    dist_bn: str = option("reduce", "BatchNorm statistics before each evaluation: mean of the ranks, or rank 0's",
                       choices=("reduce", "broadcast", "none"))  # fmt: skip
    dist_timeout: int = option(600, "seconds a rank waits for the others before it gives up", low=1)
    # run
    output: str = option("runs", "where run folders are made")
    seed: int = option(42, "of weights, order and augmentation", low=0)
    log_interval: int = option(50, "updates between progress lines, and between checks of the loss", low=1)
    save_interval: int = option(0, "updates between checkpoints within an epoch; 0: only at its end", low=0)
    eval_interval: int = option(1, "epochs between evaluations (the last epoch is always evaluated)", low=1)
    val_batch_size: int | None = option(None, "default: batch_size", low=1)
    stop_step: int = option(0, "save and stop after this update, as SIGTERM would; 0: train to the end", low=0)
    tensorboard: bool = option(False, "write TensorBoard events into the run folder")
    wandb: bool = option(False, "log to Weights & Biases")
    resume: str = option("", "a run folder or a .state.pt file; auto: newest run of the same model, if any")
    validate: str = option("", "evaluate this MODEL.TAG with its own transform, train nothing, write nothing")


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
KINDS = typing.get_type_hints(Config)
# What a run is not repeated by: these stay out of config.yaml.
COMMANDS = ("resume", "validate", "stop_step")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the known name closest to the given one, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _scalar(text: Any) -> Any:
    """YAML's reading of a command line word, with the floats that YAML 1.1 misses (3e-4)."""
    if not isinstance(text, str):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return [_scalar(v) for v in value] if isinstance(value, list) else value


def _number(kind: type, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError
    # int('..') rather than int(float('..')): a 60-bit seed keeps its digits
    return (int(value) if not isinstance(value, str) or value.lstrip("+-").isdigit() else int(number)) \
        if kind is int else number  # fmt: skip


def _pairs(value: Any) -> dict:
    if isinstance(value, dict):
        return {k: _scalar(v) for k, v in value.items()}
    pairs = [str(v).split("=", 1) for v in (value if isinstance(value, list) else [value])]
    if any(len(p) != 2 for p in pairs):
        raise ValueError
    return {k: _scalar(v) for k, v in pairs}


def _convert(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None or value in ("none", "null", "") else _convert(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
        return [_convert(typing.get_args(kind)[0], v) for v in items]
    if kind is dict:
        return _pairs({} if value is None else value)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return value if isinstance(value, bool) else words[str(value).lower()]
    if kind is str:
        if isinstance(value, dict | list):
            raise ValueError
        return "" if value is None else str(value)
    return _number(kind, value)


def kind_name(kind: Any) -> str:
    """The type as the messages and the manual name it."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def coerce(name: str, value: Any, where: str = "") -> Any:
    """The value of option ``name`` in its type and range. Raises UserError."""
    if name not in FIELDS:
        raise UserError(f"{where}unknown option '{name}'.{nearest(name, FIELDS)} docs/training.md lists them all.")
    kind, meta = KINDS[name], FIELDS[name].metadata
    shown = where + (name.replace("_", "-") if where == "--" else name)  # as it was written
    try:
        result = _convert(kind, value)
    except (ValueError, KeyError, TypeError, OverflowError):
        form = "key=value pairs" if kind is dict else kind_name(kind)
        raise UserError(f"{shown}={value!r} is not of type {form}; {meta['help']}.") from None
    for item in result if isinstance(result, list) else [result]:
        if meta["choices"] and item not in meta["choices"]:
            raise UserError(f"{shown}={item!r} is not one of {', '.join(meta['choices'])}."
                            f"{nearest(str(item), meta['choices'])}")  # fmt: skip
        low, high = meta["low"], meta["high"]
        if isinstance(item, int | float) and ((low is not None and item < low) or (high is not None and item > high)):
            allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
            raise UserError(f"{shown}={item!r} is out of range: it must be {allowed}.")
    return result


def _cross_check(cfg: Config) -> Config:
    """Combinations that no single option can refuse."""
    rules = [
        (len(cfg.scale) != 2 or cfg.scale[0] > cfg.scale[-1], f"scale={cfg.scale} must be two numbers, low then high"),
        (len(cfg.ratio) != 2 or cfg.ratio[0] > cfg.ratio[-1], f"ratio={cfg.ratio} must be two numbers, low then high"),
        (bool(cfg.mixup or cfg.cutmix) and cfg.batch_size % 2, f"mixup and cutmix pair images: batch_size="
         f"{cfg.batch_size} must be even"),
        (cfg.loss == "asl" and (cfg.mixup or cfg.cutmix), "loss=asl takes class labels: switch mixup and cutmix off"),
        (cfg.warmup_epochs > cfg.epochs, f"warmup_epochs={cfg.warmup_epochs} exceeds epochs={cfg.epochs}"),
        (cfg.fsdp and cfg.amp == "fp16", "fsdp runs with amp=bf16 or none: loss scaling is not sharded"),
        (cfg.fsdp and cfg.teacher and cfg.distill != "logit", f"fsdp distils logits only, distill={cfg.distill} given"),
        (cfg.teacher_checkpoint and not cfg.teacher, "teacher_checkpoint needs teacher=<model name>"),
    ]  # fmt: skip
    for broken, message in rules:
        if broken:
            raise UserError(message + ".")
    return cfg


def make(values: dict[str, Any], where: str = "") -> Config:
    """A checked Config out of plain values. Raises UserError that names the bad one."""
    return _cross_check(Config(**{k: coerce(k, v, where) for k, v in values.items()}))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, checked one by one. Raises UserError."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(p.stem for p in recipes_dir().glob("*.yaml"))
        raise UserError(f"config file {path} does not exist. Give a path, or a recipe that ships: "
                        f"{', '.join(known)}.{nearest(path.stem, known)}") from None  # fmt: skip
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"config file {path} is not readable YAML: {' '.join(str(e).split())}.") from None
    if not isinstance(data, dict | None):
        raise UserError(f"config file {path} holds a {type(data).__name__}; it must hold 'option: value' lines.")
    return {k: coerce(str(k), v, f"{path}: ") for k, v in (data or {}).items()}


def recipes_dir() -> Path:
    """Where the recipes stand: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs" / "train"
    return installed if installed.is_dir() else package.parent / "configs" / "train"


def find_config(name: str) -> Path:
    """A YAML path as given, or a recipe that ships by its bare name."""
    recipe = recipes_dir() / f"{name}.yaml"
    return recipe if not Path(name).exists() and recipe.is_file() else Path(name)


def save(cfg: Config, path: Path, comment: str) -> None:
    """Write every option but the commands: ``--config`` of this file repeats the run."""
    values = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in COMMANDS}
    text = "".join(f"# {line}\n" for line in comment.splitlines())
    text += yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    atomic_write(path, text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. --help lists the options.")


def parser() -> argparse.ArgumentParser:
    """The command line, generated from Config."""
    p = _Parser(prog="train.py", allow_abbrev=False, description="Train or validate an image classifier.",
                epilog="With no data set named, the digits recipe is the base.")  # fmt: skip
    p.add_argument("-c", "--config", default="", help="YAML file, or the name of a recipe that ships")
    for name, f in FIELDS.items():
        args: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f.metadata["help"].replace("%", "%%")}
        if KINDS[name] is bool:
            args["action"] = argparse.BooleanOptionalAction
        elif KINDS[name] is dict or typing.get_origin(KINDS[name]) is list:
            args.update(nargs="+", metavar="KEY=VALUE" if KINDS[name] is dict else "X")
        else:
            args["metavar"] = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else "X"
        p.add_argument("--" + name.replace("_", "-"), **args)
    return p


def parse(argv: list[str]) -> tuple[Config, dict[str, Any]]:
    """(config, what the command line and --config set explicitly). Raises UserError; --help exits."""
    args, rest = parser().parse_known_args(argv)
    if rest:
        word = rest[0].split("=")[0]
        known = ["--" + n.replace("_", "-") for n in FIELDS] + ["--config"]
        raise UserError(f"unknown argument '{rest[0]}'.{nearest(word, known)} --help lists them.")
    given = vars(args)
    path = given.pop("config")
    explicit = {k: coerce(k, v, "--") for k, v in given.items()}
    if path:
        explicit = read_yaml(find_config(path)) | explicit
    base = {} if path or explicit.get("dataset") or explicit.get("data_dir") else read_yaml(find_config("digits"))
    return make(base | explicit), explicit


def options_table() -> str:
    """The Markdown table of all options."""
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name, f in FIELDS.items():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        text = f.metadata["help"].replace("|", "\\|")
        if f.metadata["choices"]:
            text += ": " + ", ".join(f.metadata["choices"])
        kind = kind_name(KINDS[name]).replace(" | None", "")
        rows.append(f"| `{name}` | {kind} | {'' if default in (None, '', [], {}) else f'`{default}`'} | {text} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(options_table())
