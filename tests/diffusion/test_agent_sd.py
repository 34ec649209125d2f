"""AgentSD: the recorded blocks, the formulas, the schedule, and a whole Stable Diffusion pipeline on a CPU."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.extras import require_extra

require_extra("diffusers", "diffusion")

from diffusers import UNet2DConditionModel  # noqa: E402
from diffusers.models.attention import BasicTransformerBlock  # noqa: E402

import visionattn  # noqa: E402
from tests.fixtures import fixtures  # noqa: E402
from visionattn.diffusion.agent_sd_plan import EARLY, LATE, Schedule  # noqa: E402
from visionattn.ops.token_merging import destination_tokens, match_tokens, merge_tokens, seats, unmerge_tokens  # noqa: E402

from . import pipelines, tiny  # noqa: E402

FIXTURES = Path(__file__).parents[1] / "fixtures" / "agent_sd"


class OneBlock(nn.Module):
    """The fixtures' host: a transformer block over the tokens of a map."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int):
        super().__init__()
        self.block = BasicTransformerBlock(dim, heads, dim_head, cross_attention_dim=context_dim)

    def forward(self, sample, timestep, encoder_hidden_states):
        y = self.block(sample.flatten(2).transpose(1, 2), encoder_hidden_states=encoder_hidden_states)
        return y.transpose(1, 2).unflatten(2, sample.shape[2:])


def sorted_rows(x: np.ndarray) -> np.ndarray:
    return np.stack([rows[np.lexsort(rows.T[::-1])] for rows in x.round(4)])


@pytest.mark.parametrize("name", ["agentsd_block_early", "agentsd_block_late"])
def test_recorded_blocks(name):
    manifest, expected = fixtures.load(FIXTURES / name)
    net = OneBlock(**manifest["config"]["block"]).eval()
    state = {
        k.removeprefix("model.diffusion_model."): torch.from_numpy(v) for k, v in fixtures.state_dict(manifest).items()
    }
    net.load_state_dict(state)
    inputs = {k: torch.from_numpy(v) for k, v in fixtures.inputs(manifest).items()}
    seen = []
    hooks = [
        net.block.attn1.to_q.register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        net.block.attn1.to_out[1].register_forward_hook(lambda m, args, out: seen.append(out)),
    ]
    with torch.no_grad():
        dense = net(inputs["x"], 500, inputs["context"])
        seen.clear()
        with visionattn.agent_sd(net, **manifest["config"]["args"]) as handle:
            out = net(inputs["x"], 500, inputs["context"])
            row = handle.report().rows[0]
        for hook in hooks:
            hook.remove()
        assert torch.equal(net(inputs["x"], 500, inputs["context"]), dense)
    assert row["agent"] == ("agent" in expected) and row["sparse"] == 1
    error = np.linalg.norm(out.numpy() - expected["out"]) / np.linalg.norm(expected["out"])
    assert error < 1e-6, error
    names = ["agent", "merged_tokens", "attn1_out"] if "agent" in expected else ["merged_tokens", "attn1_out"]
    for got, key in zip(seen, names, strict=True):
        np.testing.assert_allclose(sorted_rows(got.numpy()), sorted_rows(expected[key]), atol=3e-4, err_msg=key)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged_by_hand(x, grid, cell, choice, merged):
    """Merged groups of one sequence: the destination of every token, itself for those that stay."""
    (H, W), (h, w) = grid, cell
    into = [
        (i * h + int(choice[i, j]) // w) * W + j * w + int(choice[i, j]) % w
        for i in range(H // h)
        for j in range(W // w)
    ]
    unit = x / x.norm(dim=-1, keepdim=True)
    best = {s: max((float(unit[s] @ unit[d]), -k) for k, d in enumerate(into)) for s in range(len(x)) if s not in into}
    owner = list(range(len(x)))
    for s in sorted(best, key=lambda s: -best[s][0])[:merged]:
        owner[s] = into[-best[s][1]]
    return owner


@pytest.mark.parametrize("grid, cell", [((7, 9), (2, 3)), ((4, 4), (2, 2)), ((5, 3), (5, 1))])
def test_merging_is_its_definition(grid, cell, monkeypatch):
    monkeypatch.setattr("visionattn.ops.token_merging._SCORES", 50)  # in parts
    x = normal(2, math.prod(grid), 6)
    choice = torch.randint(math.prod(cell), (grid[0] // cell[0], grid[1] // cell[1]))
    matching = match_tokens(x, destination_tokens(grid, cell, choice))
    for merged in (0, 1, matching.sources // 2, matching.sources):
        places = seats(matching, merged)
        y = merge_tokens(x, places)
        assert y.shape == (2, math.prod(grid) - merged, 6)
        back = unmerge_tokens(y, places)
        for b in range(2):
            owner = merged_by_hand(x[b], grid, cell, choice, merged)
            means = {o: x[b][[i for i, p in enumerate(owner) if p == o]].mean(0) for o in set(owner)}
            torch.testing.assert_close(back[b], torch.stack([means[o] for o in owner]))
    small = match_tokens(x, destination_tokens(grid, (grid[0] + 1, 1)))  # no whole cell: nothing to merge
    assert small.partners.shape == (2, 0) and merge_tokens(x, seats(small, 0)) is x
    alike = x[:, :1].expand_as(x).half()  # all merge into one, whose mean is theirs
    means = merge_tokens(alike, seats(match_tokens(alike, destination_tokens(grid, cell)), matching.sources))
    assert torch.equal(means, alike[:, : means.shape[1]])


def test_the_formula_at_other_sizes():
    """Agents without merging, merged cross-attention and feed-forward, drawn destinations: computed step by step."""
    net = tiny.randomise(OneBlock(24, 3, 8, 10)).double()
    block, x, context = net.block, normal(2, 24, 9, 7), normal(2, 5, 10, seed=1)
    tokens = x.flatten(2).transpose(1, 2)
    with torch.no_grad(), visionattn.agent_sd(
        net, 0.0, sx=3, sy=3, agent_ratio=0.95, k_scale2=0.7, k_shortcut=0.2, seed=5
    ) as handle:  # fmt: skip
        out = net(x, 100, context)
        (session,) = handle.sessions
        matching = match_tokens(tokens, session.destinations[1][0])
        assert not torch.equal(matching.destinations, destination_tokens((9, 7), (3, 3)))
        y, attn = block.norm1(tokens), block.attn1
        agents = merge_tokens(y, seats(matching, 63 - 6))
        q, k, v, a = (
            f(t).unflatten(2, (3, 8)).transpose(1, 2)
            for f, t in ((attn.to_q, y), (attn.to_k, y), (attn.to_v, y), (attn.to_q, agents))
        )
        gathered = (a @ k.mT / 8**0.5).softmax(-1) @ v
        spread = (q @ a.mT * 8 ** (-0.5 * 0.7)).softmax(-1) @ gathered + 0.2 * v
        h = tokens + attn.to_out[0](spread.transpose(1, 2).flatten(2))
        h = h + block.attn2(block.norm2(h), encoder_hidden_states=context)
        h = h + block.ff(block.norm3(h))
    torch.testing.assert_close(out, h.transpose(1, 2).unflatten(2, (9, 7)))
    with torch.no_grad(), visionattn.agent_sd(
        net, 0.4, sx=2, sy=2, agent_ratio=0.5, merge_attn=False, merge_crossattn=True, merge_mlp=True, use_rand=False
    ):  # fmt: skip
        out = net(x, 100, context)
    with torch.no_grad():
        places = seats(match_tokens(tokens, destination_tokens((9, 7), (2, 2))), 25)
        h = tokens + block.attn1(block.norm1(tokens))
        for part, norm, more in (
            (block.attn2, block.norm2, {"encoder_hidden_states": context}),
            (block.ff, block.norm3, {}),
        ):
            h = h + unmerge_tokens(part(merge_tokens(norm(h), places), **more), places)
    torch.testing.assert_close(out, h.transpose(1, 2).unflatten(2, (9, 7)))


def unet() -> UNet2DConditionModel:
    return tiny.randomise(
        UNet2DConditionModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )
    )  # fmt: skip


def stable_diffusion(folder: Path):
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=80,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=pipelines._vae(4), text_encoder=CLIPTextModel(clip).eval(), tokenizer=pipelines._clip_tokenizer(folder),
        unet=unet(), scheduler=PNDMScheduler(skip_prk_steps=True), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("clip"))


def generate(pipe, prompt="a red fox", size=(128, 104), steps=5):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt, height=size[0], width=size[1], num_inference_steps=steps, generator=generator, output_type="np"
    ).images  # fmt: skip


def test_pipeline_schedule_and_removal(pipe):
    dense = generate(pipe)
    state = list(pipe.unet.state_dict())
    handle = visionattn.agent_sd(pipe, agent_steps=2)
    assert list(pipe.unet.state_dict()) == state
    patched = generate(pipe)
    rows = handle.report().rows
    assert np.isfinite(patched).all() and not np.allclose(patched, dense, atol=1e-4)
    acting = [row for row in rows if row["grid"] == (16, 13)]
    assert len(rows) == 7 and len(acting) == 3
    for row in acting:  # PNDM gives the second timestep twice: 2 steps with agents are 3 calls of the U-Net
        assert (row["agent"], row["sparse"], row["dense"]) == (3, 6, 0), str(handle.report())
    assert all(row["sparse"] == 0 and "less than 1/1" in row["reason"] for row in rows if row not in acting)
    assert "agents in 2 steps" in str(handle.report())
    assert np.array_equal(generate(pipe), patched)  # draws do not depend on what ran before
    both = generate(pipe, ["a red fox", "the cat in the snow"], (64, 160))
    assert both.shape == (2, 64, 160, 3) and np.isfinite(both).all()
    assert np.array_equal(generate(pipe), patched)
    handle.remove()
    handle.remove()
    assert np.array_equal(generate(pipe), dense)
    assert not pipe.unet._forward_pre_hooks and not any(m._forward_pre_hooks for m in pipe.unet.modules())
    with visionattn.agent_sd(pipe, agent_until=600) as handle:  # timesteps 801, 601, 601, 401, 201, 1
        generate(pipe)
        assert {(r["agent"], r["sparse"]) for r in handle.report().rows} == {(3, 6), (0, 0)}
    with visionattn.agent_sd(pipe, 0.3, sx=2, sy=2, agent_ratio=0.5) as handle:
        generate(pipe)
        assert {(r["agent"], r["sparse"]) for r in handle.report().rows} == {(0, 6), (0, 0)}


def call(net, batch=2, size=(16, 13), timestep=900):
    with torch.no_grad():
        return net(tiny.noise(batch, 4, *size), timestep, tiny.noise(batch, 7, 8, seed=2), return_dict=False)[0]


def test_the_published_schedule_at_64_by_64():
    """256 agents of 4096 tokens in steps 0 to 19; merged tokens alone, three quarters of the tokens, from step 20."""
    schedule = Schedule(20, None, None)
    steps = [schedule.advance(float(t)) for _ in range(2) for t in range(981, 0, -20)]
    assert steps == ([EARLY] * 20 + [LATE] * 30) * 2
    net = unet()
    with visionattn.agent_sd(net, 0.25, agent_steps=1) as handle:
        block = handle.sessions[0].blocks[0]
        call(net, size=(64, 64), timestep=981)
        assert (block.plan.agents, block.plan.merged) == (256, 1024)
        call(net, size=(64, 64), timestep=961)
        assert (block.plan.agents, block.plan.merged) == (None, 1024)


def test_a_copy_carries_no_patch_and_two_do_not_meet(tmp_path):
    net, other = unet(), unet()
    dense = call(net)
    with visionattn.agent_sd(net, sx=4, sy=4, agent_ratio=0.95):
        patched = call(net)
        with visionattn.agent_sd(other, 0.1, sx=2, sy=2) as second:
            assert not torch.equal(call(other), patched)
            assert torch.equal(call(net), patched)
            assert second.sessions[0].blocks[0].calls == {"agent": 1, "merged": 0, "dense": 0}
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(call(twin), dense)
            assert not any(m._forward_pre_hooks for m in twin.modules())
        fresh = copy.deepcopy(net)
        with visionattn.agent_sd(fresh, sx=4, sy=4, agent_ratio=0.95):  # patched before its first call
            assert torch.equal(call(fresh), patched)
        assert torch.equal(call(fresh), dense)
        net.save_pretrained(tmp_path)
        assert torch.equal(call(net), patched) and not torch.equal(patched, dense)
        assert torch.isfinite(call(net, batch=3)).all()
    torch.testing.assert_close(call(UNet2DConditionModel.from_pretrained(tmp_path).eval()), dense, rtol=1e-5, atol=1e-4)
    assert torch.equal(call(net), dense)


def test_processors_that_come_later():
    from diffusers.models.attention_processor import AttnProcessor, PAGIdentitySelfAttnProcessor2_0

    net = unet()
    attn = net.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    with visionattn.agent_sd(net, sx=4, sy=4, agent_ratio=0.95) as handle:
        patched = call(net)
        kept = dict(net.attn_processors)
        net.set_attn_processor(AttnProcessor())  # a plain one: the patch stays, around it
        torch.testing.assert_close(call(net), patched)
        net.set_default_attn_processor()  # asks for the classes that diffusers knows
        net.set_attn_processor({name: value.__class__() for name, value in net.attn_processors.items()})
        torch.testing.assert_close(call(net), patched)
        attn.set_processor(PAGIdentitySelfAttnProcessor2_0())
        assert not torch.allclose(call(net), patched)
        assert isinstance(attn.processor, PAGIdentitySelfAttnProcessor2_0)
        with pytest.raises(ValueError, match="patched already"):
            visionattn.agent_sd(net)
        handle.remove()
    with pytest.raises(
        ValueError, match=r"blocks.0.attn1 has a PAGIdentitySelfAttnProcessor2_0, which agent attention"
    ):
        visionattn.agent_sd(net)
    net.set_attn_processor(AttnProcessor())
    dense = call(net)
    net.set_attn_processor(kept)  # ours, long removed
    torch.testing.assert_close(call(net), dense)


def test_compiled_blocks_stay_whole():
    net = tiny.randomise(OneBlock(16, 2, 8, 8))

    def run(timestep):
        with torch.no_grad():
            return net(tiny.noise(2, 16, 12, 8), timestep, tiny.noise(2, 7, 8, seed=2))

    with visionattn.agent_sd(net, agent_steps=1) as handle:
        eager = [run(t) for t in (900, 500)]
        net.block.compile(backend="eager", fullgraph=True)  # as diffusers' compile_repeated_blocks
        for timestep, expected in zip((900, 500), eager, strict=True):
            torch.testing.assert_close(run(timestep), expected)
        assert handle.sessions[0].blocks[0].calls == {"agent": 1, "merged": 1, "dense": 0}  # the eager ones
    torch._dynamo.reset()


def test_beside_lora_ip_adapter_fused_projections_and_offload():
    require_extra("peft")
    import accelerate
    from peft import LoraConfig

    net = unet()
    blocks = [name.removesuffix(".processor") for name in net.attn_processors if name.endswith("attn2.processor")]
    with visionattn.agent_sd(net, agent_steps=5) as handle:
        plain = call(net)
        net.fuse_qkv_projections()
        torch.testing.assert_close(call(net), plain)
        net.unfuse_qkv_projections()
        net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
        styled = call(net)
        net.fuse_lora()
        torch.testing.assert_close(call(net), styled, rtol=1e-4, atol=1e-4)
        net.unfuse_lora()
        net.disable_adapters()
        torch.testing.assert_close(call(net), plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(styled, plain, atol=1e-2)
        weights = {}
        for i, name in enumerate(blocks):
            width = net.get_submodule(name).to_k.out_features
            weights |= {f"{2 * i + 1}.to_{x}_ip.weight": tiny.noise(width, 8, seed=i) for x in "kv"}
        image = {"proj.weight": tiny.noise(32, 6), "proj.bias": torch.zeros(32)}
        image |= {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
        net._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}], low_cpu_mem_usage=False)
        embeds = {"image_embeds": [tiny.noise(2, 1, 6)]}
        inputs = tiny.noise(2, 4, 16, 13), 900, tiny.noise(2, 7, 8, seed=2)
        with torch.no_grad():
            seen = net(*inputs, added_cond_kwargs=embeds).sample
            accelerate.cpu_offload(net, execution_device="cpu")
            torch.testing.assert_close(net(*inputs, added_cond_kwargs=embeds).sample, seen)
        assert not torch.allclose(seen, plain, atol=1e-2)
        row = handle.report().rows[0]
        assert (row["agent"], row["dense"]) == (7, 0)


def test_errors_are_one_line(pipe):
    for message, kwargs in {
        "ratio=1.0: give a share": {"ratio": 1.0},
        "agent_ratio=2: give a share": {"agent_ratio": 2},
        "max_downsample=3: give 1, 2, 4 or 8": {"max_downsample": 3},
        "sx=0, sy=2: give whole numbers": {"sx": 0},
        "agent_steps=0.4: give a number of steps": {"agent_steps": 0.4},
        "leave out agent_steps": {"sx": 4, "agent_steps": 3},
        "not both": {"agent_steps": 3, "agent_until": 500},
        "nothing to merge": {"merge_attn": False},
    }.items():
        with pytest.raises(ValueError, match=message):
            visionattn.agent_sd(pipe, **kwargs)
    with pytest.raises(ValueError, match=r"has no unet: transformers have visionattn\.sparsify"):
        visionattn.agent_sd(pipelines.dit())
    with pytest.raises(ValueError, match="Linear has no BasicTransformerBlock"):
        visionattn.agent_sd(nn.Linear(2, 2))
    xl = unet()
    xl.down_blocks[0] = nn.Identity()
    with pytest.raises(ValueError, match="max_downsample=2"):
        visionattn.agent_sd(xl)
    with pytest.raises(ValueError, match=r"U-Nets have visionattn\.agent_sd"):
        visionattn.sparsify(pipe, visionattn.Disk(8))
    assert not pipe.unet._forward_pre_hooks
