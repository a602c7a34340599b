"""A test whose needs are not met is skipped, and fails in continuous integration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.conftest import pytest_runtest_setup
from tests.helpers import need, need_module


def item(*marks: pytest.MarkDecorator) -> SimpleNamespace:
    return SimpleNamespace(
        iter_markers=lambda name: [decorator.mark for decorator in marks if decorator.name == name]
    )


def test_what_is_missing_skips_or_fails(monkeypatch):
    lacking = item(need(True, "there"), need_module("no_such_module"))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_module is not installed"):
        pytest_runtest_setup(lacking)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no_such_module is not installed"):
        pytest_runtest_setup(lacking)
    pytest_runtest_setup(item(need_module("torch")))
