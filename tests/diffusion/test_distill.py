"""CLEAR's distillation: losses, what is trained, resume, shards, output, cache, bad input."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

from visionattn.diffusion import Disk, load_clear, sparsify  # noqa: E402
from visionattn.diffusion.distill import Distiller, UserError, make, write_header, write_sample  # noqa: E402
from visionattn.diffusion.distill import __main__ as command  # noqa: E402

from . import tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16  # latents; 8 x 8 tokens
PLAIN = dict(radius=2, device="cpu", dtype="float32", steps=4, sample_interval=0, log_interval=1, lr=1e-3, threads=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    """A folder with a tiny transformer and a cache of six samples, as options."""
    folder = tmp_path_factory.mktemp("distill")
    tiny.randomise(tiny._flux()).save_pretrained(folder / "model" / "transformer")
    cache = folder / "cache"
    cache.mkdir()
    write_header(cache, 6, scaling=0.5, shift=0.1, pixels=True, scale_factor=1)
    for i in range(6):
        tensors = {"mean": tiny.noise(1, SIZE, SIZE, seed=i), "std": tiny.noise(1, SIZE, SIZE, seed=9).abs() * 0.1}
        write_sample(cache, i, {**tensors, "prompt_embeds": tiny.noise(4, 12, seed=i),
                                "pooled_prompt_embeds": tiny.noise(8, seed=i)})  # fmt: skip
    return dict(PLAIN, model=str(folder / "model"), cache=str(cache))


def distiller(world: dict, **options) -> Distiller:
    return Distiller(make({**world, **options}))


def test_losses_are_the_published_ones(world):
    d = distiller(world, flow_weight=2.0, output_weight=0.25, attention_weight=3.0, loss_layers=["0", "2"])
    call, target = d.flow.batch([d.cache.sample(0), d.cache.sample(3)], [0, 1])
    found = d.losses(call, target)

    model = tiny.randomise(tiny._flux())
    outputs: dict[int, list] = {0: [], 2: []}
    for number, block in ((0, model.transformer_blocks[0]), (2, model.single_transformer_blocks[1])):
        block.attn.register_forward_hook(
            lambda m, a, out, n=number: outputs[n].append(torch.cat([out[1], out[0]], 1) if type(out) is tuple else out)
        )
    dense = tiny.run(model, call)
    with sparsify(model, Disk(2)):
        sparse = tiny.run(model, call)
    attention = sum(F.mse_loss(*pair) for pair in outputs.values()) / 2
    flow, output = F.mse_loss(sparse, target), F.mse_loss(sparse, dense)
    expected = {"flow": flow, "output": output, "attention": attention}
    expected["loss"] = 2.0 * flow + 0.25 * output + 3.0 * attention
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-5, atol=1e-6)
    assert output > 1e-4 and attention > 1e-4


def test_the_noised_sample_and_its_target(world):
    d = distiller(world)
    call, target = d.flow.batch([d.cache.sample(2)], [5])
    t = call["timestep"][:, None, None]
    assert 0 <= t < 1 and call["guidance"].item() == 3.5
    clean = call["hidden_states"] - t * target  # x_t - t (noise - x0) = x0
    from diffusers import FluxPipeline

    latent = (d.cache.sample(2)["mean"][None] - 0.1) * 0.5
    packed = FluxPipeline._pack_latents(latent, 1, 1, SIZE, SIZE)
    assert 0 < (clean - packed).abs().max() < 0.5 * 0.1 * 3 * 6  # the VAE's own noise, scaled
    ids = FluxPipeline._prepare_latent_image_ids(1, SIZE // 2, SIZE // 2, "cpu", torch.float32)
    assert torch.equal(call["img_ids"], ids)
    again, _ = d.flow.batch([d.cache.sample(2)], [5])
    other, _ = d.flow.batch([d.cache.sample(2)], [6])
    assert torch.equal(again["hidden_states"], call["hidden_states"]) and other["timestep"] != call["timestep"]


@pytest.mark.parametrize("downsample", [None, 2])
def test_only_the_projections_learn(world, downsample):
    d = distiller(world, downsample=downsample, batch_size=2, steps=12, flow_weight=0.0, lr=3e-3)
    before = {n: p.detach().clone() for n, p in d.pair.student.named_parameters()}
    d.fit(None, say=lambda line: None)
    grads = {n for n, p in d.pair.student.named_parameters() if p.requires_grad}
    expected = {f"transformer_blocks.0.attn.{p}.{k}" for p in ("to_q", "to_k", "to_v", "to_out.0")
                for k in ("weight", "bias")}  # fmt: skip
    expected |= {f"single_transformer_blocks.{i}.attn.{p}.{k}" for i in (0, 1) for p in ("to_q", "to_k", "to_v")
                 for k in ("weight", "bias")}  # fmt: skip
    assert grads == expected
    changed = {n for n, p in d.pair.student.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= expected and len(changed) >= len(expected) - 3  # a key bias moves all logits alike
    model = tiny.randomise(tiny._flux())
    assert all(torch.equal(p, q) for p, q in zip(d.pair.teacher.parameters(), model.parameters(), strict=True))
    assert not any(p.requires_grad for p in d.pair.teacher.parameters())
    shared = dict(d.pair.teacher.named_parameters())
    assert all((p is shared[n]) != (n in expected) for n, p in d.pair.student.named_parameters())
    first, last = d.history[0]["loss"], sum(row["loss"] for row in d.history[-3:]) / 3
    assert last < 0.9 * first, (first, last)
    if downsample:
        assert len(d.pair.pooling) == 3
        assert all(not torch.equal(w, torch.full((2, 2), 0.25)) for w in d.pair.pooling.values())


def test_checkpointing_changes_nothing(world):
    results = []
    for checkpointing in (False, True):
        d = distiller(world, gradient_checkpointing=checkpointing, downsample=2)
        assert d.pair.student.gradient_checkpointing is checkpointing and not d.pair.teacher.gradient_checkpointing
        d.losses(*d.flow.batch([d.cache.sample(1)], [0]))["loss"].backward()
        results.append({n: p.grad for n, p in d.pair.trained().items()})
    assert all(g is not None for g in results[0].values())
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], rtol=1e-6, atol=1e-7)


def run_command(*words: str) -> int:
    return command.main([str(w) for w in words])


def write_config(path: Path, options: dict) -> Path:
    path.write_text("".join(f"{k}: {v}\n" for k, v in options.items()))
    return path


def states(folder: Path) -> dict:
    return torch.load(folder / "state.pt", weights_only=True)


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}.{name}").items()}
    if isinstance(tree, list):
        return {k: v for i, part in enumerate(tree) for k, v in flat(part, f"{prefix}.{i}").items()}
    return {prefix: tree}


def test_resume_is_bit_for_bit_and_the_output_loads(world, tmp_path, capsys):
    options = dict(world, downsample=2, batch_size=2, grad_accum=2, steps=5, save_interval=3, sample_interval=4,
                   samples=2, sample_steps=2, warmup_steps=3, width=SIZE)  # fmt: skip
    options["cache"] = world["cache"]
    config = write_config(tmp_path / "c.yaml", options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_command("--config", config, f"output={whole}", "sample_interval=0") == 0
    assert run_command("--config", config, f"output={parts}", "stop_step=2", "sample_interval=0") == 0
    assert states(parts)["step"] == 2 and states(parts)["seen"] == 8
    assert run_command("--config", config, f"output={parts}", "sample_interval=0") == 0
    a, b = (flat({k: states(f)[k] for k in ("trained", "optimizer", "step", "seen")}) for f in (whole, parts))
    assert a.keys() == b.keys() and a[".step"] == 5
    assert all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())
    assert "going on after update 2" in capsys.readouterr().out
    assert run_command("--config", config, f"output={parts}", "lr=1") == 2
    assert "lr=0.001" in capsys.readouterr().err

    file = parts / "clear_local_2_down_2.safetensors"
    d = distiller(options, steps=5)
    d.load(parts / "state.pt")
    call, _ = d.flow.batch([d.cache.sample(0)], [0])
    model = tiny.randomise(tiny._flux())
    dense = tiny.run(model, call)
    with load_clear(model, file) as handle:
        loaded = tiny.run(model, call)
        assert all(row["sparse"] and not row["dense"] for row in handle.report().rows)
    torch.testing.assert_close(loaded, tiny.run(d.pair.student, call), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded, dense, rtol=1e-2, atol=1e-2)
    assert torch.equal(tiny.run(model, call), dense)
    assert not list(parts.glob(".*.tmp"))
