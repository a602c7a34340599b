"""The tiny table's fixtures, which the launchers' tests use too."""

from tests.launch.conftest import stand_in, tiny  # noqa: F401
