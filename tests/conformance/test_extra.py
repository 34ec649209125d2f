"""What timm's suite does not enumerate: export, compilation, layouts, sizes, saving, provenance.

Over every ``test_*`` model; over every registered name with ``VISIONATTN_CONFORMANCE=all`` (as the conformance suite).
"""

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint, save_for_hf

import visionattn  # noqa: F401  (registers the models)
from tests.extras import require_extra
from visionattn._meta import NoInit

from .selection import everything, excluded, input_size, ours, small

NAMES = ours() if everything() else small()


def over_models(test: str):
    """Parametrizes with the model names, less those excused from ``test`` in selection.EXCLUSIONS."""
    return pytest.mark.parametrize("name", [name for name in NAMES if not excluded(name, test)])


def build(name: str, batch: int = 2, size: tuple[int, int] | None = None, **kwargs):
    """(model in eval mode, input), with values that do not hide anything.

    A fresh network has zeros where training starts from an identity (the last norm of a residual block, biases): they
    would cut the mechanism under test out of the output. So constants are moved, and the norms' running statistics.
    Only a little: residual branches at full strength make a deep random network amplify rounding a million times.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter) * 0.05)
                if parameter.ndim == 1 and key.endswith("weight") and parameter.mean().abs() < 0.5:
                    parameter.add_(0.2)
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    chans, height, width = input_size(name)
    return model, torch.randn(batch, chans, *(size or (height, width)))


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Norm of the difference over the norm of what is expected, of an output that says something."""
    assert got.shape == expected.shape
    assert torch.isfinite(expected).all()
    assert expected.std() > 1e-6, "the output is constant: nothing is compared"
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


@over_models("export")
def test_export(name, tmp_path):
    """torch.export, saved and loaded, computes the same."""
    model, x = build(name)
    with torch.no_grad():
        expected = model(x)
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert_same(loaded(x), expected)
        other = torch.randn_like(x)  # a constant folded from the first input would show
        assert_same(loaded(other), model(other))


@over_models("compile")
def test_compile(name):
    """torch.compile(fullgraph=True): forward and backward without a graph break; code is generated below only.

    What inference runs is traced without a break too; test_export takes that graph further.
    """
    torch.compiler.reset()
    model, x = build(name)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected, got = model(x), compiled(x)
    assert_same(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    with torch.no_grad():
        assert_same(torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")(x), model(x))
    gradients = dict(model.named_parameters())
    for key, parameter in compiled._orig_mod.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[key].grad, rtol=1e-3, atol=1e-3 * scale(gradients[key].grad)
        )


def scale(x: torch.Tensor) -> float:
    return x.abs().max().item()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["test_halo"])
def test_compile_inductor(name):
    """With the default compiler, for the model whose operator is registered with torch.library."""
    torch.compiler.reset()
    model, x = build(name)
    with torch.no_grad():
        assert_same(torch.compile(copy.deepcopy(model), fullgraph=True)(x), model(x))


@over_models("channels_last")
def test_channels_last(name):
    model, x = build(name)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        assert_same(model(x.to(memory_format=torch.channels_last)), expected)


@over_models("batch")
def test_batch_is_one_by_one(name):
    """An image's output does not depend on its neighbours in the batch."""
    model, x = build(name, batch=3)
    with torch.no_grad():
        assert_same(model(x), torch.cat([model(image[None]) for image in x]))


@over_models("bf16")
def test_bf16_after_float32(name):
    """A forward in float32 leaves nothing behind that a bfloat16 one trips over; and back again."""
    model, x = build(name)
    fresh = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        fresh = fresh(x.bfloat16())
        converted = model.to(torch.bfloat16)(x.bfloat16())
    assert converted.dtype == torch.bfloat16
    assert torch.equal(converted, fresh)
    assert_same(converted, expected, tolerance=0.1)
    with torch.no_grad():
        assert model.float()(x).dtype == torch.float32


@over_models("sizes")
def test_odd_sizes(name):
    """Odd and non-square inputs where the size is free; else a clear error, and a model made for another size."""
    if get_pretrained_cfg(name).fixed_input_size:
        model, x = build(name)
        height, width = x.shape[2:]
        with pytest.raises((AssertionError, ValueError), match=str(height)):
            model(torch.randn(1, x.shape[1], height + 1, width + 3))
        model, x = build(name, size=(2 * height, width), img_size=(2 * height, width))
        with torch.no_grad():
            assert_same(model(x), torch.cat([model(image[None]) for image in x]))
        return
    for height, width in ((97, 97), (64, 120), (101, 75)):
        model, x = build(name, size=(height, width))
        with torch.no_grad():
            assert_same(model(x), torch.cat([model(image[None]) for image in x]))
            maps = model.forward_features(x)
        reduction = model.feature_info[-1]["reduction"]
        if maps.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW":
            assert abs(maps.shape[2] - height / reduction) < 1 and abs(maps.shape[3] - width / reduction) < 1


@over_models("local_dir")
def test_save_and_load(name, tmp_path):
    """save_for_hf, then ``local-dir:``: with another number of classes than the default, in safetensors only."""
    model, x = build(name, num_classes=7)
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    assert not list((tmp_path / "saved").glob("*.bin"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architecture"] == name
    assert config["num_classes"] == 7
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        # other heads and inputs adapt
        assert timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=0)(x).shape[0] == len(
            x
        )
        grey = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, in_chans=1, num_classes=3)
        assert grey(x[:, :1]).shape == (len(x), 3)


@pytest.mark.parametrize("name", [name for name in (NAMES if everything() else small()) if not excluded(name, "onnx")])
def test_onnx(name, tmp_path):
    """ONNX, by PyTorch's exporter, agrees with onnxruntime to 1e-4: one model a family (the ``test_*`` ones)."""
    require_extra("onnx")
    require_extra("onnxscript")
    onnxruntime = require_extra("onnxruntime")
    model, x = build(name)
    path = tmp_path / "model.onnx"
    with torch.no_grad():
        expected = model(x)
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(got), expected, tolerance=1e-4)


@over_models("copy")
def test_deepcopy_and_pickle(name):
    model, x = build(name)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


@pytest.mark.parametrize("name", ours())
def test_meta_device(name):
    """Built without memory, also under a device context, with every parameter and buffer there."""
    with NoInit():
        by_argument = timm.create_model(name, device="meta")
    with torch.device("meta"), NoInit():
        by_context = timm.create_model(name)
    for model in (by_argument, by_context):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        assert [key for key, tensor in tensors if tensor.device.type != "meta"] == []


@pytest.mark.parametrize("name", small())
def test_small_models_are_small(name):
    parameters = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
    assert parameters <= 500_000


def test_every_family_has_a_small_model():
    families = {model_entrypoint(name).__module__ for name in ours()}
    assert {model_entrypoint(name).__module__ for name in small()} == families


@pytest.mark.parametrize("name", ours())
def test_provenance(name):
    """License, paper and origin are what becomes the model card."""
    cfg = get_pretrained_cfg(name)
    assert cfg.license
    assert cfg.paper_name
    assert cfg.paper_ids and str(cfg.paper_ids).startswith("arXiv:")
    assert str(cfg.origin_url).startswith("https://")
    assert cfg.input_size[0] in (1, 3)
    assert len(cfg.mean) == len(cfg.std) == cfg.input_size[0]


def test_names_are_free_in_timm():
    """No name of ours is timm's: registering one again would evict timm's model, with a mere warning."""
    code = """
import json, timm
from timm.models import model_entrypoint
theirs = {name: model_entrypoint(name).__module__ for name in timm.list_models()}
import visionattn
after = {name: model_entrypoint(name).__module__ for name in timm.list_models()}
print(json.dumps({
    "evicted": [name for name in theirs if after.get(name) != theirs[name]],
    "new": len(after) - len(theirs),
    "modules": sorted(
        {m.rsplit(".", 1)[1] for m in after.values() if m.startswith("visionattn")}
        & {m.rsplit(".", 1)[1] for m in theirs.values()}
    ),
}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["evicted"] == []
    assert found["new"] == len(ours())
    assert found["modules"] == []  # list_models(module=...) looks at the last part only
