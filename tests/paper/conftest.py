"""The fixtures of the tiny table."""

from tests.launch.conftest import stand_in, tiny

__all__ = ["stand_in", "tiny"]
