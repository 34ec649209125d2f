"""What every family's ``checkpoint_filter_fn`` begins with."""

import torch

# an EMA wins where a file holds both: timm's trainer and the authors' report the averaged weights
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module")


def unwrap_state_dict(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint: wrappers opened, ``module.`` prefixes (DDP) removed."""
    state_dict = checkpoint
    opened = True
    while opened:
        opened = False
        for key in WRAPPERS:
            if isinstance(state_dict.get(key), dict) and state_dict[key]:
                state_dict, opened = state_dict[key], True
                break
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    return state_dict
