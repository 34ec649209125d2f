"""What the reference implementations of the modules compute."""

import json

import pytest
import torch

import visionattn
from tests.fixtures import FIXTURES, relative_error
from tests.fixtures import fixtures as fx
from visionattn.layers import MixerBlock

TOLERANCE = 1e-6


def names(system: str, start: str) -> list[str]:
    return sorted(p.stem for p in (FIXTURES / system).glob(f"{start}*.json"))


def load(module: torch.nn.Module, manifest: dict) -> torch.nn.Module:
    """Loads the fixture's own names; nothing may be left over or missing."""
    state = {k: torch.from_numpy(v) for k, v in fx.state_dict(manifest).items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    assert sum(p.numel() for p in module.parameters()) == manifest["num_params"]
    return module.eval()


def config_of(manifest: dict, *drop: str) -> dict:
    return {k: v for k, v in manifest["config"].items() if k not in drop}


@pytest.mark.parametrize("name", [n for n in names("ela", "ela_") if "_c" in n])
def test_ela(name):
    manifest, expected = fx.load(FIXTURES / "ela" / name)
    version = manifest["config"]["version"]
    module = load(visionattn.create_module(f"ela_{version[-1].lower()}", **config_of(manifest)), manifest)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    a_h, a_w = module.gates(x)
    assert relative_error(module(x), expected["out"]) < TOLERANCE
    assert relative_error(a_h, expected["a_h"]) < TOLERANCE
    assert relative_error(a_w, expected["a_w"]) < TOLERANCE


@pytest.mark.parametrize("name", names("ulsam", "ulsam_"))
def test_ulsam(name):
    manifest, expected = fx.load(FIXTURES / "ulsam" / name)
    module = load(visionattn.create_module("ulsam", **config_of(manifest)), manifest)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    attn = module.attention(x) * (x.shape[2] * x.shape[3])
    assert relative_error(module(x), expected["out"]) < TOLERANCE
    # the output hardly depends on the map (it adds 1 / (h w) to 1), so the map itself is the test
    assert relative_error(attn, expected["attn"]) < TOLERANCE


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("name", names("halonet", "timm_d"))
def test_halo_timm_layout(name, as_tokens):
    manifest, expected = fx.load(FIXTURES / "halonet" / name)
    module = load(visionattn.create_module("halo", **config_of(manifest)), manifest)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    out = module(x)
    if as_tokens:
        tokens = module(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))
        out = tokens.transpose(1, 2).reshape(out.shape)
    assert relative_error(out, expected["out"]) < TOLERANCE


@pytest.mark.parametrize("border, key", [("mask", "masked"), ("zero", "unmasked")])
@pytest.mark.parametrize("name", names("halonet", "lucid_"))
def test_halo_other_layout(name, border, key):
    manifest, expected = fx.load(FIXTURES / "halonet" / name)
    module = load(visionattn.create_module("halo", border=border, **config_of(manifest)), manifest)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    assert relative_error(module(x), expected[key]) < TOLERANCE


def test_nin_block():
    manifest, expected = fx.load(FIXTURES / "ninformer/nin_block")
    module = load(visionattn.create_module("nin", **config_of(manifest, "class")), manifest)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    n = module.norm(x)
    assert relative_error(module(x, (3, 5)), expected["y"]) < TOLERANCE
    assert relative_error(module.mgu.Mixer(n), expected["gate"]) < TOLERANCE
    assert relative_error(module.mgu(n), expected["gated"]) < TOLERANCE
    assert relative_error(module.mgu.Mixer.token_mix(n), expected["token_mix"]) < TOLERANCE


def test_mixer_block():
    manifest, expected = fx.load(FIXTURES / "ninformer/mixer_block")
    module = load(MixerBlock(**config_of(manifest, "class")), manifest)
    x = torch.from_numpy(fx.inputs(manifest)["x"])
    assert relative_error(module(x), expected["y"]) < TOLERANCE


def test_every_fixture_is_used():
    """A fixture that no test names is a fixture that no test checks (timm's own networks are timm's to check)."""
    from tests.models.test_model_fixtures import LOGITS

    used = set(LOGITS) | {"ela/ela_s_resnet18_os16", "ela/ela_t_resnet50_os32"}
    used |= {"halonet/timm_halonet26t", "halonet/timm_halonet_h1", "ninformer/nin_block", "ninformer/mixer_block"}
    used |= {f"ela/{n}" for n in names("ela", "ela_") if "_c" in n} | {f"ulsam/{n}" for n in names("ulsam", "ulsam_")}
    used |= {f"halonet/{n}" for n in names("halonet", "timm_d") + names("halonet", "lucid_")}
    # tests/detection/test_dense*.py check these
    used |= {f"ela/{n}" for n in ("ela_t_yolof_encoder", "ela_t_yolox_nano_voc", "ela_s_deeplabv3_resnet18_os16")}
    files = [p for system in ("ela", "halonet", "ninformer", "ulsam") for p in (FIXTURES / system).glob("*.json")]
    present = {f"{p.parent.name}/{p.stem}" for p in files if "outputs" in json.loads(p.read_text())}
    assert present == used
