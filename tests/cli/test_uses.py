"""Every command as a user calls it: its help, and one real use, each in a process of its own.

One interpreter imports the packages and forks for each call: a process a call, without seconds of imports for each.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.extras import require_extra
from visionattn.cli.main import build_parser

FORKS = """
import json, os, sys
import torch, timm, visionattn
from visionattn.cli.main import main

torch.set_num_threads(1)
results = []
for number, argv in enumerate(json.loads(sys.argv[1])):
    name = f"call{number}"
    sys.stdout.flush()
    child = os.fork()
    if not child:
        for stream, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
        code = 70
        try:
            sys.argv = ["visionattn", *argv]
            code = main()
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append((status, open(f"{name}.out").read(), open(f"{name}.err").read()))
print(json.dumps(results))
"""

# (command, what its JSON has); FILE and FOLDER are made by the fixture
USES = {
    "list": (["list", "test_*"], lambda r: any(row["name"] == "test_ela" and row["weights"] for row in r)),
    "info": (["info", "test_ela"], lambda r: r["parameters"] > 0 and r["MACs"] > 0),
    "card": (["card", "test_ela.digits"], lambda r: "pretrained=True" in r),
    "doctor": (["doctor"], lambda r: r["torch"] == torch.__version__),
    "bench": (
        ["bench", "test_ela", "--sizes", "32", "--batches", "1", "--seconds", "0.01", "--out", "bench.csv"],
        lambda r: r[0]["images_per_s"] > 0,
    ),
    "predict": (
        ["predict", "test_ela.digits", "--sample", "digit-7"],
        lambda r: len(r["images"][0]["classes"]) == 5,
    ),
    "maps": (
        ["maps", "test_agent_deit.digits", "--sample", "digit-7", "--draw", "overlay"],
        lambda r: r["layers"] and r["pictures"]["overlay"],
    ),
    "simulate": (["simulate", "disk:16", "--size", "512"], lambda r: r),
    "compare": (
        ["compare", "disk:2", "--tiny", "--height", "64", "--width", "64", "--steps", "1", "--no-warmup", "--out", "x"],
        lambda r: r,
    ),
    "weights list": (["weights", "list", "*.digits"], lambda r: all(row["hash"] == "manifest" for row in r)),
    "weights fetch": (["weights", "fetch", "test_ela.digits"], lambda r: "test_ela.digits" in r["file"]),
    "weights verify": (["weights", "verify", "FILE"], lambda r: r["hash"] == "as the manifest says"),
    "weights convert": (
        ["weights", "convert", "FILE", "--to", "test_ela.digits", "--out", "converted"],
        lambda r: not r["dropped"] and r["out"],
    ),
    "weights trust": (["weights", "trust", "FILE"], lambda r: r["recorded in"]),
}  # fmt: skip


def commands() -> list[str]:
    (choices,) = (a.choices for a in build_parser()._subparsers._group_actions)
    names = []
    for name, sub in choices.items():
        nested = [a.choices for a in (sub._subparsers._group_actions if sub._subparsers else [])]
        names += [f"{name} {action}" for action in nested[0]] if nested else [name]
    return names


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from visionattn.checkpoints import fetch

    require_extra("diffusers", "diffusion")  # of compare
    folder = tmp_path_factory.mktemp("uses")
    file = str(fetch("test_ela.digits"))
    calls = [[*name.split(), "--help"] for name in commands()]
    calls += [[file if word == "FILE" else word for word in USES[name][0]] + ["--json"] for name in commands()]
    environment = {**os.environ, "VISIONATTN_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, json.dumps(calls)],
        capture_output=True, text=True, cwd=folder, env=environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    half = len(found) // 2
    return {name: (found[i], found[half + i]) for i, name in enumerate(commands())}


def test_every_command_has_a_use():
    assert set(USES) == set(commands()), "give a new command its line in USES"


@pytest.mark.parametrize("name", commands())
def test_help_and_use(results, name):
    (status, out, err), use = results[name]
    assert status == 0 and out.startswith(f"usage: visionattn {name}") and "--json" in out, err
    status, out, err = use
    assert status == 0, err
    assert USES[name][1](json.loads(out))
