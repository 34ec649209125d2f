"""Configs of packages that are installed under another distribution's name than mmengine knows."""

import pytest

from tests.extras import require_extra

require_extra("mmengine", "detection")

from mmengine.config import Config, utils  # noqa: E402

from visionattn.detection.packages import find_by_import_name  # noqa: E402


def test_config_of_a_renamed_distribution(tmp_path, monkeypatch):
    inside = tmp_path / "visionattn_seg" / ".mim"
    (inside / "configs" / "_base_").mkdir(parents=True)
    (tmp_path / "visionattn_seg" / "__init__.py").touch()
    (inside / "model-index.yml").write_text("Import: []\n")
    (inside / "configs" / "_base_" / "schedule.py").write_text("lr = 0.5\n")
    mine = tmp_path / "mine.py"
    mine.write_text('_base_ = "visionattn_seg::_base_/schedule.py"\n')
    monkeypatch.syspath_prepend(tmp_path)
    names = {"visionattn_seg": "visionattn-segmentation", "visionattn_gone": "visionattn-not-there", "timm": "timm"}
    for module, package in names.items():
        monkeypatch.setitem(utils.MODULE2PACKAGE, module, package)

    with pytest.raises(ModuleNotFoundError, match="not installed"):
        Config.fromfile(mine)
    assert "visionattn_seg" in find_by_import_name()
    assert Config.fromfile(mine).lr == 0.5
    # neither what is not there at all nor what has the name that mmengine knows
    assert utils.MODULE2PACKAGE["visionattn_gone"] == "visionattn-not-there" and utils.MODULE2PACKAGE["timm"] == "timm"
    assert find_by_import_name() == []
