"""The substitute for ``mmcv._ext``: equal to mmcv's kernels, and its gradients are those of what it computes."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.extras import require_extra

require_extra("mmcv", "detection")
require_extra("mmdet", "detection")

from visionattn.detection import ensure_mmcv_ops, mmcv_ext, tool  # noqa: E402
from visionattn.detection.mmcv_ext import late  # noqa: E402
from visionattn.detection.mmcv_ext.nms import _threshold as nms_threshold  # noqa: E402

ensure_mmcv_ops()
import mmcv  # noqa: E402
import mmcv._ext as ext  # noqa: E402
from mmcv import ops  # noqa: E402

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mmcv_ops"
pytestmark = pytest.mark.skipif("mmcv_ext" not in str(ext.__spec__.origin), reason="mmcv is compiled here")
# relative to the largest value: float32 coordinates are computed in another order
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}


def recorded(file: str):
    """The recorded calls: operator, tensors, numbers, results by name."""
    data = np.load(FIXTURES / f"{file}.npz")
    for i, call in enumerate(json.loads(str(data["calls"]))):
        parts = [
            {key.split("/")[2]: torch.from_numpy(data[key].copy()) for key in data.files if key.startswith(f"{i}/{p}/")}
            for p in ("in", "out")
        ]
        yield call["operator"], parts[0], call["numbers"], parts[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("file", ["nms", "roi_align", "roi_pool", "focal_loss", "deform_conv", "ms_deform_attn"])
def test_equals_mmcv(file, device):
    """Every recorded call gives what mmcv's kernel gave, in place and returned."""
    count = 0
    for operator, tensors, numbers, expected in recorded(file):
        if operator not in ("softnms", "nms_match"):  # mmcv takes their tensors to the CPU
            tensors = {name: t.to(device) for name, t in tensors.items()}
        returned = getattr(ext, operator)(**tensors, **numbers)
        if isinstance(returned, list):
            assert all(type(i) is int for group in returned for i in group)
            returned = torch.tensor([[i, index] for i, group in enumerate(returned) for index in group])
        for name, value in expected.items():
            result = (returned if name == "returned" else tensors[name][: len(value)]).cpu()
            assert (result.dtype, result.shape) == (value.dtype, value.shape), (operator, name)
            tolerance = TOLERANCE.get(value.dtype, 0) * float(value.abs().max())
            torch.testing.assert_close(result, value, rtol=0, atol=tolerance, msg=lambda m: f"{operator} {name}: {m}")  # noqa: B023
        count += 1
    assert count >= 4


def test_recorded_nms_has_one_answer():
    """No recorded call of a sorting operator hangs on the order of equal scores or on an overlap's last bits."""
    for operator, tensors, numbers, _ in recorded("nms"):
        if operator == "softnms":  # it does not sort
            continue
        boxes = tensors["boxes"] if operator == "nms" else tensors["dets"][:, :4]
        scores = tensors["scores"] if operator == "nms" else tensors["dets"][:, 4]
        assert len(scores.unique()) == len(scores)
        low, high = boxes.double().split(2, dim=1)
        high = high + numbers.get("offset", 0)
        inter = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).clamp(min=0).prod(-1)
        area = (high - low).prod(-1)
        gap = (inter / (area[:, None] + area - inter) - numbers["iou_threshold"]).abs()
        # exactly at the threshold: whole numbers, which every order of operations computes alike
        exact = (gap < 1e-12) & (boxes == boxes.round()).all()
        assert gap[~exact].min() > 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equal_scores_and_overlaps_at_the_threshold(device):
    """Equal scores come in ``Tensor.sort``'s order, as mmcv's; an overlap equal to the threshold is not above it."""
    torch.manual_seed(0)
    for number in (20, 200, 5000):  # a GPU sorts these in different ways
        boxes = (torch.rand(number, 4) * 100).sort(dim=1).values.to(device)
        scores = (torch.rand(number) * 10).round().to(device)
        order = scores.sort(descending=True).indices
        ranks = torch.empty_like(scores)
        ranks[order] = torch.arange(number, 0, -1, dtype=ranks.dtype, device=device)
        for offset in (0, 1):
            kept = ext.nms(boxes, scores, iou_threshold=0.5, offset=offset)
            assert torch.equal(kept, ext.nms(boxes, ranks, iou_threshold=0.5, offset=offset))
    for dtype in (torch.float32, torch.float64):
        for offset in (0, 1):
            for tenths in range(1, 10):
                boxes = torch.tensor([[0, 0, 10, 10], [0, 0, tenths, 10]], dtype=dtype, device=device)
                boxes[:, 2:] -= offset
                at, below = (len(ext.nms(boxes, boxes[:, 2], t, offset)) for t in (tenths / 10, tenths / 10 - 1e-6))
                assert (at, below) == (2, 1), (dtype, offset, tenths)
                # a GPU's kernel takes a float: nothing may be lost on the way
                threshold = nms_threshold(tenths / 10, dtype)
                assert threshold == np.float32(threshold) and (dtype == torch.float32 or threshold >= tenths / 10)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rois(count: int = 5) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=torch.float64) * 20 - 2
    return torch.cat([torch.randint(0, 2, (count, 1)), corner, corner + torch.rand(count, 2) * 20], dim=1)


@pytest.mark.parametrize(
    "name",
    ["roi_align", "roi_align_max", "roi_pool", "sigmoid", "softmax", "deform", "modulated", "attention"],
)
def test_gradients(name):
    """mmcv's autograd functions over the substitute pass gradcheck in double precision."""
    torch.manual_seed(1)
    target, class_weight = torch.tensor([2, 0, 1, 3]), torch.rand(4, dtype=torch.float64)
    kernel = double(4, 1, 3, 2)
    shapes = torch.tensor([[3, 4], [2, 2]])
    calls = {
        "roi_align": (lambda x: ops.roi_align(x, rois_, (3, 2), 0.5, 0, "avg", True), double(2, 2, 8, 9)),
        "roi_align_max": (lambda x: ops.roi_align(x, rois_, (3, 2), 0.5, 0, "max", False), double(2, 2, 8, 9)),
        "roi_pool": (lambda x: ops.roi_pool(x, rois_, (3, 2), 0.5), double(2, 2, 8, 9)),
        "sigmoid": (lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, class_weight, "none"), double(4, 4)),
        "softmax": (lambda x: ops.softmax_focal_loss(x, target, 2.0, 0.25, class_weight, "mean"), double(4, 4)),
        "deform": (
            lambda x, o, w: ops.deform_conv2d(x, o, w, (2, 1), 1, (1, 2), 2, 2),
            *(double(2, 2, 5, 5), double(2, 24, 3, 5), kernel),
        ),
        "modulated": (
            lambda x, o, m, w, b: ops.modulated_deform_conv2d(x, o, m, w, b, (2, 1), 1, (1, 2), 2, 2),
            *(double(2, 2, 5, 5), double(2, 24, 3, 5), double(2, 12, 3, 5), kernel, double(4)),
        ),
        "attention": (
            lambda v, places, weights: ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply(
                v, shapes, torch.tensor([0, 12]), places, weights, 2
            ),
            *(double(1, 16, 2, 2), torch.rand(1, 2, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)),
            double(1, 2, 2, 2, 2),
        ),
    }
    rois_ = rois()
    function, *inputs = calls[name]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_weight_gradient_is_not_taken_from_another_call():
    """The weight's gradient that deformable convolution keeps belongs to one output gradient only."""
    torch.manual_seed(0)
    x, offset, weight = double(2, 2, 5, 5), double(2, 18, 5, 5), double(3, 2, 3, 3)
    out = ops.deform_conv2d(x, offset, weight, 1, 1)
    grads = [torch.autograd.grad(out, weight, torch.full_like(out, k), retain_graph=True)[0] for k in (1.0, 3.0)]
    both = torch.autograd.grad(out, (x, weight), torch.full_like(out, 3.0))[1]
    torch.testing.assert_close(grads[1], 3 * grads[0])
    torch.testing.assert_close(both, grads[1])


def test_memory_layout():
    """Channels-last tensors give what contiguous ones give."""
    torch.manual_seed(0)
    x, offset, weight, mask = double(2, 4, 6, 5), double(2, 18, 6, 5), double(3, 4, 3, 3), double(2, 9, 6, 5)
    results, rois_ = [], rois()
    for layout in (torch.contiguous_format, torch.channels_last):
        a, o, w, m = (t.detach().to(memory_format=layout).requires_grad_() for t in (x, offset, weight, mask))
        out = [
            ops.deform_conv2d(a, o, w, 1, 1),
            ops.modulated_deform_conv2d(a, o, m, w, None, 1, 1),
            ops.roi_align(a, rois_, 3, 0.5, 2, "max", True),
            ops.roi_align(a, rois_, 3, 0.5, 2, "avg", True),
            ops.roi_pool(a, rois_, 3, 0.5),
        ]
        results.append([*out, *torch.autograd.grad(sum((t**2).sum() for t in out), (a, o, w, m))])
    for plain, last in zip(*results, strict=True):
        torch.testing.assert_close(last, plain)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_under_autocast(dtype, device):
    """16-bit calls compute in float32 and round once, also inside autocast, and keep their type."""
    torch.manual_seed(0)
    with torch.device(device):
        check_sixteen_bits(dtype, device)


def check_sixteen_bits(dtype: torch.dtype, device: str) -> None:
    def same(result: torch.Tensor, exact: torch.Tensor) -> bool:
        if device == "cuda":  # float32 sums there may come in another order
            torch.testing.assert_close(result, exact.to(dtype))
        return result.dtype == dtype and (device == "cuda" or torch.equal(result, exact.to(dtype)))

    x, region = torch.randn(2, 3, 9, 9).to(dtype), rois().to(dtype)
    for mode in ("avg", "max"):
        exact = ops.roi_align(x.float(), region.float(), 3, 0.5, 2, mode, True)
        with torch.autocast(device, dtype=torch.bfloat16):
            result = ops.roi_align(x, region, 3, 0.5, 2, mode, True)
        assert same(result, exact)
    # the offset decides, as in mmcv: autocast made it 16 bits
    offset, weight = torch.randn(2, 18, 9, 9).to(dtype), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = ops.deform_conv2d(x.float(), offset, weight, 1, 1)
    exact = ops.deform_conv2d(x.float(), offset.float(), weight.to(dtype).float(), 1, 1)
    assert same(result, exact)
    result.sum().backward()
    assert weight.grad.dtype == torch.float32
    logits, target = torch.randn(6, 4).to(dtype), torch.randint(0, 5, (6,))
    exact = ops.sigmoid_focal_loss(logits.float(), target, 2.0, 0.25, None, "none")
    result = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    assert same(result, exact)
    shapes, value, places = torch.tensor([[3, 4]]), torch.randn(1, 12, 2, 4), torch.rand(1, 5, 2, 1, 3, 2)
    tensors = [t.to(dtype) for t in (value, places, torch.rand(1, 5, 2, 1, 3))]
    attend = ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply
    exact = attend(tensors[0].float(), shapes, torch.tensor([0]), tensors[1].float(), tensors[2].float(), 1)
    result = attend(tensors[0], shapes, torch.tensor([0]), *tensors[1:], 1)
    assert same(result, exact)
    boxes, scores = (torch.rand(20, 4) * 10).sort(dim=1).values, torch.rand(20)
    dets, _ = ops.nms(boxes.to(dtype), scores.to(dtype), 0.3)
    assert dets.dtype == dtype and len(dets) > 1


def test_nothing_in():
    """No boxes, no RoIs, no images: empty results, no gradients."""
    none = torch.zeros(0, 4)
    for result in (ops.nms(none, none[:, 0], 0.5), ops.soft_nms(none, none[:, 0])):
        assert [tuple(t.shape) for t in result] == [(0, 5), (0,)] and result[1].dtype == torch.long
    assert ops.nms_match(torch.zeros(0, 5), 0.5) == []
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for pool in (
        lambda: ops.roi_align(x, torch.zeros(0, 5), 7, 1.0, 0, "avg", True),
        lambda: ops.roi_align(x, torch.zeros(0, 5), 7, 1.0, 0, "max", True),
        lambda: ops.roi_pool(x, torch.zeros(0, 5), 7, 1.0),
    ):
        out = pool()
        assert out.shape == (0, 3, 7, 7)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert not grad.any()
    empty = torch.zeros(0, 4, requires_grad=True)
    for loss in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
        loss(empty, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum").backward()
        assert empty.grad.shape == (0, 4)


def test_classes_apart():
    """Batched NMS, whole and split by class, keeps the same boxes as NMS class by class."""
    torch.manual_seed(0)
    boxes, scores, classes = (torch.rand(200, 4) * 100).sort(dim=1).values, torch.rand(200), torch.arange(200) % 3
    expected = torch.cat([(classes == c).nonzero()[:, 0][ops.nms(boxes[classes == c], scores[classes == c], 0.4)[1]]
                          for c in range(3)])  # fmt: skip
    for kind in ("nms", "soft_nms"):
        for split in (10_000, 1):
            config = dict(type=kind, iou_threshold=0.4, split_thr=split)
            dets, keep = ops.batched_nms(boxes, scores, classes, config)
            assert torch.equal(dets[:, :4], boxes[keep]) and (dets[1:, 4] <= dets[:-1, 4]).all()
            if kind == "nms":
                assert set(keep.tolist()) == set(expected.tolist()) and len(keep) == len(expected)
            else:
                assert len(keep) > len(expected)


def test_rois_that_cannot_be():
    x = torch.randn(2, 3, 8, 8)
    # without a side there is no sample: zero on average; the maximum is what mmcv's search starts from
    point = torch.tensor([[0.0, 5, 5, 5, 5]])
    assert not ops.roi_align(x, point, 2, 1.0, 0, "avg", True).any()
    assert (ops.roi_align(x, point, 2, 1.0, 0, "max", True) == -10000).all()
    with pytest.raises(RuntimeError, match="x1 <= x2"):
        ops.roi_align(x, torch.tensor([[0.0, 5, 5, 4, 6]]), 2, 1.0, 0, "avg", True)
    for pool in (ops.RoIAlign(2, 1.0), ops.RoIPool(2, 1.0)):
        with pytest.raises(RuntimeError, match="from 0 to 1"):
            pool(x, torch.tensor([[2.0, 1, 1, 4, 6]]))


def test_missing_operator_is_one_line():
    """The module answers for every name; what it lacks says which operator and how to build it."""
    assert hasattr(ext, "ball_query_forward") and not hasattr(ext, "__path__")
    with pytest.raises(NotImplementedError) as e:
        ops.box_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))
    message = str(e.value)
    assert "'box_iou_rotated'" in message and "MMCV_WITH_OPS=1 pip install" in message
    assert "--no-build-isolation" in message and "\n" not in message
    assert mmcv_ext.build_hint() in message
    assert ops.get_compiling_cuda_version() == "not available"
    assert "visionattn" in ops.get_compiler_version()


def test_compiled_mmcv_is_used(tmp_path, monkeypatch):
    """With a compiled extension beside mmcv, nothing is put in its place."""
    (tmp_path / "_ext.py").write_text("mark = 'compiled'\n")
    monkeypatch.setattr(mmcv, "_ext", ext)  # restored at the end
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    ensure_mmcv_ops()
    assert importlib.import_module("mmcv._ext").mark == "compiled"
    ensure_mmcv_ops()
    assert sys.modules["mmcv._ext"].mark == "compiled"
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    (tmp_path / "_ext.py").write_text("raise ImportError('undefined symbol')\n")
    ensure_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


def test_put_in_place(monkeypatch):
    """Without one: a module that import, ``find_spec`` and mmcv's own check find; asked twice, the same one."""
    assert mmcv.utils.ext_loader.check_ops_exist() and importlib.util.find_spec("mmcv._ext").origin == mmcv_ext.__file__
    ensure_mmcv_ops()
    assert sys.modules["mmcv._ext"] is ext and mmcv._ext is ext
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ImportError, match=r'needs mmcv: pip install -e "\.\[detection\]"'):
        ensure_mmcv_ops()


def test_mmdet_imported_before(tmp_path, monkeypatch):
    """What a module of mmdet defined because ``mmcv.ops`` failed is replaced by the operator; its own names stay."""
    file = tmp_path / "early.py"
    file.write_text(
        "try:\n    from mmcv.ops import nms as _nms, roi_align\nexcept ImportError:\n"
        "    def _nms(): raise ImportError\n    def roi_align(): raise ImportError\n"
        "try:\n    from mmcv.ops import soft_nms\nexcept ImportError:\n    soft_nms = None\n"
        "def nms(): return 'its own'\n"
    )
    spec = importlib.util.spec_from_file_location("mmdet.early", file)
    early = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmcv.ops", None)
        spec.loader.exec_module(early)
    monkeypatch.setitem(sys.modules, "mmdet.early", early)
    assert early.roi_align is not ops.roi_align
    assert sorted(late.repeat_failed_imports()) == ["mmdet.early._nms", "mmdet.early.roi_align"]
    assert early.roi_align == ops.roi_align and early._nms is ops.nms and early.nms() == "its own"
    assert late.repeat_failed_imports() == []


def test_tool(tmp_path, monkeypatch, capsys):
    """Scripts get their own arguments; mmdet's tools are found by name; a wrong name is one line."""
    (tmp_path / "helper.py").write_text("word = 'beside'\n")
    (tmp_path / "script.py").write_text("import sys, helper, mmcv.ops\nprint(helper.word, sys.argv[1:], __name__)\n")
    monkeypatch.setattr(sys, "argv", ["tool"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    tool.main([str(tmp_path / "script.py"), "--lr", "1"])
    assert capsys.readouterr().out == "beside ['--lr', '1'] __main__\n"
    assert {"train", "test", "analysis_tools/get_flops"} <= set(tool.tools())
    for wrong in ("tset", str(tmp_path / "none.py")):
        with pytest.raises(SystemExit, match=r"neither a tool of what is installed nor a script; try .*test"):
            tool.main([wrong])
    tool.main(["--help"])
    assert "\n  train\n" in capsys.readouterr().out
