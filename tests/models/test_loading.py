"""Authors' files through ``timm.create_model``: what loads, and what is said of a file that doesn't."""

import argparse
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import visionattn  # noqa: F401  registers the models
from tests.conformance.selection import ours
from visionattn.models._checkpoint import WRAPPERS, CheckpointError, read_state_dict, unwrap_state_dict

NAME = "test_ninformer"


def create(file, name=NAME, overlay=None, **kwargs):
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file), **(overlay or {})}, **kwargs
    )


def weights(name=NAME, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs)
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


def assert_holds(model, state, but=()):
    own = model.state_dict()
    assert [key for key in own if key not in but and not torch.equal(own[key], state[key])] == []


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def config_class(request):
    """A class named as the one in published files, there while a file is written and gone when it is read."""
    module_name, _, class_name = request.param.rpartition(".")
    if request.param == "argparse.Namespace":
        yield argparse.Namespace(model="x", nested=argparse.Namespace(depth=(1, 2)))
        return
    module = types.ModuleType(module_name)
    cls = type(class_name, (dict,), {"__module__": module_name})
    setattr(module, class_name, cls)
    sys.modules["yacs"], sys.modules[module_name] = types.ModuleType("yacs"), module
    value = cls(MODEL=cls(DEPTH=[1, 2], NAME="x"))
    value.__dict__["_immutable"] = True  # as yacs keeps it
    try:
        yield value
    finally:
        del sys.modules[module_name], sys.modules["yacs"]


@pytest.mark.parametrize("config_class", ["yacs.config.CfgNode", "argparse.Namespace"], indirect=True)
def test_configurations_beside_the_weights(tmp_path, config_class, monkeypatch):
    state = weights()
    file = tmp_path / "official.pth"
    torch.save({"model": state, "epoch": 3, "config": config_class, "optimizer": {"state": {}}}, file)
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    allowed = set(torch.serialization.get_safe_globals())
    assert_holds(create(file), state)
    assert set(torch.serialization.get_safe_globals()) == allowed  # around the load only
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers(tmp_path, wrapper, prefix):
    state = weights()
    torch.save({wrapper: {prefix + key: value for key, value in state.items()}, "epoch": 1}, tmp_path / "x.pth")
    assert_holds(create(tmp_path / "x.pth"), state)


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema", "ema"])
@pytest.mark.parametrize("plain", ["model", "state_dict"])
def test_average_wins(tmp_path, ema, plain):
    averaged, current = weights(seed=1), weights(seed=2)
    torch.save({plain: current, ema: averaged}, tmp_path / "x.pth")
    assert_holds(create(tmp_path / "x.pth"), averaged)
    torch.save({plain: current, ema: None}, tmp_path / "x.pth")
    assert_holds(create(tmp_path / "x.pth"), current)


def test_safetensors_and_legacy_format(tmp_path):
    state = weights()
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_holds(create(tmp_path / "x.safetensors"), state)
    assert_holds(create(tmp_path / "old.pth"), state)


def test_nothing_of_the_loading_stays_in_the_model(tmp_path):
    torch.save(weights(), tmp_path / "x.pth")
    model = create(tmp_path / "x.pth")
    assert "state_dict" not in model.pretrained_cfg
    assert "source" not in model.pretrained_cfg
    assert model.pretrained_cfg["file"] == str(tmp_path / "x.pth")


def test_local_dir(tmp_path):
    model = timm.create_model(NAME, num_classes=7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_holds(loaded, model.state_dict())
    assert loaded.pretrained_cfg["source"] == "local-dir"
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError) as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    one_line(error, str(file), "truncated")
    file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    one_line(error, str(tmp_path), "model.safetensors")


# heads ----------------------------------------------------------------------------------------------------------------


def test_head_of_the_declared_size_is_left_out(tmp_path):
    state = weights()
    torch.save(state, tmp_path / "x.pth")
    model = create(tmp_path / "x.pth", num_classes=7)
    assert model.classifier.out_features == 7
    assert_holds(model, state, but=("classifier.weight", "classifier.bias"))
    assert_holds(create(tmp_path / "x.pth", num_classes=0), state)


def test_head_of_the_models_size_is_loaded(tmp_path):
    """timm alone would drop it: its cfg says 1000."""
    state = weights(num_classes=7)
    torch.save(state, tmp_path / "x.pth")
    assert_holds(create(tmp_path / "x.pth", num_classes=7), state)
    assert_holds(create(tmp_path / "x.pth", overlay=dict(num_classes=7)), state)


def test_head_of_another_size(tmp_path):
    torch.save(weights(num_classes=7), tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        create(tmp_path / "x.pth")
    one_line(error, "x.pth", "(7, 64) in the file, (1000, 64) in the model", "num_classes=7 in pretrained_cfg_overlay")
    model = create(tmp_path / "x.pth", num_classes=1000, overlay=dict(num_classes=7))  # the advice
    assert model.classifier.out_features == 1000


def test_no_head(tmp_path):
    state = {key: value for key, value in weights("test_ela").items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        create(tmp_path / "x.pth", "test_ela")
    one_line(error, "x.pth", "num_classes=0")
    assert_holds(create(tmp_path / "x.pth", "test_ela", num_classes=0), state)
    features = create(tmp_path / "x.pth", "test_ela", features_only=True)
    assert torch.equal(features.state_dict()["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])
    assert "state_dict" not in features.pretrained_cfg


def test_first_convolution_adapts(tmp_path):
    state = weights()
    torch.save(state, tmp_path / "x.pth")
    model = create(tmp_path / "x.pth", in_chans=1)
    torch.testing.assert_close(model.patcher.weight, state["patcher.weight"].sum(1, keepdim=True))
    assert_holds(model, state, but=("patcher.weight",))


def test_counters_may_be_absent(tmp_path):
    state = {key: value for key, value in weights("test_ela").items() if value.is_floating_point()}
    torch.save(state, tmp_path / "x.pth")
    assert_holds(create(tmp_path / "x.pth", "test_ela"), state, but=[k for k in weights("test_ela") if k not in state])


# files that can't be used ---------------------------------------------------------------------------------------------


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        create(tmp_path / "none.pth")
    one_line(error, str(tmp_path / "none.pth"), "does not exist")
    with pytest.raises(FileNotFoundError) as error:
        create(tmp_path)
    one_line(error, "is a folder")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".old"])
def test_truncated(tmp_path, suffix, keep):
    whole, file = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(weights(), whole)
    else:
        torch.save(weights(), whole, _use_new_zipfile_serialization=suffix == ".pth")
    content = whole.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError) as error:
        create(file)
    one_line(error, str(file), "fetch it again")


class Malicious:
    """Would write a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class Shell(Malicious):
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", [Malicious, Shell])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused(tmp_path, kind, zipped):
    file, trace = tmp_path / "bad.pth", tmp_path / "trace"
    torch.save({"model": weights(), "extra": kind(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        create(file)
    one_line(error, str(file), "holds more than tensors", "trust")
    if zipped:
        one_line(error, "Path" if kind is Malicious else "system")
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the trap is one
    assert trace.exists()


def test_whole_model_is_refused(tmp_path):
    torch.save(timm.create_model(NAME), tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as error:
        create(tmp_path / "model.pth")
    one_line(error, "visionattn.layers.nin", "save the state dict")


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {}, {"epoch": 3}, {"model": {}}])
def test_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        create(tmp_path / "x.pth")
    one_line(error, str(tmp_path / "x.pth"), "state dict")


@pytest.mark.parametrize("name, other", [(NAME, "test_ela"), ("test_ela", NAME), ("test_ulsam", "test_ela")])
@pytest.mark.parametrize("num_classes", [1000, 0])
def test_another_models_file(tmp_path, name, other, num_classes):
    """Also where the head is left out, for which timm alone loads nothing at all and says nothing."""
    torch.save(weights(other), tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        create(tmp_path / "x.pth", name, num_classes=num_classes)
    one_line(error, str(tmp_path / "x.pth"), f"does not fit {name}", "lacks", "are not the model's")


def test_another_size_of_the_model(tmp_path):
    torch.save(weights(embed_dim=32), tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        create(tmp_path / "x.pth", num_classes=7)
    one_line(error, "shapes differ", "patcher.weight is (32, 3, 4, 4) in the file, (64, 3, 4, 4) in the model")


def test_no_weights_for_the_name():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_ninformer") as error:
        timm.create_model(NAME, pretrained=True)
    one_line(error)


def test_errors_of_the_constructor_pass(tmp_path):
    torch.save(weights(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="patches"):
        create(tmp_path / "x.pth", img_size=33)


@pytest.mark.parametrize("name", ours())
def test_every_model_loads_this_way(name, tmp_path):
    """Not by timm's function of the same name, which says nothing of a file that is not there."""
    with pytest.raises(FileNotFoundError, match="does not exist: give the path"):
        create(tmp_path / "none.pth", name)


@pytest.mark.parametrize(
    "name", ["test_agent_swin", "test_ela", "test_halo", "test_mala", "test_moh_vit", "test_ulsam"]
)
def test_backbone_in_a_detectors_file(name, tmp_path):
    state = weights(name, num_classes=0)
    detector = {f"module.backbone.{key}": value for key, value in state.items()}
    torch.save({"state_dict": detector | {"module.neck.weight": torch.ones(2)}}, tmp_path / "detector.pth")
    assert_holds(create(tmp_path / "detector.pth", name, num_classes=0), state)


def test_unwrap_leaves_names_that_look_like_wrappers():
    state = {"model.0.weight": torch.ones(1), "module.bias": torch.ones(1)}
    assert unwrap_state_dict(state) == state


def test_read_state_dict(tmp_path):
    torch.save({"ema": {"module.a": torch.ones(2)}, "model": {"a": torch.zeros(2)}}, tmp_path / "x.pth")
    assert torch.equal(read_state_dict(tmp_path / "x.pth")["a"], torch.ones(2))
