"""Files that other programs read: citation, hooks, continuous integration."""

from __future__ import annotations

import yaml

import proxynorm
from tests.helpers import ROOT


def read(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_versions_agree():
    version = proxynorm.__version__
    assert read("CITATION.cff")["version"] == version
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_what_ci_runs():
    steps = read(".github/workflows/ci.yml")["jobs"]["tests"]["steps"]
    assert any(".ci/run" in step.get("run", "") for step in steps)
    assert "bash scripts/test.sh" in (ROOT / ".ci/run").read_text()
    assert "bash scripts/test.sh" in (ROOT / "README.md").read_text()


def test_hooks_and_ci_check_the_same():
    hooks = {hook["id"] for hook in read(".pre-commit-config.yaml")["repos"][0]["hooks"]}
    ci = (ROOT / ".ci/run").read_text()
    assert hooks == {"ruff-check", "ruff-format", "mypy"}
    assert "ruff check" in ci and "ruff format --check" in ci and "bin/mypy" in ci
