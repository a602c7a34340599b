"""The .beton file: FFCV's layout (version 2), and how it is read and checked.

Layout: header, field descriptors, one metadata record per sample, then the samples' bytes from the
next page border on, then the table of allocations, which ends the file. writer.py writes it; tests
hold our files to FFCV's own reader and loader, and read the files of FFCV's writer.

Beside FILE.beton lie FILE.beton.json, the manifest (classes, counts, options, what was left out),
and FILE.beton.sums.npy, a 64-bit checksum of every sample's bytes, by which later damage is found.
A digest in the manifest ties the three together.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from proxynorm.errors import DataError

VERSION = 2
PAGE_SIZE = 1 << 23
JPEG, RAW = 0, 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype(
    [("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
INT_FIELD, IMAGE_FIELD, ARRAY_FIELD = 1, 2, 4
DIGEST = "sha256_of_head_sums_and_manifest"


@dataclass
class Samples:
    """The table of N samples; one array (N,) per property.

    mode: JPEG or RAW; height, width in pixels; pointer, size in bytes; target: class; sums:
    checksums, empty if there are none; manifest: {} if there is none.
    """

    path: Path
    channels: int
    mode: np.ndarray
    height: np.ndarray
    width: np.ndarray
    pointer: np.ndarray
    size: np.ndarray
    target: np.ndarray
    sums: np.ndarray
    manifest: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.mode)


def metadata_type(channels: int) -> np.dtype:
    """Return a record's type: FFCV's RGBImageField or, for grey, NDArrayField; and IntField."""
    image = IMAGE if channels == 3 else np.dtype("<u8")
    return np.dtype([("image", image), ("label", "<i8")], align=True)


def digest(head: bytes, sums: np.ndarray, manifest: dict) -> str:
    """Return SHA-256 of the file's head, of its checksums, uint64 (N,), and of its manifest.

    The head has every label and address, the checksums stand for the images' bytes, the manifest
    names the classes.
    """
    rest = {key: value for key, value in manifest.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(head + np.ascontiguousarray(sums).tobytes() + text.encode()).hexdigest()


def byte_sum(data: np.ndarray) -> int:
    """Return a 64-bit checksum of bytes (uint8, any length): 8-byte words times odd weights.

    An odd weight is invertible, so any change within a word shows.
    """
    whole = len(data) // 8 * 8
    words = np.frombuffer(data[:whole].tobytes(), dtype="<u8")
    weights = (np.arange(len(words), dtype=np.uint64) * np.uint64(2) + np.uint64(1)) * WEIGHT
    rest = int.from_bytes(data[whole:].tobytes(), "little") ^ len(data)
    return (int((words * weights).sum(dtype=np.uint64)) + rest * int(WEIGHT_TAIL)) % (1 << 64)


WEIGHT, WEIGHT_TAIL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def sums_path(path: Path) -> Path:
    """Return the file of checksums beside a .beton file."""
    return path.with_name(path.name + ".sums.npy")


def manifest_path(path: Path) -> Path:
    """Return the manifest beside a .beton file."""
    return path.with_name(path.name + ".json")


def read_beton(path: Path) -> Samples:
    """Read the table of samples of a .beton file, ours or FFCV's, with fields image and label.

    Raises DataError if it is missing, truncated, of another version, or disagrees with its
    manifest.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with scripts/write_ffcv.py")
    try:
        return _read_samples(path)
    except (IndexError, ValueError, OSError, OverflowError, MemoryError):
        raise _damaged(path) from None


def _read_samples(path: Path) -> Samples:
    length = path.stat().st_size
    header = np.fromfile(path, dtype=HEADER, count=1)[0]
    count = int(header["num_samples"])
    _check(path, header["version"] == VERSION and count > 0)
    fields = np.fromfile(path, dtype=FIELD, count=int(header["num_fields"]), offset=HEADER.itemsize)
    channels = _channels(path, fields)
    offset = HEADER.itemsize + fields.nbytes
    _check(path, offset + count * metadata_type(channels).itemsize <= length)
    records = np.fromfile(path, dtype=metadata_type(channels), count=count, offset=offset)
    image, target = records["image"], np.ascontiguousarray(records["label"])
    pointer = np.ascontiguousarray(image["data_ptr"] if channels == 3 else image)
    size = _sizes(path, header, pointer)
    _check(path, bool((pointer + size <= length).all()) and bool((target >= 0).all()))
    mode, height, width = _shapes(image, fields, channels)
    expected = height.astype(np.uint64) * width * np.uint64(channels)
    _check(path, bool((size == expected)[mode == RAW].all()))
    head = header.tobytes() + fields.tobytes() + records.tobytes()
    manifest, sums = _read_companions(path, head, count, length)
    return Samples(path, channels, mode, height, width, pointer, size, target, sums, manifest)


def _channels(path: Path, fields: np.ndarray) -> int:
    """Return 3 for images in colour, 1 for grey ones. Raises DataError for other fields."""
    names = [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in fields["name"]]
    channels = {IMAGE_FIELD: 3, ARRAY_FIELD: 1}.get(int(fields["type_id"][0]))
    if names != ["image", "label"] or channels is None or fields["type_id"][1] != INT_FIELD:
        raise DataError(
            f"{path}: holds the fields {names}; expected an image field 'image' and an integer "
            "field 'label'"
        )
    return channels


def _sizes(path: Path, header: np.void, pointer: np.ndarray) -> np.ndarray:
    """Return the samples' sizes in bytes, from the table of allocations."""
    table = np.fromfile(path, dtype=ALLOCATION, offset=int(header["alloc_table_ptr"]))
    table = table[np.argsort(table["ptr"])]
    _check(path, len(table) >= len(pointer))
    row = np.minimum(np.searchsorted(table["ptr"], pointer), len(table) - 1)
    _check(path, bool((table["ptr"][row] == pointer).all()))
    return np.ascontiguousarray(table["size"][row])


def _shapes(image: np.ndarray, fields: np.ndarray, channels: int) -> list[np.ndarray]:
    """Return mode, height and width of the samples; all grey images have the same shape."""
    if channels == 3:
        return [np.ascontiguousarray(image[name]) for name in ("mode", "height", "width")]
    shape = fields["arguments"][0][: ARRAY_ARGUMENTS.itemsize].view(ARRAY_ARGUMENTS)["shape"][0]
    sides = [np.full(len(image), side, dtype=np.uint16) for side in shape[:2]]
    return [np.full(len(image), RAW, dtype=np.uint8), *sides]


def _read_companions(path: Path, head: bytes, count: int, length: int) -> tuple[dict, np.ndarray]:
    """Read manifest and checksums and compare them with the file; FFCV's own file has neither."""
    if not manifest_path(path).is_file():
        if sums_path(path).is_file():
            raise DataError(
                f"{path}: its manifest {manifest_path(path).name} is missing; put it back, or "
                "write the file again"
            )
        return {}, np.zeros(0, dtype=np.uint64)
    try:
        manifest = json.loads(manifest_path(path).read_text())
        sums = np.load(sums_path(path))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: its manifest or sums cannot be read ({error}); write the file again"
        ) from None
    if not isinstance(manifest, dict) or DIGEST not in manifest:
        raise DataError(
            f"{path}: its manifest is damaged or of an older proxynorm (it has no {DIGEST}); "
            "write the file again"
        )
    if manifest.get("bytes") != length or np.shape(sums) != (count,):
        raise DataError(
            f"{path}: differs from its manifest (truncated or replaced); write the file again"
        )
    if digest(head, sums, manifest) != manifest[DIGEST]:
        raise DataError(
            f"{path}: its labels, addresses, sums or manifest are not those that were written "
            "together (damaged, edited or replaced); write the file again"
        )
    return manifest, sums


def _check(path: Path, fine: bool) -> None:
    if not fine:
        raise _damaged(path)


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: truncated, damaged or no .beton file of version {VERSION}; write it again"
    )
