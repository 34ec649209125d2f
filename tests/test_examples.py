"""Every example with its option ``--tiny``, and the README's, in this process: what they print is checked.

``examples/flux_multi_gpu.py`` runs in tests/diffusion/test_parallel.py, over processes.
"""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.extras import require_extra

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

PRINTS = {
    "features": [r"logits \(1, 10\), the largest is class 0", r"layers\.3: stride 32, \(1, 128, 2, 2\)"],
    "insert_module": [r"ela_b at conv: 4 modules", "0 names unexpected, 12 of the modules missing", "step 2: loss"],
    "attention_maps": [r"blocks\.\d+\.attn: AgentAttention, softmax", "rollout over", "wrote maps.png"],
    "flux_sparse": [r"4 sparse and 0 dense calls, \d+\.\d % of the pairs skipped on 16 x 16 tokens", "wrote flux.png"],
    "clear_high_resolution": [r"Disk\(radius=2.*[1-9]\d* sparse and 0 dense calls.* 16 x 16", "wrote clear.png"],
    "custom_adapter": ["1 sparse and 0 dense calls.* 12 x 10 tokens", "difference of", "equal to the bit: True"],
}
DIFFUSION = ("flux_sparse", "clear_high_resolution", "custom_adapter")


@pytest.mark.parametrize("name", PRINTS)
def test_example(name, tmp_path, monkeypatch, capsys):
    if name in DIFFUSION:
        require_extra("diffusers", "diffusion")
        from visionattn.diffusion import adapters

        monkeypatch.setattr(adapters, "_adapters", dict(adapters._adapters))  # one example registers its own
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for pattern in PRINTS[name]:
        assert re.search(pattern, printed), f"{pattern} is not in:\n{printed}"
    for file in re.findall(r"wrote (\S+)", printed):
        from PIL import Image

        with Image.open(tmp_path / file) as image:
            assert min(image.size) >= 128 and len(set(image.convert("L").tobytes())) > 10


def test_every_example_is_run():
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*PRINTS, "flux_multi_gpu"}


def test_readme_of_diffusers_runs_on_a_cpu():
    """The README's lines as they stand, on a tiny pipeline in place of FLUX, at 256 px in place of 4096."""
    require_extra("diffusers", "diffusion")
    import torch

    import visionattn
    from visionattn.diffusion.tiny import tiny_flux

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "sparsify" in block)
    code = re.sub(r"^.*from_pretrained.*\n", "", code, flags=re.MULTILINE).replace("4096", "256")
    pipe = tiny_flux()
    call = type(pipe).__call__

    def image():
        seed = torch.Generator().manual_seed(0)
        return call(pipe, "a fox", height=64, width=64, num_inference_steps=2, generator=seed, output_type="pt").images

    dense = image()
    names = {"visionattn": visionattn, "pipe": pipe, "prompt": "a lighthouse at dusk"}
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (256, 256)
    assert all(row["sparse"] and not row["dense"] for row in names["handle"].report().rows)
    assert torch.equal(image(), dense)


def test_the_walk_of_the_manual(capsys):
    """The blocks of docs/diffusion.md's walk, one after the other, print what stands below them, but for times."""
    require_extra("diffusers", "diffusion")
    text = (ROOT / "docs" / "diffusion.md").read_text(encoding="utf-8")
    walk = text.partition("## A walk")[2].partition("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```\n(?:\n((?:    [^\n]*\n)+))?", walk, re.DOTALL)
    assert len(found) == 3
    names: dict = {}
    for code, expected in found:
        exec(compile(code, "docs/diffusion.md", "exec"), names)
        printed, shown = (re.sub(r"[\d.]+ ms", "ms", " ".join(t.split())) for t in (capsys.readouterr().out, expected))
        assert shown.removeprefix("... ") in printed and shown, f"{shown}\n is not in\n{printed}"


@pytest.mark.parametrize("page", ["diffusion", "simulate"])
def test_simulations_in_the_manual(page, capsys):
    """Every line that a page shows below ``$ visionattn simulate`` is one that the command prints today."""
    import shlex

    from visionattn.cli import main

    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^    \$ visionattn (simulate .*)\n((?:    [^$\n].*\n)+)", text, re.MULTILINE)
    assert found
    for command, shown in found:
        assert main(shlex.split(command)) == 0
        printed = capsys.readouterr().out.splitlines()
        for line in (line[4:] for line in shown.splitlines() if line.strip() != "..."):
            assert line in printed, f"{command}: {line}"


def test_the_map_of_the_manual_is_whole():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert sorted([*re.findall(r"\]\(([\w-]+\.md)\)", text), "README.md"]) == sorted(
        p.name for p in (ROOT / "docs").glob("*.md")
    )
