"""``python -m tests.conformance.run``: timm's own tests over the models of the zoo. See docs/conformance.md."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

from . import selection
from .fetch import FetchError, fetch

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.run", description=__doc__)
    parser.add_argument("--all-models", action="store_true", help="every registered name (VISIONATTN_CONFORMANCE=all)")
    parser.add_argument("--models", default="", help="these names only, with commas between")
    parser.add_argument("--module", default="visionattn", help="the module whose import registers the models")
    parser.add_argument("--summary", type=Path, help="write the summary to this file too")
    parser.add_argument("--jobs", default="auto", help="processes, as pytest-xdist's -n (0: none)")
    parser.add_argument("--show", action="store_true", help="print the names that would run, and stop")
    args, pytest_args = parser.parse_known_args(argv)

    importlib.import_module(args.module)
    if args.models:
        names = args.models.split(",")
    elif args.all_models or selection.everything():
        names = selection.ours()
    else:
        names = selection.smallest()
    if args.show:
        print("\n".join(names))
        return 0
    try:
        tests = fetch()
    except FetchError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2

    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "VISIONATTN_CONFORMANCE_MODELS": ",".join(names),
        "VISIONATTN_CONFORMANCE_IMPORT": args.module,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("GITHUB_ACTIONS", None)  # there, timm's file leaves tests out for the sake of small runners
    environment.pop("VISIONATTN_CONFORMANCE_SUMMARY", None)
    if args.summary:
        args.summary.parent.mkdir(parents=True, exist_ok=True)
        environment["VISIONATTN_CONFORMANCE_SUMMARY"] = str(args.summary.resolve())
    command = [sys.executable, "-m", "pytest", "-c", str(Path(__file__).with_name("timm_suite.ini"))]
    command += ["--rootdir", str(tests), "-n", args.jobs, "--dist", "worksteal", *pytest_args, "test_models.py"]
    return subprocess.run(command, cwd=tests, env=environment, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    raise SystemExit(main())
