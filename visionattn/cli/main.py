"""Arguments to exit status: 0 done, 1 failed, 2 bad input, 130 interrupted. Errors are one line unless ``--debug``."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from . import bench, compare, doctor, maps, models, predict, simulate, weights

GROUPS = (models, weights, doctor, bench, predict, maps, simulate, compare)


class Parser(argparse.ArgumentParser):
    """argparse, with an error that is one line and names the nearest command."""

    def error(self, message: str) -> None:
        if "invalid choice" in message and not message.startswith("argument -"):
            given = message.split("invalid choice: ")[1].split(" (")[0].strip("'\"")
            near = get_close_matches(given, COMMANDS, n=1)
            message = f"no command {given!r}: " + (
                f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            )
        self.exit(2, f"{self.prog}: error: {message}\n")


COMMANDS: list[str] = []


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="visionattn", description="Published vision attention for PyTorch: models, weights, reports.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for group in GROUPS:
        group.add_commands(commands, common)
    COMMANDS[:] = sorted(commands.choices)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    logging.getLogger("timm").setLevel(logging.ERROR)  # what it logs at build time, our errors say in one line
    parser = build_parser()
    try:
        args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    except SystemExit as e:
        return int(e.code or 0)
    if args.version:
        import visionattn

        print(visionattn.__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Runs a parsed command, prints its result, and turns errors into one line and a status."""
    command: Callable[[argparse.Namespace], Any] = args.run
    try:
        result = command(args)
        if args.json:
            print(json.dumps(as_data(result), indent=1, default=str))
        elif result is not None:
            print(result)
        sys.stdout.flush()
        return int(getattr(result, "status", 0))
    except KeyboardInterrupt:
        print(f"visionattn {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `visionattn list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, KeyError) as e:
        if args.debug:
            raise
        print(f"visionattn {args.command}: error: {one_line(e)}", file=sys.stderr)
        return 2 if isinstance(e, ValueError) or named_badly(e) else 1


def named_badly(e: BaseException) -> bool:
    """Whether a file's name was the mistake, not the computer's state."""
    return isinstance(e, FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError)


def one_line(e: BaseException) -> str:
    """An error's first line; a file's error names the file as the user did, not the temporary name beside it."""
    if isinstance(e, OSError) and e.strerror and e.filename:
        path = str(e.filename2 or e.filename)
        path = re.sub(r"(^|/)\.([^/]+)\.\d+\.tmp$", r"\1\2", path)
        return f"{path} can't be used: {e.strerror[0].lower()}{e.strerror[1:]}"
    return next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)


def as_data(result: Any) -> Any:
    return result.as_dict() if hasattr(result, "as_dict") else result
