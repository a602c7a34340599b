"""A part of the zoo of convert_zoo.py: a network of each kind, in seconds."""

from __future__ import annotations

import pytest

from tests.acceptance.convert_zoo import cases, check, onnx
from tests.acceptance.convert_zoo import main as run_zoo

QUICK = {
    "timm": ["resnet18", "mobilenetv3_small_050", "ghostnet_050", "densenet121", "resnetv2_50"],
    "torchvision": ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"],
    "segmentation": ["lraspp_mobilenet_v3_large"],
    "detection": ["ssdlite320_mobilenet_v3_large"],
}


@pytest.mark.slow
@pytest.mark.parametrize("part, name", [(part, name) for part in QUICK for name in QUICK[part]])
def test_what_convert_and_freeze_promise_holds(part: str, name: str) -> None:
    (case,) = (case for case in cases([part]) if case.name == name)
    row = check(case, "ln_pn")
    assert row["with_pn"] > 0 and row["frozen_difference"] <= 1e-4
    if name == "resnet18" and part == "timm":
        assert onnx(case, "ln_pn") == "exported"


def test_a_refusal_is_a_row_with_its_reason(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tests.acceptance.convert_zoo.FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["convert_zoo.py", "torchvision", "--only", "convnext_tiny"])
    assert run_zoo() == 0
    assert '"result": "refused", "why": "nothing to convert' in capsys.readouterr().out
    assert "- **torchvision/convnext_tiny**: nothing to conv" in (tmp_path / "zoo.md").read_text()
