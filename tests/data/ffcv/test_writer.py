"""The writer: it names every damaged image and no other, and an interrupted run leaves no file that
looks finished."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import proxynorm
from proxynorm import commands
from proxynorm.data.ffcv.beton import JPEG, RAW, read_beton
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import BadImage, ImageRef, StorageOptions, load_rgb
from proxynorm.data.sources import list_source
from proxynorm.errors import ConfigError, DataError, FileError
from tests.data.conftest import needs_ffcv, photograph, write_folder
from tests.helpers import ROOT

SCRIPT = ROOT / "scripts" / "write_ffcv.py"


def jpeg(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    mode = options.pop("mode", "RGB")
    Image.fromarray(image).convert(mode).save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def rotated(image: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(image, exif=exif, quality=95)


def overwritten(image: np.ndarray) -> bytes:
    data = bytearray(jpeg(image, quality=95))
    middle = len(data) // 2
    data[middle : middle + 200] = b"\xff\xd9\x00\x13" * 50
    return bytes(data)


def bad_scan(image: np.ndarray) -> bytes:
    """A header that uses a colour component without defining it."""
    data = bytearray(jpeg(image, quality=95))
    data[data.index(b"\xff\xda") + 5] = 77
    return bytes(data)


DAMAGED = {
    "bad_scan": bad_scan,
    "empty": lambda image: b"",
    "truncated": lambda image: jpeg(image)[:-400],
    "cut_header": lambda image: jpeg(image)[:100],
    "overwritten": overwritten,
    "text": lambda image: b"<html>404 Not Found</html>",
    "noise": lambda image: np.random.default_rng(0).bytes(3000),
    "truncated_png": lambda image: jpeg(image, format="PNG")[:-2000],
}
UNUSUAL = {
    "cmyk": lambda image: jpeg(image, mode="CMYK", quality=95),
    "grey": lambda image: jpeg(image, mode="L", quality=95),
    "png_named_jpeg": lambda image: jpeg(image, format="PNG"),
    "progressive": lambda image: jpeg(image, progressive=True, quality=95),
    "rotated": rotated,
    "transparent": lambda image: jpeg(image, mode="RGBA", format="PNG"),
    "stray_bytes": lambda image: jpeg(image, quality=95)[:-2] + b"\0\0\0\0\xff\xd9",
    "huge": lambda image: jpeg(np.asarray(Image.fromarray(image).resize((4000, 3000)))),
}


@pytest.fixture
def planted(tmp_path):
    """Class folders with good photographs, and with unusual and damaged ones, named accordingly."""
    root = write_folder(tmp_path / "data", 6, 1)
    for name, make in {**DAMAGED, **UNUSUAL}.items():
        (root / "train" / "bee" / f"{name}.JPEG").write_bytes(make(photograph(7)))
    return root / "train"


@needs_ffcv
@pytest.mark.parametrize("workers", [1, 2])
def test_skip_names_every_damaged_image_and_no_good_one(planted, tmp_path, workers):
    done = prepare(list_source(planted), tmp_path / "x.beton", StorageOptions(), "skip", workers)
    assert {Path(name).stem for name in done.manifest["skipped"]} == set(DAMAGED)
    assert len(done) == 18 + len(UNUSUAL)
    manifest = json.loads((tmp_path / "x.beton.json").read_text())
    assert manifest == done.manifest and manifest["classes"] == ["ant", "bee", "cow"]
    assert manifest["count_per_class"] == {"ant": 6, "bee": 6 + len(UNUSUAL), "cow": 6}


@needs_ffcv
def test_files_of_other_kinds_are_reported(tmp_path, monkeypatch, capsys):
    source = tmp_path / "data"
    (source / "ant" / "sub").mkdir(parents=True)
    names = ["beside.jpg", "ant/a.jpg", "ant/b.heic", "ant/notes", "ant/.hidden"]
    for name in (*names, "ant/sub/deep.JPG", "ant/sub/._x.jpg"):
        (source / name).write_bytes(jpeg(photograph(1)))
    arguments = f"source={source}", f"output={tmp_path}/new/x.beton", "workers=1"
    assert run_script(monkeypatch, *arguments) == 0
    kinds = "2 image(s) outside or below the class folders, 1 .heic, 1 without ending"
    warning = f"warning: {source}: 4 of 5 files are left out: {kinds}\n"
    assert warning in capsys.readouterr().err
    files = json.loads((tmp_path / "new/x.beton.json").read_text())["left_aside"]["files"]
    assert [Path(file).name for file in files] == ["beside.jpg", "b.heic", "notes", "deep.JPG"]


def test_the_manifest_names_the_versions_of_the_libraries(written):
    versions = json.loads(written.with_name("train.beton.json").read_text())["versions"]
    assert set(versions) == {"proxynorm", "python", "numpy", "pillow", "libjpeg_turbo", "ffcv"}
    assert versions["proxynorm"] == proxynorm.__version__


def test_raise_names_the_first_damaged_image_and_leaves_no_file(planted, tmp_path):
    with pytest.raises(DataError, match="bee/bad_scan.JPEG.*on_bad=skip"):
        prepare(list_source(planted), tmp_path / "x.beton", StorageOptions())
    assert files_of(tmp_path) == {"data", ".x.beton.lock"}


def test_a_class_without_a_good_image_is_named_and_keeps_its_number(tmp_path, monkeypatch, capsys):
    source = write_folder(tmp_path / "data", 2, 1) / "train"
    for path in (source / "bee").iterdir():
        path.write_bytes(b"")
    output = tmp_path / "x.beton"
    arguments = (f"source={source}", f"output={output}", "workers=1", "on_bad=skip")
    assert run_script(monkeypatch, *arguments) == 0
    warning = f"warning: {output}: no images left in 1 class(es), such as bee\n"
    assert warning in capsys.readouterr().err
    samples = read_beton(output)
    assert samples.classes == ("ant", "bee", "cow") and samples.targets.tolist() == [0, 0, 2, 2]
    for path in source.glob("*/*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"ant/000.jpg: is empty; all 6 images are damaged"):
        prepare(list_source(source), tmp_path / "y.beton", StorageOptions(), "skip")


def test_unusual_images_keep_their_content(tmp_path):
    image = photograph(7)
    expectations = {"png_named_jpeg": image, "cmyk": image, "rotated": np.rot90(image, -1)}
    for name, expected in expectations.items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(UNUSUAL[name](image))
        seen = np.asarray(load_rgb(ImageRef(str(path), name)))
        assert seen.shape == expected.shape
        assert np.abs(seen.astype(int) - expected).mean() < 3


def test_the_bytes_do_not_depend_on_the_workers(photos, tmp_path):
    listing, options = list_source(photos / "train"), StorageOptions(jpeg_probability=0.5)
    for workers in (1, 3):
        prepare(listing, tmp_path / f"{workers}.beton", options, workers=workers)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()
    modes = read_beton(tmp_path / "1.beton").mode
    assert 6 < (modes == RAW).sum() < 30


def test_sizes_and_storage_follow_the_options(photos, tmp_path):
    listing = list_source(photos / "train")
    for side, mode in ((96, JPEG), (50, RAW)):
        prepare(listing, tmp_path / f"{side}.beton", StorageOptions(max_side=side))
        samples = read_beton(tmp_path / f"{side}.beton")
        assert np.maximum(samples.height, samples.width).max() == side
        assert (samples.mode == mode).all()  # images up to 64x64 are kept raw
        assert np.array_equal(samples.targets, listing.targets)


@needs_ffcv
def test_data_that_only_warns_is_bad_when_strict(tmp_path):
    data = jpeg(photograph(3), quality=95)
    (tmp_path / "x.jpg").write_bytes(data[:3000] + b"\0" * 256 + data[3256:])
    ref = ImageRef(str(tmp_path / "x.jpg"), "x")
    assert load_rgb(ref).size == (120, 90)
    with pytest.raises(BadImage, match="has damaged JPEG data"):
        load_rgb(ref, strict=True)


@pytest.mark.parametrize(
    "options", [{"max_side": 0}, {"jpeg_quality": 101}, {"jpeg_probability": -0.1}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        StorageOptions(**options)


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def wait_for_writer(folder: Path) -> None:
    """Wait until a writer has written images to its temporary file in `folder`."""
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob(".*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start_script(source: Path, output: Path, workers: int, **options) -> subprocess.Popen:
    """Start the script in a process of its own, in which signals can be sent to it."""
    arguments = f"source={source}", f"output={output}", f"workers={workers}"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], text=True, **pipes, **options
    )


def test_a_killed_run_leaves_no_file_that_looks_finished(tmp_path):
    root = write_folder(tmp_path / "data", 150, 1)
    output = tmp_path / "out" / "train.beton"
    statuses = ((signal.SIGTERM, 1, 143), (signal.SIGINT, 2, 130), (signal.SIGKILL, 1, -9))
    for kind, workers, status in statuses:
        process = start_script(root / "train", output, workers)
        wait_for_writer(output.parent)
        os.kill(process.pid, kind)
        errors = process.communicate(timeout=30)[1]
        assert process.returncode == status and "Traceback" not in errors
        assert not list(output.parent.glob("train.beton*"))
    # SIGKILL leaves a hidden temporary file, which the next run takes over.
    assert files_of(output.parent) <= {".train.beton.tmp", ".train.beton.lock"}
    (output.parent / ".train.beton.tmp").write_bytes(b"unfinished" * 1_000_000)
    prepare(list_source(root / "val"), output, StorageOptions())
    names = {"train.beton", "train.beton.json", "train.beton.sums.npy", ".train.beton.lock"}
    assert files_of(output.parent) == names and len(read_beton(output)) == 3


def test_two_interrupts_in_a_row_end_a_run(tmp_path):
    """A terminal sends Ctrl-C to the whole group. The second signal must not interrupt the clean-up
    after the first."""
    root = write_folder(tmp_path / "data", 100, 1)
    folder = tmp_path / "out"
    for second in (signal.SIGINT, signal.SIGTERM):
        process = start_script(root / "train", folder / "x.beton", 2, start_new_session=True)
        wait_for_writer(folder)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, second)
        try:
            errors = process.communicate(timeout=20)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 130
        assert "Traceback" not in errors and errors.count("stopped by") == 1
        assert files_of(folder) == {".x.beton.lock"}


def test_one_writer_at_a_time(tmp_path):
    """The second ends with an error, without disturbing the first."""
    root = write_folder(tmp_path / "data", 150, 1)
    other, output = list_source(root / "val"), tmp_path / "x.beton"
    first = start_script(root / "train", output, 1)
    wait_for_writer(tmp_path)
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(FileError, match="x.beton: another process is writing it"):
            prepare(other, output, StorageOptions())
    finally:
        first.send_signal(signal.SIGCONT)
        errors = first.communicate(timeout=120)[1]
    assert first.returncode == 0, errors
    assert len(read_beton(output)) == 450
    assert len(prepare(other, output, StorageOptions())) == 3


def test_a_file_system_without_locks_still_takes_the_file(photos, tmp_path, monkeypatch):
    """Such as Lustre's, unless it is mounted with them."""
    monkeypatch.setattr("proxynorm.files.fcntl.flock", no_locks)
    assert len(prepare(list_source(photos / "val"), tmp_path / "x.beton", StorageOptions()))


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_unwritable_folder_and_a_full_disk_are_one_line(photos, tmp_path, monkeypatch):
    listing = list_source(photos / "train")
    for folder in ("/dev/null", "/proc"):
        with pytest.raises(FileError, match="cannot write .*x.beton: ") as error:
            prepare(listing, Path(folder) / "x.beton", StorageOptions())
        assert "make room" not in str(error.value)
    monkeypatch.setattr("proxynorm.data.ffcv.writer.os.fsync", full_disk)
    with pytest.raises(FileError, match="No space left.*make room"):
        prepare(listing, tmp_path / "x.beton", StorageOptions())
    assert files_of(tmp_path) == {".x.beton.lock"}


def test_a_disk_that_is_full_at_the_manifest_leaves_the_old_file(photos, tmp_path, monkeypatch):
    listing, path = list_source(photos / "train"), tmp_path / "x.beton"
    prepare(listing, path, StorageOptions())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("proxynorm.data.ffcv.writer.np.save", full_disk)
    with pytest.raises(FileError, match="No space left"):
        prepare(listing, path, StorageOptions(jpeg_quality=50))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def run_script(monkeypatch, *arguments) -> int:
    """Run the script in this process, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["write_ffcv.py", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        commands.run("write-ffcv")
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_the_script_writes_and_refuses_to_overwrite(photos, tmp_path, monkeypatch, capsys):
    arguments = f"source={photos / 'train'}", f"output={tmp_path / 'x.beton'}", "workers=1"
    assert run_script(monkeypatch, *arguments) == 0
    assert "36 images written and verified, 0 skipped" in capsys.readouterr().out
    assert run_script(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "exists" in error and error.count("\n") == 1
    assert run_script(monkeypatch, *arguments, "overwrite=true") == 0
    assert run_script(monkeypatch, "--help") == 0 and "on_bad=" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("source=/none", "output=x.beton"),
        ("source=.",),
        ("sourc=.",),
        ("source=.", "output=x.beton", "on_bad=no"),
        ("source=.", "output=x.beton", "max_side=big"),
        ("source=.", "output=x.jpg"),
    ],
)
def test_mistaken_arguments_end_with_status_2(monkeypatch, capsys, arguments):
    assert run_script(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
