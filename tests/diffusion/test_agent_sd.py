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
from visionattn.ops.token_merging import match_tokens, merge_tokens, unmerge_tokens  # noqa: E402

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
    state = {k.removeprefix("model.diffusion_model."): torch.from_numpy(v) for k, v in fixtures.state_dict(manifest).items()}
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
