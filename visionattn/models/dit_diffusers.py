"""DiT and MoH-DiT in diffusers: schedulers, and a transformer for ``DiTPipeline``. Needs the extra ``diffusion``."""

import inspect
from typing import Any

import torch

try:
    from diffusers import ConfigMixin, DDPMScheduler, DiTTransformer2DModel, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
except ImportError as error:
    raise ImportError("DiT in diffusers needs diffusers: pip install 'visionattn[diffusion]'") from error

from .dit import DiT, create_dit
from .dit_convert import diffusers_config, dit_to_diffusers


class MoHDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """A DiT of :func:`visionattn.create_dit` where diffusers' pipelines expect a ``DiTTransformer2DModel``.

    ``DiTPipeline(MoHDiTTransformer2DModel.from_checkpoint("moh_dit_xl_2_90", "file.pt"), vae, scheduler)``.
    ``save_pretrained`` and ``from_pretrained`` work as for every diffusers model.

    Args:
        name: of :func:`visionattn.create_dit`.
        sample_size: side of the latents.
        overrides: further arguments of :class:`visionattn.models.dit.DiT`.
        in_channels: of the latents; ``out_channels`` follows from the model, as the pipeline reads it in the config.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]  # what compile_repeated_blocks compiles

    @register_to_config
    def __init__(
        self,
        name: str = "moh_dit_xl_2_90",
        sample_size: int = 32,
        overrides: dict[str, Any] | None = None,
        in_channels: int = 4,
        out_channels: int = 8,
    ):
        super().__init__()
        self.dit = create_dit(name, input_size=sample_size, in_channels=in_channels, **(overrides or {}))
        self.register_to_config(out_channels=self.dit.out_channels)

    @classmethod
    def from_checkpoint(cls, name: str, checkpoint: str, **kwargs: Any) -> "MoHDiTTransformer2DModel":
        """Built, and loaded from a file of the authors."""
        from .dit_convert import load_dit

        model = cls(name, **kwargs)
        load_dit(model.dit, checkpoint)
        return model.eval()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ):
        """Latents (B, C, H, W), steps (B,), classes (B,) to a ``Transformer2DModelOutput`` (or a tuple)."""
        out = self.dit(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def to_diffusers(model: DiT) -> DiTTransformer2DModel:
    """diffusers' own network with the weights of a plain ``model``.

    Its sinusoids of the steps differ a little from facebook's (diffusers divides by 127 where the release divides by
    128), so its outputs do too; :class:`MoHDiTTransformer2DModel` around the same model has the release's.

    Raises:
        ValueError: for routed heads, or latents that are not square.
    """
    theirs = DiTTransformer2DModel(**diffusers_config(model))
    missing, unexpected = theirs.load_state_dict(dit_to_diffusers(model.state_dict()), strict=False)
    if unexpected or any("pos_embed" not in name for name in missing):
        raise RuntimeError(f"diffusers' DiTTransformer2DModel has other names by now: {[*missing, *unexpected][:3]}")
    return theirs.train(model.training)


def default_scheduler() -> DDPMScheduler:
    """The release's diffusion: 1000 steps, linear betas, learned range of variances."""
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        variance_type="learned_range", clip_sample=False,
    )  # fmt: skip


@torch.no_grad()
def sample(
    model: DiT,
    class_labels: torch.Tensor | list[int],
    scheduler: Any | None = None,
    num_inference_steps: int = 250,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents (len(class_labels), C, H, W) by any scheduler of diffusers that predicts noise.

    Args:
        scheduler: :func:`default_scheduler` by default, which uses the predicted variance as released; schedulers
            without learned variances get the noise alone.
        guidance_scale: above 1, classifier-free guidance as released (on the first three channels).
        latents: the starting noise instead of a drawn one.
    """
    scheduler = default_scheduler() if scheduler is None else scheduler
    weight = model.x_embedder.proj.weight
    labels = torch.as_tensor(class_labels, device=weight.device)
    if latents is None:
        shape = (len(labels), model.in_channels, *model.input_size)
        device = weight.device if generator is None else generator.device
        latents = torch.randn(shape, generator=generator, device=device, dtype=weight.dtype)
    x = latents.to(weight)
    scheduler.set_timesteps(num_inference_steps, device=weight.device)
    x = x * scheduler.init_noise_sigma
    learned = "learned" in str(getattr(scheduler.config, "variance_type", ""))
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    null = torch.full_like(labels, model.num_classes)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        if guidance_scale > 1.0:
            steps = t.expand(2 * len(labels))
            out = model.forward_with_cfg(torch.cat([scaled, scaled]), steps, torch.cat([labels, null]), guidance_scale)
            out = out[: len(labels)]
        else:
            out = model(scaled, t.expand(len(labels)), labels)
        if not learned:
            out = out[:, : model.in_channels]
        x = scheduler.step(out, t, x, **options).prev_sample
    return x
