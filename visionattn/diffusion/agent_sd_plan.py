"""What AgentSD (:func:`visionattn.agent_sd`) does in which step, and in one call of a block."""

from dataclasses import dataclass

from visionattn.ops.token_merging import Seats


@dataclass(frozen=True)
class Cells:
    """One phase's setting: cells of ``sy`` rows and ``sx`` columns give a destination each.

    ``agent_ratio``: the share of the tokens that is merged to get the agents, as far as there are sources.
    """

    sx: int
    sy: int
    agent_ratio: float


EARLY = Cells(4, 4, 0.95)  # 256 agents of 4096 tokens
LATE = Cells(2, 2, 0.5)  # too many agents to be worth it: softmax attention on merged tokens
DEFAULT = Cells(2, 2, 0.8)  # the release's arguments where only some are given


@dataclass
class Plan:
    """What one call of one block does: ``merged`` tokens of ``tokens``, and where each of them goes."""

    tokens: int
    merged: int
    seats: Seats
    agent_seats: Seats | None  # None: no agents

    @property
    def agents(self) -> int | None:
        return None if self.agent_seats is None else self.agent_seats.left

    @property
    def pairs(self) -> int:
        """Products of a query and a key that attention computes."""
        left = self.tokens - self.merged
        return left**2 if self.agents is None else 2 * left * self.agents


@dataclass(frozen=True)
class Options:
    """:func:`agent_sd`'s arguments that hold in every step."""

    ratio: float
    max_downsample: int
    use_rand: bool
    merge_attn: bool
    merge_crossattn: bool
    merge_mlp: bool
    k_scale2: float
    k_shortcut: float


class Schedule:
    """Which setting the current denoising step has, told by the timesteps that the U-Net is given."""

    def __init__(self, steps: int, until: float | None, constant: Cells | None):
        self.steps = steps
        self.until = until
        self.constant = constant
        self.seen = 0  # steps of this generation before the current one
        self.last: float | None = None

    def advance(self, now: float | None) -> Cells:
        """The setting of a call at timestep ``now``; calls that follow at the same one are the same step."""
        if now is None or self.last is None or now > self.last:  # timesteps fall: a rise is a new generation
            self.seen = 0
        elif now < self.last:
            self.seen += 1
        self.last = now
        if self.constant is not None:
            return self.constant
        if self.until is not None and now is not None:
            return EARLY if now >= self.until else LATE
        return EARLY if self.seen < self.steps else LATE
