"""Agent Attention in four hosts: DeiT, PVT, Swin and CSWin.

Paper: 'Agent Attention: On the Integration of Softmax and Linear Attention' (ECCV 2024),
https://arxiv.org/abs/2312.08874. Reference: https://github.com/LeapLabTHU/Agent-Attention (no licence; written from the
paper's formulas and measured behaviour, no code taken). Parameter names are the authors', so that their files load.
"""

from typing import Any

from visionattn._timm import generate_default_cfgs, register_model

from ._hosts import CSWIN_DEPTHS, PVT_DEPTHS, create_host, host_cfg
from ._shipped import digits_cfgs
from .cswin import CSWinHost
from .pvt import PVTHost
from .swin import SwinHost
from .vit import ViTHost

_DEIT = dict(attn_layer="agent", agent_num=(49, 49, 49, 49))
_PVT = dict(attn_layer="agent", attn_type="AAAA", agent_sr_ratios="1111", agent_num=(9, 16, 49, 49))
_SWIN = dict(attn_layer="agent", agent_num=(9, 16, 49, 49))
_CSWIN = dict(attn_layer="agent", attn_type="AABB", agent_num=(9, 16, 49, 49))


def _cfg(host: type, size: int = 224, checkpoint: str = "", **kwargs: Any) -> dict[str, Any]:
    return host_cfg(
        host,
        size,
        url=f"https://cloud.tsinghua.edu.cn/f/{checkpoint}/?dl=1" if checkpoint else "",
        paper_ids="arXiv:2312.08874",
        paper_name="Agent Attention: On the Integration of Softmax and Linear Attention",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "agent_deit_tiny.in1k": _cfg(ViTHost, checkpoint="57e0904221824ee7b7af"),
        "agent_deit_small.in1k": _cfg(ViTHost, checkpoint="fdd43304372541db8ea7"),
        "agent_deit_small_448.in1k": _cfg(ViTHost, 448, checkpoint="a228f86241c445f1969b"),
        "agent_deit_base.in1k": _cfg(ViTHost, checkpoint="5115f15fdd7e4ab58fbc"),
        "agent_pvt_tiny.in1k": _cfg(PVTHost, checkpoint="13fdf0e0a7c5498c934f"),
        "agent_pvt_small.in1k": _cfg(PVTHost, checkpoint="36b8be9a8863456685a3"),
        "agent_pvt_medium.in1k": _cfg(PVTHost, checkpoint="4d00ecacf18b45f9b88c"),
        "agent_pvt_medium_256.in1k": _cfg(PVTHost, 256, checkpoint="654df734121643b19c52"),
        "agent_pvt_large.in1k": _cfg(PVTHost, checkpoint="040cfe0cfbbe4762ad09"),
        "agent_swin_tiny.in1k": _cfg(SwinHost, checkpoint="a2ddc1190c224f768a41"),
        "agent_swin_small.in1k": _cfg(SwinHost, checkpoint="f607172c9fea4d6e99bb"),
        "agent_swin_small_288.in1k": _cfg(SwinHost, 288, checkpoint="09760394e93b4046a25e"),
        "agent_swin_base.in1k": _cfg(SwinHost, checkpoint="4fcd2d0114bb490483c3"),
        "agent_swin_base_384.in1k": _cfg(SwinHost, 384, checkpoint="bb84ee9058954706a557", crop_pct=1.0),
        "agent_cswin_tiny.in1k": _cfg(CSWinHost, checkpoint="8c562a74441e46d5902b"),
        "agent_cswin_small.in1k": _cfg(CSWinHost, checkpoint="30eb8af675bc4b7a8747"),
        "agent_cswin_base.in1k": _cfg(CSWinHost, checkpoint="c8035b0839b2410c8c9f"),
        "agent_cswin_base_384.in1k": _cfg(CSWinHost, 384, checkpoint="1239be0df44b47719432"),
        **digits_cfgs("test_agent_deit", _cfg(ViTHost, 64), 64, takes_size=True),
        **digits_cfgs("test_agent_swin", _cfg(SwinHost, 96), 64, takes_size=True),
    }
)


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """192 wide, 12 blocks: 6.0 M parameters, 1.2 GMACs, 74.9 % top-1 in the paper."""
    settings = dict(embed_dim=192, num_heads=3)
    return create_host(ViTHost, "agent_deit_tiny", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """384 wide, 12 blocks: 22.7 M parameters, 4.4 GMACs, 80.5 % top-1 in the paper."""
    settings = dict(embed_dim=384, num_heads=6, drop_path_rate=0.1)
    return create_host(ViTHost, "agent_deit_small", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def agent_deit_small_448(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """384 wide at 448 px: 23.1 M parameters, 17.7 GMACs, 83.1 % top-1 in the paper."""
    settings = dict(img_size=448, embed_dim=384, num_heads=6, drop_path_rate=0.1)
    return create_host(ViTHost, "agent_deit_small_448", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """768 wide, agents in the first 4 of 12 blocks: 87.2 M parameters, 17.6 GMACs, 82.0 % top-1 in the paper."""
    settings = dict(embed_dim=768, num_heads=12, agent_num=(81, 81, 81, 81), agent_layer=4, drop_path_rate=0.3)
    return create_host(ViTHost, "agent_deit_base", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Tiny: 11.6 M parameters, 2.0 GMACs, 78.4 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["tiny"], drop_path_rate=0.1)
    return create_host(PVTHost, "agent_pvt_tiny", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Small: 20.6 M parameters, 4.0 GMACs, 82.2 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["small"], drop_path_rate=0.1)
    return create_host(PVTHost, "agent_pvt_small", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Medium: 35.9 M parameters, 7.0 GMACs, 83.4 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["medium"], drop_path_rate=0.3)
    return create_host(PVTHost, "agent_pvt_medium", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def agent_pvt_medium_256(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Medium at 256 px: 36.1 M parameters, 9.2 GMACs, 83.8 % top-1 in the paper."""
    settings = dict(img_size=256, depths=PVT_DEPTHS["medium"], drop_path_rate=0.3)
    return create_host(PVTHost, "agent_pvt_medium_256", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> PVTHost:
    """PVT-Large: 48.7 M parameters, 10.4 GMACs, 83.7 % top-1 in the paper."""
    settings = dict(depths=PVT_DEPTHS["large"], drop_path_rate=0.3)
    return create_host(PVTHost, "agent_pvt_large", pretrained, {**_PVT, **settings}, kwargs)


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-T, agents in stages 1 to 3: 28.9 M parameters, 4.5 GMACs, 82.6 % top-1 in the paper."""
    settings = dict(depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), attn_type="AAAB", drop_path_rate=0.2)
    return create_host(SwinHost, "agent_swin_tiny", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-S, agents in stages 1 and 2: 49.7 M parameters, 8.7 GMACs, 83.7 % top-1 in the paper."""
    settings = dict(depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), attn_type="AABB", drop_path_rate=0.3)
    return create_host(SwinHost, "agent_swin_small", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def agent_swin_small_288(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-S at 288 px: 49.7 M parameters, 14.6 GMACs, 84.1 % top-1 in the paper."""
    settings = dict(img_size=288, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), attn_type="AABB", drop_path_rate=0.3)
    return create_host(SwinHost, "agent_swin_small_288", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-B, agents in stages 1, 2 and 2 blocks of 3: 88.1 M parameters, 15.4 GMACs, 84.0 % top-1 in the paper."""
    settings = dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), attn_type="AAMB2", drop_path_rate=0.5
    )
    return create_host(SwinHost, "agent_swin_base", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def agent_swin_base_384(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """Swin-B at 384 px: 88.3 M parameters, 46.3 GMACs, 84.9 % top-1 in the paper."""
    settings = dict(
        img_size=384,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        attn_type="AAMB2",
        drop_path_rate=0.5,
    )
    return create_host(SwinHost, "agent_swin_base_384", pretrained, {**_SWIN, **settings}, kwargs)


@register_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-T, agents in stages 1 and 2: 20.5 M parameters, 4.3 GMACs, 83.1 % top-1 in the paper (its EMA)."""
    settings = dict(depths=CSWIN_DEPTHS["tiny"], drop_path_rate=0.2)
    return create_host(CSWinHost, "agent_cswin_tiny", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-S, agents in stages 1 and 2: 32.8 M parameters, 6.8 GMACs, 83.9 % top-1 in the paper (its EMA)."""
    settings = dict(depths=CSWIN_DEPTHS["small"], drop_path_rate=0.4)
    return create_host(CSWinHost, "agent_cswin_small", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-B, agents in stages 1 and 2: 73.2 M parameters, 14.9 GMACs, 84.7 % top-1 in the paper (its EMA)."""
    settings = dict(embed_dim=96, depths=CSWIN_DEPTHS["base"], num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
    return create_host(CSWinHost, "agent_cswin_base", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def agent_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> CSWinHost:
    """CSWin-B at 384 px: 73.3 M parameters, 46.3 GMACs, 85.8 % top-1 in the paper (its EMA)."""
    settings = dict(
        img_size=384, embed_dim=96, depths=CSWIN_DEPTHS["base"], num_heads=(4, 8, 16, 32), drop_path_rate=0.7
    )
    return create_host(CSWinHost, "agent_cswin_base_384", pretrained, {**_CSWIN, **settings}, kwargs)


@register_model
def test_agent_deit(pretrained: bool = False, **kwargs: Any) -> ViTHost:
    """A small Agent-DeiT for tests and demonstrations; not published."""
    settings = dict(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2, agent_num=9)
    return create_host(ViTHost, "test_agent_deit", pretrained, {**_DEIT, **settings}, kwargs)


@register_model
def test_agent_swin(pretrained: bool = False, **kwargs: Any) -> SwinHost:
    """A small Agent-Swin for tests and demonstrations; not published."""
    settings = dict(
        img_size=96,
        embed_dim=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        attn_type="AAMB1",
        agent_num=(9, 9, 4, 4),
        mlp_ratio=3.0,
    )
    return create_host(SwinHost, "test_agent_swin", pretrained, {**_SWIN, **settings}, kwargs)
