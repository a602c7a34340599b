"""Importing proxynorm is quick, and its nn needs torch only."""

from __future__ import annotations

import subprocess
import sys

import pytest

import proxynorm


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_loads_nothing_heavy() -> None:
    run(
        "import sys, proxynorm; "
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules), 'heavy import'"
    )


def test_nn_needs_torch_only() -> None:
    others = {"timm", "torchvision", "hydra", "proxynorm.errors"}
    run(
        "import sys; import proxynorm.conversion.convert, proxynorm.nn.freeze; "
        f"assert not {others} & set(sys.modules), 'more than torch'"
    )


def test_nn_is_an_attribute_of_the_package() -> None:
    run("import proxynorm; assert callable(proxynorm.nn.recompute) and 'nn' in dir(proxynorm)")


@pytest.mark.parametrize(
    "name",
    [
        "NormAct2d",
        "conversion_report",
        "convert",
        "create_model",
        "freeze",
        "parameter_groups",
        "proxy_moments",
    ],
)
def test_public_names(name: str) -> None:
    assert callable(getattr(proxynorm, name)) and name in dir(proxynorm)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        proxynorm.nothing  # noqa: B018
