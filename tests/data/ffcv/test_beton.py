"""The .beton file and its companions: swapped, edited, truncated and damaged files are detected."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from proxynorm.data.ffcv.beton import byte_sum, changed_images, manifest_path, read_beton, sums_path
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from proxynorm.errors import DataError
from tests.data.conftest import change_byte, needs_ffcv, remove_companions


@pytest.mark.parametrize("swapped", [".beton", ".beton.json"])
def test_a_file_swapped_for_one_with_other_labels_is_refused(photos, tmp_path, swapped):
    """Images, sizes and count are the same, and so are the sums; only the labels differ."""
    listing = list_source(photos / "train")
    for name, targets in (("x", listing.targets), ("y", listing.targets[::-1])):
        prepare(listing._replace(targets=targets), tmp_path / f"{name}.beton", StorageOptions())
    shutil.copy(tmp_path / f"y{swapped}", tmp_path / f"x{swapped}")
    with pytest.raises(DataError, match="x.beton: does not match its manifest .*together"):
        read_beton(tmp_path / "x.beton")


@pytest.mark.parametrize("key", ["classes", "count_per_class", "options", "versions", "skipped"])
def test_an_edited_manifest_is_refused(written, key):
    manifest = json.loads(manifest_path(written).read_text())
    manifest_path(written).write_text(json.dumps(manifest))  # formatted otherwise, but the same
    assert read_beton(written).manifest["classes"] == ["ant", "bee", "cow"]
    manifest[key] = sorted(manifest[key], reverse=True) if key == "classes" else {"ant": 1}
    manifest_path(written).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not written together.*write the file again"):
        read_beton(written)
    del manifest[key]
    manifest_path(written).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="write the file again"):
        read_beton(written)


@pytest.mark.parametrize(
    "text",
    ["[]", "null", '"x"', "3", "{}", "{", "", '{"bytes": 1, "sha256_of_head_and_sums": "0"}'],
)
def test_an_invalid_manifest_is_one_line(written, text):
    manifest_path(written).write_text(text)
    message = "train.beton: does not match its manifest .*write the file again"
    with pytest.raises(DataError, match=message) as error:
        read_beton(written)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"rubbish"])
def test_sums_that_cannot_be_read_are_one_line(written, content):
    sums_path(written).write_bytes(content)
    with pytest.raises(DataError, match="write the file again"):
        read_beton(written)


def test_changed_sums_and_a_missing_manifest_are_refused(written):
    sums = np.load(sums_path(written))
    np.save(sums_path(written), sums + np.uint64(1))
    with pytest.raises(DataError, match="not written together"):
        read_beton(written)
    manifest_path(written).unlink()
    with pytest.raises(DataError, match="manifest train.beton.json .*No such file.*restore"):
        read_beton(written)
    sums_path(written).unlink()
    assert read_beton(written).manifest == {}


def test_reading_back_finds_a_single_changed_byte(written):
    samples = read_beton(written)
    assert changed_images(samples) == []
    change_byte(written, int(samples.pointer[5] + samples.size[5] // 2))
    assert changed_images(read_beton(written)) == [f"{written}: image 5"]


@pytest.mark.parametrize("keep", [0, 10, 3000, 0.5, 0.999, -1])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_truncated_file_is_one_line(written, keep, manifest):
    data = written.read_bytes()
    written.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    if not manifest:
        remove_companions(written)
    with pytest.raises(DataError, match="train.beton") as error:
        read_beton(written)
    assert "\n" not in str(error.value)


def test_any_damage_to_the_head_is_an_error_or_harmless(written):
    """Each byte of the head is changed in turn: no crash, and no address beyond the file."""
    remove_companions(written)  # their digest would find every change
    data = written.read_bytes()
    good = read_beton(written)
    for position in [*range(30), *range(1040, 1070), *range(2106, 2170)]:
        change_byte(written, position)
        try:
            samples = read_beton(written)
        except DataError:
            pass
        else:
            assert len(samples) == len(good) and (samples.pointer + samples.size <= len(data)).all()
        written.write_bytes(data)


def test_byte_sum_sees_every_byte_and_the_length():
    data = np.random.default_rng(0).integers(0, 256, 45, dtype=np.uint8)
    sums = {byte_sum(data), byte_sum(data[:-1]), byte_sum(np.append(data, 0).astype(np.uint8))}
    for position in range(len(data)):
        changed = data.copy()
        changed[position] ^= 1
        sums.add(byte_sum(changed))
    assert len(sums) == 48


@needs_ffcv
def test_the_compiled_sum_is_the_same(written):
    from proxynorm.data.ffcv.native import decoder

    decoder()
    from proxynorm.data.ffcv.kernel import _byte_sum

    samples, file = read_beton(written), np.fromfile(written, dtype=np.uint8)
    for size in (0, 1, 7, 8, 9, 1000, 1003):
        assert int(_byte_sum(file[5000 : 5000 + size])) == byte_sum(file[5000 : 5000 + size])
    start, size = samples.pointer[0], samples.size[0]
    assert byte_sum(file[start : start + size]) == samples.sums[0]
