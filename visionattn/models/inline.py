"""InLine (injective linear) attention in four hosts: DeiT, PVT, Swin and CSWin.

Paper: 'Bridging the Divide: Reconsidering Softmax and Linear Attention' (NeurIPS 2024),
https://arxiv.org/abs/2412.06590. Reference: https://github.com/LeapLabTHU/InLine (no licence; written from the paper's
formulas and measured behaviour, no code taken). Parameter names are the authors', so that their files load.
"""

from typing import Any

from visionattn._timm import generate_default_cfgs, register_model

from ._hosts import CSWIN_DEPTHS, PVT_DEPTHS, create_host, host_cfg
from ._shipped import digits_cfgs
from .cswin import CSWinHost
from .pvt import PVTHost
from .swin import SwinHost
from .vit import ViTHost

_DEIT = dict(attn_layer="inline", drop_path_rate=0.1)
_PVT = dict(attn_layer="inline", attn_type="IIII", la_sr_ratios="1111", num_heads=(2, 4, 10, 16))
_SWIN = dict(attn_layer="inline")
_CSWIN = dict(attn_layer="inline", attn_type="IISS")


def _cfg(host: type, size: int = 224, checkpoint: str = "", **kwargs: Any) -> dict[str, Any]:
    return host_cfg(
        host,
        size,
        url=f"https://cloud.tsinghua.edu.cn/f/{checkpoint}/?dl=1" if checkpoint else "",
        paper_ids="arXiv:2412.06590",
        paper_name="Bridging the Divide: Reconsidering Softmax and Linear Attention",
        origin_url="https://github.com/LeapLabTHU/InLine",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "inline_deit_tiny.in1k": _cfg(ViTHost, checkpoint="1d6b8191ad6d4114b291"),
        "inline_deit_small.in1k": _cfg(ViTHost, 288, checkpoint="2f3898b07e9247f3beb3"),
        "inline_deit_base.in1k": _cfg(ViTHost, 448, checkpoint="10bdd726d4b0435eb34e"),
        "inline_pvt_tiny.in1k": _cfg(PVTHost, checkpoint="90ac52b1555b401eb5e6"),
        "inline_pvt_small.in1k": _cfg(PVTHost, checkpoint="1ab953b2479d433080a3"),
        "inline_pvt_medium.in1k": _cfg(PVTHost, checkpoint="a72aec31e6084bc0a280"),
        "inline_pvt_large.in1k": _cfg(PVTHost, checkpoint="efd91318ba964f01b288"),
        "inline_swin_tiny.in1k": _cfg(SwinHost, checkpoint="32810869fcc34410966b"),
        "inline_swin_small.in1k": _cfg(SwinHost, checkpoint="e9657fd247c04c7cb1a1"),
        "inline_swin_base.in1k": _cfg(SwinHost, checkpoint="bf23564bb64c420aafe1"),
        "inline_swin_base_384.untrained": _cfg(SwinHost, 384, crop_pct=1.0),
        "inline_cswin_tiny.in1k": _cfg(CSWinHost, checkpoint="49fa2ecc543647c4b970"),
        "inline_cswin_small.in1k": _cfg(CSWinHost, checkpoint="59f4e65f776f4052b93c"),
        "inline_cswin_base.in1k": _cfg(CSWinHost, checkpoint="91e17121df284ae38521"),
        "inline_cswin_base_384.untrained": _cfg(CSWinHost, 384),
        **digits_cfgs("test_inline_deit", _cfg(ViTHost, 64), 64, takes_size=True),
        **digits_cfgs("test_inline_swin", _cfg(SwinHost, 96), 64, takes_size=True),
    }
)


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """192 wide, 12 blocks: 6.5 M parameters, 1.1 GMACs, 74.5 % top-1 in the paper."""
    settings = dict(embed_dim=192, num_heads=6)
    return create_host(ViTHost, "inline_deit_tiny", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """320 wide at 288 px: 16.7 M parameters, 5.0 GMACs, 80.2 % top-1 in the paper."""
    settings = dict(img_size=288, embed_dim=320, num_heads=10)
    return create_host(ViTHost, "inline_deit_small", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """384 wide at 448 px: 23.8 M parameters, 17.2 GMACs, 82.3 % top-1 in the paper."""
    settings = dict(img_size=448, embed_dim=384, num_heads=12)
    return create_host(ViTHost, "inline_deit_base", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Tiny: 12.0 M parameters, 2.0 GMACs, 78.2 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["tiny"], drop_path_rate=0.1)
    return create_host(PVTHost, "inline_pvt_tiny", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Small: 21.6 M parameters, 3.9 GMACs, 82.0 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["small"], drop_path_rate=0.1)
    return create_host(PVTHost, "inline_pvt_small", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Medium: 37.6 M parameters, 6.9 GMACs, 83.2 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["medium"], drop_path_rate=0.3)
    return create_host(PVTHost, "inline_pvt_medium", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Large: 51.2 M parameters, 10.2 GMACs, 83.6 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["large"], drop_path_rate=0.3)
    return create_host(PVTHost, "inline_pvt_large", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-T, InLine in stages 1 to 3: 29.2 M parameters, 4.5 GMACs, 82.4 % top-1 in the paper."""
    settings = dict(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), attn_type="IIIS", drop_path_rate=0.2)
    return create_host(SwinHost, "inline_swin_tiny", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-S, InLine in stages 1 and 2: 49.8 M parameters, 8.7 GMACs, 83.6 % top-1 in the paper."""
    settings = dict(depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), attn_type="IISS", drop_path_rate=0.3)
    return create_host(SwinHost, "inline_swin_small", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-B, InLine in stages 1, 2 and 2 blocks of 3: 88.4 M parameters, 15.4 GMACs, 84.1 % top-1 in the paper."""
    settings = dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), attn_type="IIMS2", drop_path_rate=0.5
    )
    return create_host(SwinHost, "inline_swin_base", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def inline_swin_base_384(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-B at 384 px: 88.5 M parameters, 46.3 GMACs; a configuration without a published result."""
    settings = dict(
        img_size=384,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        attn_type="IIMS2",
        drop_path_rate=0.5,
    )
    return create_host(SwinHost, "inline_swin_base_384", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-T, InLine in stages 1 and 2: 20.6 M parameters, 4.3 GMACs, 83.2 % top-1 in the paper (its EMA)."""
    settings = dict(depths=CSWIN_DEPTHS["tiny"], drop_path_rate=0.2)
    return create_host(CSWinHost, "inline_cswin_tiny", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-S, InLine in stages 1 and 2: 33.0 M parameters, 6.8 GMACs, 83.8 % top-1 in the paper (its EMA)."""
    settings = dict(depths=CSWIN_DEPTHS["small"], drop_path_rate=0.4)
    return create_host(CSWinHost, "inline_cswin_small", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-B, InLine in stages 1 and 2: 73.4 M parameters, 14.9 GMACs, 84.5 % top-1 in the paper (its EMA)."""
    settings = dict(embed_dim=96, depths=CSWIN_DEPTHS["base"], num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
    return create_host(CSWinHost, "inline_cswin_base", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def inline_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-B at 384 px: 73.4 M parameters, 46.3 GMACs, 85.7 % top-1 in the paper (its EMA)."""
    settings = dict(
        img_size=384, embed_dim=96, depths=CSWIN_DEPTHS["base"], num_heads=(4, 8, 16, 32), drop_path_rate=0.7
    )
    return create_host(CSWinHost, "inline_cswin_base_384", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def test_inline_deit(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """A small InLine-DeiT for tests and demonstrations; not published."""
    settings = dict(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=4, drop_path_rate=0.0)
    return create_host(ViTHost, "test_inline_deit", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def test_inline_swin(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """A small InLine-Swin for tests and demonstrations; not published."""
    settings = dict(
        img_size=96, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), attn_type="IIMS1", mlp_ratio=3.0
    )
    return create_host(SwinHost, "test_inline_swin", pretrained, {**_SWIN, **settings}, kwargs)
