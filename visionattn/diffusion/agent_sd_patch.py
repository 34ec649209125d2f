"""AgentSD: Stable Diffusion's U-Nets sooner, without training, by merged tokens and agent attention.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' (ECCV 2024), arXiv 2312.08874, section 5.4.
In the transformer blocks at the latents' full resolution, tokens that resemble each other are averaged before the
self-attention and separated after it (ToMeSD). In early steps the averages of large cells are also the agents of an
agent attention, O = softmax(d^(-k/2) Q A^T) softmax(d^(-1/2) A K^T) V + s V; later steps have softmax attention.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from visionattn.ops.agent import agent_attention
from visionattn.ops.token_merging import destination_tokens, match_tokens, merge_tokens, seats, unmerge_tokens

from .agent_sd_plan import DEFAULT, EARLY, Cells, Options, Plan, Schedule
from .patch import Handle
from .report import Report

# Those that compute plain softmax attention, which agent attention stands in for.
_PLAIN = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor", "FusedAttnProcessor2_0")
_BLOCK = "BasicTransformerBlock"


def agent_sd(
    pipe: Any,
    ratio: float = 0.5,
    agent_ratio: float | None = None,
    sx: int | None = None,
    sy: int | None = None,
    *,
    agent_steps: int | None = None,
    agent_until: float | None = None,
    max_downsample: int = 1,
    use_rand: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
    seed: int = 0,
) -> Handle:
    """Patches AgentSD into a Stable Diffusion pipeline with a U-Net; ``handle.remove()`` takes it out again.

    By default the published schedule: the first 20 denoising steps (of 50) use cells of 4 x 4 and agents, the others
    cells of 2 x 2 and softmax attention on merged tokens. With one of ``agent_ratio``, ``sx``, ``sy`` all steps have
    that one setting; those not given are then 0.8, 2 and 2.

    Args:
        pipe: a pipeline, its U-Net, or any module that takes latents (B, C, h, w) first, steps second, and holds
            diffusers' ``BasicTransformerBlock``. ControlNets stay as they are.
        ratio: share of the tokens that merges into others; 0 for agents alone.
        agent_ratio, sx, sy: see :class:`~visionattn.diffusion.agent_sd_plan.Cells`.
        agent_steps: how many leading steps have the early setting, 20 by default; two fifths of the steps were used.
        agent_until: instead, the timestep (0 to 1000) down to which the early setting is used.
        max_downsample: blocks whose map is at most so many times smaller than the latents are patched: 1, 2, 4 or 8.
            SDXL has none at 1.
        use_rand: each cell's destination is drawn; always the top left one otherwise, and in batches of odd size, which
            do not hold a picture's two halves of classifier-free guidance.
        merge_attn, merge_crossattn, merge_mlp: which parts of a block see merged tokens; without ``merge_attn``
            self-attention is left as it is.
        k_scale2: k above.
        k_shortcut: s above.
        seed: of the drawn destinations, which depend on it and the timestep alone.

    Raises:
        ValueError: for a pipeline without a U-Net, a U-Net without blocks to patch or that is patched already, an
            attention processor that is no plain attention, or numbers out of range.
    """
    constant = None
    if (agent_ratio, sx, sy) != (None, None, None):
        given = (DEFAULT.sx if sx is None else sx, DEFAULT.sy if sy is None else sy)
        constant = Cells(*given, DEFAULT.agent_ratio if agent_ratio is None else agent_ratio)
        if agent_steps is not None or agent_until is not None:
            raise ValueError(
                "agent_sd: agent_ratio, sx and sy hold in all steps: leave out agent_steps and agent_until"
            )
    if agent_steps is not None and agent_until is not None:
        raise ValueError("agent_sd: give agent_steps or agent_until, not both")
    _check(ratio, constant, max_downsample, agent_steps)
    if not (merge_attn or merge_crossattn or merge_mlp):
        raise ValueError("agent_sd: nothing to merge: set merge_attn, merge_crossattn or merge_mlp")
    schedule = Schedule(20 if agent_steps is None else agent_steps, agent_until, constant)
    options = Options(ratio, max_downsample, use_rand, merge_attn, merge_crossattn, merge_mlp, k_scale2, k_shortcut)
    session = AgentSession(_unet(pipe), options, schedule, seed)
    session.install()
    return AgentHandle([session])


def _check(ratio: float, cells: Cells | None, max_downsample: int, steps: int | None) -> None:
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"agent_sd: ratio={ratio}: give a share of the tokens, 0 <= ratio < 1")
    if max_downsample not in (1, 2, 4, 8):
        raise ValueError(f"agent_sd: max_downsample={max_downsample}: give 1, 2, 4 or 8")
    if steps is not None and (not isinstance(steps, int) or steps < 0):
        raise ValueError(f"agent_sd: agent_steps={steps}: give a number of steps, 0 or more")
    if cells is not None:
        if not 0.0 <= cells.agent_ratio < 1.0:
            raise ValueError(f"agent_sd: agent_ratio={cells.agent_ratio}: give a share of the tokens, 0 <= ratio < 1")
        if not all(isinstance(n, int) and n >= 1 for n in (cells.sx, cells.sy)):
            raise ValueError(f"agent_sd: sx={cells.sx}, sy={cells.sy}: give whole numbers of at least 1")


def _unet(pipe: Any) -> nn.Module:
    if isinstance(pipe, nn.Module):
        return pipe
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has no unet: transformers have visionattn.sparsify")
    return unet


class Block:
    """A patched transformer block: the plan of its current call, and counts."""

    def __init__(self, session: "AgentSession", name: str, module: nn.Module, number: int):
        self.session = session
        self.name = name
        self.module = module
        self.number = number
        self.plan: Plan | None = None
        self.grid: tuple[int, int] | None = None
        self.reason: str | None = None  # why the last call was left as it is
        self.calls = {"agent": 0, "merged": 0, "dense": 0}

    def begin(self, x: torch.Tensor) -> None:
        """Makes the plan of a call with tokens x (B, N, C)."""
        self.plan, self.reason = self.session.plan(self, x)
        if not torch.compiler.is_compiling():
            kind = "dense" if self.plan is None else "merged" if self.plan.agents is None else "agent"
            self.calls[kind] += 1

    def attend(self, attn: nn.Module, x: torch.Tensor, original: Callable) -> torch.Tensor:
        """Self-attention of normed tokens x (B, N, C) by the plan."""
        plan, options = self.plan, self.session.options
        y = merge_tokens(x, plan.seats)
        if plan.agent_seats is None:
            return unmerge_tokens(original(attn, y), plan.seats)
        agents = attn.to_q(merge_tokens(x, plan.agent_seats))
        q, k, v, agents = (
            t.unflatten(-1, (attn.heads, -1)) for t in (attn.to_q(y), attn.to_k(y), attn.to_v(y), agents)
        )
        if attn.norm_q is not None:
            q, agents = attn.norm_q(q), attn.norm_q(agents)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        spread = q.shape[-1] ** (-0.5 * options.k_scale2)
        out = agent_attention(q, k, v, agents, query_scale=spread).add(v, alpha=options.k_shortcut)
        out = attn.to_out[1](attn.to_out[0](out.flatten(2).to(x.dtype)))
        return unmerge_tokens(out, plan.seats)


class AgentProcessor:
    """In place of ``attn1``'s processor, which it calls for softmax attention."""

    def __init__(self, block: Block, original: Any):
        self.block = block
        self.visionattn_original = original

    @property
    def __class__(self) -> type:
        """The original's: diffusers' loaders make anew what they find, by its class, and some methods ask for it."""
        return type(self.visionattn_original)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = self.block.plan
        if plan is None or not self.block.session.options.merge_attn or hidden_states.shape[1] != plan.tokens:
            return self.visionattn_original(attn, hidden_states, encoder_hidden_states, attention_mask)
        if encoder_hidden_states is not None or attention_mask is not None:
            self.block.reason = "its self-attention has other keys or a mask"
            return self.visionattn_original(attn, hidden_states, encoder_hidden_states, attention_mask)
        return self.block.attend(attn, hidden_states, self.visionattn_original)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.visionattn_original, memo)

    def __reduce__(self) -> tuple:
        return _itself, (self.visionattn_original,)


def _itself(value: Any) -> Any:
    return value


class _Hook:
    """A forward hook that works for one session's modules. In a copy of the U-Net it does nothing, and goes."""

    def __init__(self, function: Callable | None):
        self.function = function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return None if self.function is None else self.function(module, *args)

    def __deepcopy__(self, memo: dict) -> "_Hook":
        return type(self)(None)

    def __reduce__(self) -> tuple:
        return type(self), (None,)


class _OuterHook(_Hook):
    """The U-Net's: reads the call's latents and step, outside of compiled graphs."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if self.function is not None:
            return self.function(module, *args)
        return self.clean(module)

    @staticmethod
    def clean(module: nn.Module) -> None:
        """Takes all hooks off a copy of a patched U-Net."""
        for child in module.modules():
            for hooks in (child._forward_pre_hooks, child._forward_hooks):
                for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook)]:
                    del hooks[key]
                    child._forward_pre_hooks_with_kwargs.pop(key, None)


class AgentSession:
    """A patched U-Net. Its state dict, modules and weights are what they were."""

    def __init__(self, unet: nn.Module, options: Options, schedule: Schedule, seed: int):
        self.outer = unet
        self.module = getattr(unet, "_orig_mod", unet)
        self.options = options
        self.schedule = schedule
        self.generator = torch.Generator()
        self.seed = seed
        self.size: tuple[int, int] | None = None
        self.cells = EARLY
        self.destinations: dict[int, torch.Tensor] = {}  # (blocks, D) by the factor of a map to the latents
        self.blocks = [
            Block(self, name, block, i)
            for i, (name, block) in enumerate(_patchable(self.module, options.max_downsample).items())
        ]
        self._hooks: list[Any] = []

    def install(self) -> None:
        for hook in list(self.outer._forward_pre_hooks.values()):
            if isinstance(hook, _OuterHook) and hook.function is None:
                hook.clean(self.outer)  # a copy that was not called yet: later it would undo this patch
        for block in self.blocks:
            _refuse(block)
        for block in self.blocks:
            self._wrap(block)
            self._hooks.append(
                block.module.register_forward_pre_hook(_Hook(_beginner(block)), with_kwargs=True, prepend=True)
            )
            for part, wanted in (("attn2", self.options.merge_crossattn), ("ff", self.options.merge_mlp)):
                if wanted and getattr(block.module, part, None) is not None:
                    self._merge_around(block, getattr(block.module, part))
        hook = _OuterHook(self._before_call)
        self._hooks.append(self.outer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for block in self.blocks:
            block.plan = None  # a processor that someone kept, and sets again, is the original one
            processor = block.module.attn1.processor
            if isinstance(processor, AgentProcessor) and processor.block is block:
                block.module.attn1.set_processor(processor.visionattn_original)

    @staticmethod
    def _wrap(block: Block) -> None:
        """Puts our processor around a plain one; another one (PAG's, for one) that came later is left alone."""
        processor = block.module.attn1.processor
        if type(processor).__name__ in _PLAIN:
            block.module.attn1.set_processor(AgentProcessor(block, processor))

    def _merge_around(self, block: Block, part: nn.Module) -> None:
        def before(module, args):
            plan = block.plan
            if plan is not None and args[0].shape[1] == plan.tokens:
                return (merge_tokens(args[0], plan.seats), *args[1:])
            return None

        def after(module, args, out):
            plan = block.plan
            if plan is not None and plan.merged and out.shape[1] == plan.seats.left:
                return unmerge_tokens(out, plan.seats)
            return None

        self._hooks += [part.register_forward_pre_hook(_Hook(before)), part.register_forward_hook(_Hook(after))]

    def _before_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module is not self.outer and module is not self.module:
            return
        sample = args[0] if args else kwargs.get("sample")
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        now = None if timestep is None else float(torch.as_tensor(timestep).flatten()[0])
        self.cells = self.schedule.advance(now)
        self.generator.manual_seed(1_000_003 * self.seed + round(1000 * (now or 0.0)))
        self.size = tuple(sample.shape[-2:]) if isinstance(sample, torch.Tensor) and sample.ndim >= 4 else None
        self.destinations = {}
        if self.size is not None:
            self._choose(sample)
        for block in self.blocks:
            self._wrap(block)

    def _choose(self, sample: torch.Tensor) -> None:
        """Every block's destinations, at every resolution that it might have: before the call, outside of graphs."""
        draw = self.options.use_rand and sample.shape[0] % 2 == 0
        cell = (self.cells.sy, self.cells.sx)
        for factor in (1, 2, 4, 8):
            if factor > self.options.max_downsample:
                break
            grid, choice = self._grid(factor), None
            if draw:
                shape = (len(self.blocks), grid[0] // cell[0], grid[1] // cell[1])
                choice = torch.randint(math.prod(cell), shape, generator=self.generator, dtype=torch.int16)
                choice = choice.to(sample.device, non_blocking=True)
            into = destination_tokens(grid, cell, choice, sample.device)
            self.destinations[factor] = into.expand(len(self.blocks), -1)

    def _grid(self, factor: int) -> tuple[int, int]:
        h, w = self.size
        return -(-h // factor), -(-w // factor)

    def plan(self, block: Block, x: torch.Tensor) -> tuple[Plan | None, str | None]:
        """The plan of a block's call with tokens x (B, N, C), or why it is left as it is."""
        if self.size is None:
            return None, "the latents' size is not known"
        tokens, options, cells = x.shape[1], self.options, self.cells
        factor = math.ceil(math.sqrt(math.prod(self.size) // tokens)) if tokens else 0
        if factor > options.max_downsample or factor == 0:
            return None, f"{tokens} tokens are less than 1/{options.max_downsample} of the latents' resolution"
        grid = self._grid(factor)
        if math.prod(grid) != tokens:
            return None, f"{tokens} tokens are not the latents' {grid[0]} x {grid[1]}"
        block.grid = grid
        destinations = self.destinations[factor][block.number]
        sources = tokens - len(destinations) if len(destinations) else 0
        merged = min(int(tokens * options.ratio), sources)
        gathered = min(int(tokens * cells.agent_ratio), sources)
        few = 2 * (tokens - gathered) < tokens - merged
        matching = match_tokens(x, destinations)
        return Plan(tokens, merged, seats(matching, merged), seats(matching, gathered) if few else None), None


def _beginner(block: Block) -> Callable:
    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        block.begin(args[0] if args else kwargs["hidden_states"])

    return before


def _patchable(unet: nn.Module, max_downsample: int) -> dict[str, nn.Module]:
    """The blocks with self-attention, by name.

    Raises:
        ValueError: if there are none, or none fine enough as the names of the U-Net's stages tell.
    """
    blocks = {
        name: m
        for name, m in unet.named_modules()
        if type(m).__name__ == _BLOCK and m.attn1 is not None and not getattr(m, "only_cross_attention", False)
    }
    if not blocks:
        raise ValueError(f"{type(unet).__name__} has no {_BLOCK} with self-attention: give a Stable Diffusion U-Net")
    stages = [int(name.split(".")[1]) for name in blocks if name.startswith("down_blocks.")]
    if stages and 2 ** min(stages) > max_downsample:
        finest = 2 ** min(stages)
        raise ValueError(
            f"{type(unet).__name__}'s finest blocks have 1/{finest} of the latents' resolution: give "
            f"max_downsample={finest}"
        )
    return blocks


def _refuse(block: Block) -> None:
    processor = block.module.attn1.processor
    if any(isinstance(hook, _Hook) and hook.function for hook in block.module._forward_pre_hooks.values()):
        raise ValueError("the U-Net is patched already: remove the other handle first")
    if type(processor).__name__ not in _PLAIN:
        raise ValueError(
            f"{block.name}.attn1 has a {type(processor).__name__}, which agent attention can't stand in for: set "
            f"{' or '.join(_PLAIN[:2])} first"
        )
    if block.module.attn1.group_norm is not None or block.module.attn1.residual_connection:
        raise ValueError(f"{block.name}.attn1 norms or adds in its attention, as no Stable Diffusion block does")


class AgentHandle(Handle):
    """What :func:`agent_sd` did."""

    def report(self) -> Report:
        """Per block: the setting, calls, pairs of tokens skipped, and why a block was left as it is."""
        rows, notes = [], []
        for session in self.sessions:
            rows += [_row(session, block) for block in session.blocks]
            schedule = session.schedule
            if schedule.constant is None:
                until = f"to timestep {schedule.until}" if schedule.until is not None else f"in {schedule.steps} steps"
                notes.append(f"agents {until}, then merged tokens alone; {schedule.seen + 1} steps seen")
        return Report(rows, notes)


def _row(session: AgentSession, block: Block) -> dict[str, Any]:
    plan, cells = block.plan, session.cells
    text = f"ratio {session.options.ratio}, cells {cells.sy} x {cells.sx}"
    if plan is not None and plan.agents is not None:
        text += f", {plan.agents} agents"
    return {
        "layer": f"{block.name}.attn1",
        "pattern": text,
        "backend": "sdpa",
        "grid": block.grid,
        "sparse": block.calls["agent"] + block.calls["merged"],
        "dense": block.calls["dense"],
        "agent": block.calls["agent"],
        "saved": None if plan is None or not session.options.merge_attn else 1.0 - plan.pairs / plan.tokens**2,
        "seconds": 0.0,
        "reason": block.reason,
    }
