"""Dense Vision Transformers into mixture-of-head ones, to continue their training (MoH, section 4.3)."""

from timm.layers import Attention, trunc_normal_
from torch import nn

from .moh import AUX_COEFFICIENT, MoHAttention, set_aux_weights, split_heads


def to_moh(
    model: nn.Module,
    active: float = 0.75,
    shared: int | None = None,
    router: str = "query",
    aux_coefficient: float = AUX_COEFFICIENT,
    backend: str = "auto",
) -> nn.Module:
    """Gives every standard attention (``timm.layers.Attention``) in ``model`` routed heads, and keeps its weights.

    The result is the paper's starting point for continued training: the first ``shared`` heads serve every token, of
    the others a token takes those whose queries are longest (no new parameters), all with gate 1, through which the
    gradient of the routing passes. With ``active=1.0`` the model computes what it did. The parameters stay the same
    objects under the same names, so optimizers, checkpoints and weight files remain valid.

    Args:
        model: any module with timm's attention, VisionTransformer and DeiT for example.
        active: share of the heads that a token computes.
        shared: how many of them are the same for all tokens; by default half of all heads (at least one stays routed).
        router: ``'query'`` as above, or ``'linear'``: learned routers, newly initialised, with the released gates. The
            output then is not the dense model's, even with all heads active.
        aux_coefficient: weight of the mean load-balance loss; trainers add :func:`visionattn.layers.pop_aux_loss`.
        backend: of :func:`visionattn.ops.moh.moh_attention`.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: where no standard attention is found, one has parts that MoH attention lacks, or the numbers of
            heads do not fit.
    """
    found = [(name, m) for name, m in model.named_modules() if type(m) is Attention]
    if not found and any(isinstance(m, MoHAttention) for m in model.modules()):
        raise ValueError(f"{type(model).__name__} has routed heads already: give to_moh the dense model, a new one")
    if not found:
        raise ValueError(f"{type(model).__name__} has no timm.layers.Attention: to_moh changes standard attention only")
    for name, old in found:
        if getattr(old, "gate", None) is not None:
            raise ValueError(f"{name} has an output gate, which MoH attention has not: leave it as it is")
        split_heads(old.num_heads, active, shared)  # says what does not fit before anything is changed
    for name, old in found:
        model.set_submodule(name, _routed(old, active, shared, router, backend))
    return set_aux_weights(model, aux_coefficient)


def _routed(old: Attention, active: float, shared: int | None, router: str, backend: str) -> MoHAttention:
    """A layer that owns ``old``'s parts."""
    shared_head, routed_head = split_heads(old.num_heads, active, shared)
    new = MoHAttention(
        old.qkv.in_features, old.num_heads, shared_head=shared_head, routed_head=routed_head, head_dim=old.head_dim,
        router=router, backend=backend, device="meta",
    )  # fmt: skip
    new.attn_drop = old.attn_drop.p
    for part in ("qkv", "q_norm", "k_norm", "norm", "proj", "proj_drop"):
        setattr(new, part, getattr(old, part))
    weight = old.qkv.weight
    for gate in (new.wg, new.wg_0, new.wg_1):
        if isinstance(gate, nn.Linear):
            gate.to_empty(device=weight.device).to(weight.dtype)
            trunc_normal_(gate.weight, std=0.02)
    return new.train(old.training)
