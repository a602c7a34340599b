"""A few hundred mutated images; fuzz_images.py does 10,000."""

from __future__ import annotations

from tests.acceptance.fuzz_images import fuzz


def test_mutated_images_are_read_or_named(tmp_path):
    outcomes = fuzz(tmp_path, 240)
    assert outcomes["named by the writer"] > 60 and outcomes["written to the .beton file"] > 30
