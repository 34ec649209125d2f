"""CLEAR's distillation: losses, what is trained, resume, shards, output, cache, bad input."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

from diffusers import FluxPipeline  # noqa: E402

from visionattn._files import atomic_write, lock  # noqa: E402
from visionattn.diffusion import Disk, load_clear, sparsify  # noqa: E402
from visionattn.diffusion.distill import Cache, Distiller, RunError, UserError, make, write_header, write_sample  # noqa: E402
from visionattn.diffusion.distill import __main__ as command  # noqa: E402
from visionattn.diffusion.distill.cache import read_items  # noqa: E402
from visionattn.diffusion.distill.config import options_table, read_yaml  # noqa: E402

from . import pipelines, tiny  # noqa: E402

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


def test_a_signal_saves_and_a_failed_write_leaves_the_old_file(world, tmp_path, monkeypatch, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    progress = Distiller._progress
    interrupt = lambda self, say: self.step == 2 and os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(Distiller, "_progress", interrupt)
    config = write_config(tmp_path / "c.yaml", dict(world, output=tmp_path / "run"))
    assert run_command("--config", config) == 0
    assert states(tmp_path / "run")["step"] == 2 and "stopped at update 2" in capsys.readouterr().out
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.setattr(Distiller, "_progress", progress)
    with lock(tmp_path / "run", ValueError, ""):
        assert run_command("--config", config) == 2
    assert "in use" in capsys.readouterr().err
    assert run_command("--config", config) == 0 and states(tmp_path / "run")["step"] == 4

    def fails(f):
        f.write(b"half")
        raise KeyboardInterrupt

    file = tmp_path / "run" / "history.csv"
    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        atomic_write(file, fails)
    assert file.read_bytes() == before and before.startswith(b"step,loss,flow,output,attention\n")
    assert {p.name for p in file.parent.iterdir()} == {".lock", "config.yaml", "history.csv", "state.pt",
                                                       "clear_local_2.safetensors"}  # fmt: skip


# Imports once, then runs each command with as many forked ranks as it asks for, as torchrun would start them.
LAUNCH = """
import os, shlex, sys
import torch
torch.set_num_threads(1)
from visionattn.diffusion.distill import __main__ as command, engine, sampling
for port, line in zip(sys.argv[1].split(","), sys.argv[2:], strict=True):
    size, words = line.split(" ", 1)
    ranks = []
    for rank in range(int(size)):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=port)
            status = 70
            try:
                status = command.main(shlex.split(words))
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(status)
        ranks.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in ranks]
    if any(statuses):
        sys.exit(f"statuses {statuses}")
"""


def free_ports(count: int) -> str:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = ",".join(str(s.getsockname()[1]) for s in sockets)
    for s in sockets:
        s.close()
    return ports


def test_two_sharded_ranks_are_one_process_with_twice_the_batch(world, tmp_path):
    options = dict(world, downsample=2, steps=4, grad_accum=2, samples=1, sample_steps=1, clip_grad=0.5)
    config = write_config(tmp_path / "c.yaml", options)
    one, mixed, half = (tmp_path / n for n in ("one", "mixed", "half"))
    # one process, then two ranks that go on with its state, then one process that goes on with theirs
    assert run_command("--config", config, "batch_size=2", f"output={mixed}", "stop_step=1") == 0
    sharded = f"2 --config {config} fsdp=true batch_size=1"
    commands = [f"{sharded} output={mixed} stop_step=3 sample_interval=2",
                f"{sharded} output={half} steps=1 dtype=bfloat16"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", LAUNCH, free_ports(2), *commands], cwd=ROOT, capture_output=True,
                          text=True, timeout=560)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(mixed)["step"] == 3 and (mixed / "samples" / "000002.png").is_file()
    for folder in (one, mixed):
        assert run_command("--config", config, f"output={folder}", "batch_size=2") == 0
    expected, found = states(one), states(mixed)
    assert found["step"] == 4 and found["seen"] == 16 and len(found["history"]) == 4
    for a, b in zip(expected["history"], found["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, value in expected["trained"].items():
        if "to_k.bias" not in name:  # its gradient is rounding: a bias of all keys moves all logits alike
            torch.testing.assert_close(found["trained"][name], value, rtol=0, atol=1e-4, msg=name)
    restart = ("--restart", "batch_size=2", "steps=1", "dtype=bfloat16")
    assert run_command("--config", config, f"output={one}", *restart) == 0
    assert states(half)["history"][0] == pytest.approx(states(one)["history"][0], rel=2e-2)
    assert all(v.dtype == torch.float32 for v in states(half)["trained"].values())
    assert all(v.dtype == torch.bfloat16 for v in load_file(half / "clear_local_2_down_2.safetensors").values())


def test_what_is_not_finite_is_not_saved(world, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", dict(world, output=tmp_path / "run"))
    assert run_command("--config", config, "stop_step=1") == 0
    before = (tmp_path / "run" / "state.pt").read_bytes()
    assert run_command("--config", config, "--restart", "lr=1e30") == 1
    assert "error: the loss is" in capsys.readouterr().err
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    d = distiller(world)
    next(iter(d.pair.trained().values())).data[0] = torch.nan
    with pytest.raises(RunError, match="weights are not finite"):
        d.save(tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


@pytest.mark.gpu
def test_a_gpu_takes_the_same_step(world):
    for dtype, rel in (("float32", 1e-3), ("bfloat16", 0.1)):
        found = []
        for device in ("cpu", "cuda"):
            d = distiller(world, device=device, dtype=dtype, batch_size=2, steps=2, downsample=2)
            d.fit(None, say=lambda line: None)
            found.append(d.history)
        for a, b in zip(*found, strict=True):
            assert a == pytest.approx(b, rel=rel)


def test_the_manual_has_every_option():
    assert options_table() in (ROOT / "docs" / "distill.md").read_text()


def test_cache_from_a_pipeline_and_sample_pictures(tmp_path, capsys):
    pipe = pipelines.flux(tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    folder = tmp_path / "pictures"
    folder.mkdir()
    images = []
    for i, (prompt, size) in enumerate([("a red fox", (70, 48)), ("the cat in snow", (32, 90)), ("a cat", (48, 64))]):
        pixels = (tiny.noise(size[1], size[0], 3, seed=i) * 60 + 128).clamp(0, 255).to(torch.uint8)
        images.append(Image.fromarray(pixels.numpy()))
        images[-1].save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(prompt + "\n")
    options = dict(
        PLAIN, radius=1, model=tmp_path / "pipe", cache=tmp_path / "cache", images=folder, height=64, width=48,
        max_sequence_length=6, output=tmp_path / "run", steps=1, sample_interval=1, samples=2, sample_steps=2,
        loss_layers="single_transformer_blocks.0.attn",
    )  # fmt: skip
    config = write_config(tmp_path / "c.yaml", options)
    assert run_command("--config", config) == 2 and "--build-cache" in capsys.readouterr().err
    assert run_command("--config", config, "--build-cache") == 0
    assert "3 samples written" in capsys.readouterr().out
    (tmp_path / "cache" / "00000001.safetensors").unlink()
    assert run_command("--config", config) == 2 and "holds 2 of 3" in capsys.readouterr().err
    assert run_command("--config", config, "--build-cache") == 0
    assert "1 samples written" in capsys.readouterr().out

    cache = Cache(str(tmp_path / "cache"))
    assert (len(cache), cache.scaling, cache.shift) == (3, 0.5, 0.1)
    embeds, pooled, _ = pipe.encode_prompt("the cat in snow", None, max_sequence_length=6)
    sample = cache.sample(1)
    torch.testing.assert_close(sample["prompt_embeds"], embeds[0].detach())
    torch.testing.assert_close(sample["pooled_prompt_embeds"], pooled[0].detach())
    with torch.no_grad():
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(images[2])).latent_dist
    torch.testing.assert_close(cache.sample(2)["mean"], posterior.mean[0])
    torch.testing.assert_close(cache.sample(2)["std"], posterior.std[0])

    assert run_command("--config", config) == 0
    pictures = sorted((tmp_path / "run" / "samples").iterdir())
    assert [p.name for p in pictures] == ["000000.png", "000001.png"]
    sheet = Image.open(pictures[1])
    assert sheet.size == (2 * 50, 2 * 66)
    # the teacher's row is what the pipeline itself makes of the cached prompt
    noise = torch.randn(2, 1, 8, 6, generator=torch.Generator().manual_seed(0))
    both = torch.stack([cache.sample(i)["prompt_embeds"] for i in (0, 1)])
    made = pipe(prompt_embeds=both, pooled_prompt_embeds=torch.stack([cache.sample(i)["pooled_prompt_embeds"]
                for i in (0, 1)]), latents=FluxPipeline._pack_latents(noise, 2, 1, 8, 6), height=64, width=48,
                num_inference_steps=2, guidance_scale=3.5, output_type="pil").images  # fmt: skip
    row = torch.tensor(list(sheet.crop((1, 1, 49, 65)).tobytes())).int()
    assert (row - torch.tensor(list(made[0].tobytes())).int()).abs().max() <= 2


def test_items_of_lists(tmp_path):
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "l.jsonl").write_text(
        '{"image": "b.jpg", "prompt": "two, words"}\n\n{"image": "a.png", "prompt": "x"}\n'
    )
    (tmp_path / "l.csv").write_text('prompt,image\n"two, words",b.jpg\nx,a.png\n')
    expected = [(tmp_path / "b.jpg", "two, words"), (tmp_path / "a.png", "x")]
    assert read_items(str(tmp_path / "l.jsonl")) == read_items(str(tmp_path / "l.csv")) == expected
    (tmp_path / "a.json").write_text('{"prompt": "x"}')
    with pytest.raises(UserError, match=r"b\.jpg has no prompt"):
        read_items(str(tmp_path))
    (tmp_path / "l.csv").write_text("text,image\nx,a.png\n")
    with pytest.raises(UserError, match="no list of image and prompt"):
        read_items(str(tmp_path / "l.csv"))
    (tmp_path / "l.jsonl").write_text('{"image": "c.png", "prompt": "x"}\n')
    with pytest.raises(UserError, match=r"1 of 1 pictures.*c\.png"):
        read_items(str(tmp_path / "l.jsonl"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(raduis=3), "Did you mean 'radius'"),
        (dict(radius="big"), "radius='big' is not of type int"),
        (dict(radius=0), "at least 1"),
        (dict(optimizer="adam"), "adamw, prodigy"),
        (dict(cache=""), "cache= is not given"),
        (dict(output=""), "output= is not given"),
        (dict(flow_weight=0, output_weight=0, attention_weight=0), "all three"),
        (dict(model="/nowhere"), "no FLUX.1 transformer can be loaded"),
        (dict(layers="5"), "this model has 0 to 2"),
        (dict(loss_layers="blocks.*"), "matches none"),
        (dict(radius=20), "whole grid"),
        (dict(downsample=3), "downsample=3"),
        (dict(fsdp="true"), "torchrun"),
        (dict(device="cuda:99"), "cuda:99"),
        (dict(device="gpu"), "no device"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, capsys, options, message):
    if options.get("device") == "cuda:99" and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    config = write_config(tmp_path / "c.yaml", {**world, "output": tmp_path / "run", **options})
    assert run_command("--config", config) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run" / "state.pt").exists()


def test_recipes_that_ship_are_valid():
    recipes = list((ROOT / "configs" / "diffusion").glob("*.yaml"))
    assert any(p.stem == "clear_flux" for p in recipes)
    for recipe in recipes:
        make(read_yaml(recipe.stem))
