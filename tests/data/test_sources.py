"""The sources of labelled images: contradictory lists of labels and tar files are refused in one
line."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from proxynorm.errors import DataError
from tests.data.ffcv.test_writer import run_script


def flat_copy(photos, folder: Path) -> dict[str, str]:
    folder.mkdir()
    labels = {}
    for number, image in enumerate(sorted((photos / "val").glob("*/*.jpg"))[::-1], start=1):
        name = f"ILSVRC2012_val_{number:08d}"
        (folder / f"{name}.JPEG").write_bytes(image.read_bytes())
        labels[name] = image.parent.name
    return labels


@pytest.mark.parametrize("heading", ["ImageId,PredictionString", "filename,label"])
def test_a_flat_folder_takes_its_labels_from_a_csv(photos, tmp_path, heading):
    labels = flat_copy(photos, tmp_path / "val")
    boxes = {"ant": "10 20 30 40 ant 1 2 3 4 ", "bee": "0 0 9 9", "cow": "1 2 3 4"}
    rows = [f"{name},{label} {boxes[label]}" for name, label in labels.items()]
    (tmp_path / "labels.csv").write_text("\n".join([heading, *rows]))
    listing = list_source(tmp_path / "val", tmp_path / "labels.csv")
    assert listing.classes == ("ant", "bee", "cow")
    assert [listing.classes[target] for target in listing.targets] == list(labels.values())
    (tmp_path / "labels.csv").write_text("\n".join(rows[1:]))
    with pytest.raises(DataError, match="val_00000001.JPEG: has no label"):
        list_source(tmp_path / "val", tmp_path / "labels.csv")


def test_class_names_of_several_words_are_kept(photos, tmp_path):
    labels = flat_copy(photos, tmp_path / "val")
    kinds = {"ant": "golden retriever", "bee": "golden eagle", "cow": "box 2 of 3"}
    rows = [f"{name},{kinds[label]}" for name, label in labels.items()]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    listing = list_source(tmp_path / "val", tmp_path / "labels.csv")
    assert set(listing.classes) == set(kinds.values())


def test_a_flat_folder_takes_its_labels_from_the_devkit(photos, tmp_path):
    labels = flat_copy(photos, tmp_path / "val")
    data = tmp_path / "devkit" / "data"
    data.mkdir(parents=True)
    wnids = ("bee", "cow", "ant")
    synsets = np.array(
        [(n, wnid) for n, wnid in enumerate(wnids, 1)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")],
    )
    savemat(data / "meta.mat", {"synsets": synsets})
    numbers = "\n".join(str(wnids.index(label) + 1) for label in labels.values())
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)
    tar = "ILSVRC2012_img_val.tar"
    with tarfile.open(tmp_path / tar, "w") as archive:
        for image in sorted((tmp_path / "val").iterdir()):
            archive.add(image, image.name)
    for source, kit in (("val", "devkit"), ("val", "devkit/data"), ("val", "."), (tar, "devkit")):
        listing = list_source(tmp_path / source, tmp_path / kit)
        assert [listing.classes[target] for target in listing.targets] == list(labels.values())


def test_tar_files_give_the_same_file_as_folders(photos, tmp_path):
    """ILSVRC2012_img_train.tar holds one tar per class; it is read in place."""
    outer_path = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(outer_path, "w") as outer:
        for folder in sorted((photos / "train").iterdir()):
            inner_path = tmp_path / f"{folder.name}.tar"
            with tarfile.open(inner_path, "w") as inner:
                for image in sorted(folder.iterdir()):
                    inner.add(image, image.name)
            outer.add(inner_path, inner_path.name)
    for source, name in ((outer_path, "tar"), (photos / "train", "folder")):
        prepare(list_source(source), tmp_path / f"{name}.beton", StorageOptions())
    assert (tmp_path / "tar.beton").read_bytes() == (tmp_path / "folder.beton").read_bytes()
    outer_path.write_bytes(outer_path.read_bytes()[:5000])
    with pytest.raises(DataError, match="ILSVRC2012_img_train.tar"):
        prepare(list_source(outer_path), tmp_path / "cut.beton", StorageOptions())


def csv_of(labels: dict[str, str], path: Path, *more: str, encoding: str = "utf-8") -> Path:
    rows = [f"{name},{label} 1 2 3 4" for name, label in labels.items()]
    path.write_text("\n".join([*rows, *more]), encoding=encoding)
    return path


def test_a_list_with_a_byte_order_mark_and_no_heading_is_whole(photos, tmp_path):
    labels = flat_copy(photos, tmp_path / "val")
    table = csv_of(labels, tmp_path / "labels.csv", encoding="utf-8-sig")
    listing = list_source(tmp_path / "val", table)
    assert [listing.classes[target] for target in listing.targets] == list(labels.values())
    assert listing.notes == ()


def test_a_file_listed_under_two_classes_is_refused(photos, tmp_path):
    labels = flat_copy(photos, tmp_path / "val")
    name, label = next(iter(labels.items()))
    table = csv_of(labels, tmp_path / "labels.csv", f"{name},{label}")  # the same class again
    assert len(list_source(tmp_path / "val", table).images) == 12
    table = csv_of(labels, tmp_path / "labels.csv", f"{name}.JPEG,dog")
    with pytest.raises(DataError, match=f"gives {name} two classes, {label} and dog"):
        list_source(tmp_path / "val", table)


def test_labels_and_classes_without_images_are_reported(photos, tmp_path, monkeypatch, capsys):
    labels = flat_copy(photos, tmp_path / "val")
    table = csv_of(labels, tmp_path / "labels.csv", "gone1,ant", "gone2,dog", "gone3,dog")
    arguments = f"source={tmp_path}/val", f"labels={table}", f"output={tmp_path}/x.beton"
    assert run_script(monkeypatch, *arguments, "workers=1") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == [
        f"warning: 3 of the 15 labels in {table} have no image (the first: gone1)",
        f"warning: {tmp_path}/x.beton: no images left in 1 class(es), such as dog",
    ]
    assert json.loads((tmp_path / "x.beton.json").read_text())["count_per_class"]["dog"] == 0


@pytest.mark.parametrize(
    "more, message",
    [
        ("name;ant", "line 13: 'name;ant' is not FILE,CLASS; separate them by a comma"),
        ("name\tant", "line 13: .* is not FILE,CLASS"),
        ("name,", "line 13: 'name,' is not"),
        (",ant", "line 13: ',ant' is not"),
        ("\nname", "line 14: 'name' is not"),
    ],
)
def test_a_line_that_is_no_label_is_named(photos, tmp_path, more, message):
    labels = flat_copy(photos, tmp_path / "val")
    with pytest.raises(DataError, match=message) as error:
        list_source(tmp_path / "val", csv_of(labels, tmp_path / "labels.csv", more))
    assert "\n" not in str(error.value)


def test_labels_for_class_folders_and_folders_of_folders_are_explained(photos, tmp_path):
    (tmp_path / "labels.csv").write_text("000,ant\n")
    message = "ant/001.jpg: has no label in .*; drop labels= if the folders"
    with pytest.raises(DataError, match=message):
        list_source(photos / "train", tmp_path / "labels.csv")
    message = f"{photos}/train: class without images .36 image.* or give the folder of class"
    with pytest.raises(DataError, match=message):
        list_source(photos)


def tar_of(path: Path, names: list[str]) -> Path:
    """A tar with these names; those with an arrow are links."""
    with tarfile.open(path, "w") as archive:
        for name in names:
            name, _, target = name.partition(" -> ")
            member = tarfile.TarInfo(name)
            if target:
                member.type, member.linkname = tarfile.LNKTYPE, target
            archive.addfile(member)
    return path


@pytest.mark.parametrize("prefix", ["", "./", "imagenet/train/"])
def test_a_tar_is_listed_like_a_folder(tmp_path, prefix):
    """Hidden files are ignored. Files beside or below the class folders, and links, are listed as
    left aside."""
    images = ["ant/a.jpg", "ant/b.jpg", "bee/a.JPEG", "bee-2/a.jpg"]
    aside = ["beside.jpg", "ant/notes.txt", "ant/sub/deep.jpg", "bee/link.jpg -> ant/a.jpg"]
    hidden = ["ant/._a.jpg", ".git/x.jpg", "ant/.cache/x.jpg"]
    names = [prefix + name for name in (*images, *aside, *hidden)]
    listing = list_source(tar_of(tmp_path / "x.tar", names))
    root = f"{tmp_path}/x.tar:{prefix.removeprefix('./')}"
    assert listing.classes == ("ant", "bee", "bee-2") and listing.targets.tolist() == [0, 0, 1, 2]
    assert [image.name for image in listing.images] == [root + name for name in images]
    assert sorted(listing.aside) == sorted(root + name.partition(" ")[0] for name in aside)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["train/ant/a.jpg", "train/bee/a.jpg", "val/ant/b.jpg"],
            r"x.tar/train: class without images \(2 image",
        ),
        (["imagenet/train/ant/a.jpg", "imagenet/val/ant/b.jpg"], "class without images"),
        (["ant/a.jpg", "bee/a.jpg", "val/ant/b.jpg"], "x.tar/val: class without images"),
        (["ant/a.jpg", "bee/a.jpg", "ant/a.jpg"], "x.tar:ant/a.jpg: is in the tar file 2 times"),
        (["ant/a.jpg", "bee/a.jpg", "./ant/a.jpg"], "x.tar:ant/a.jpg: is in the tar file 2 times"),
        (["a.jpg", "b.jpg"], "holds no class folders"),
        (["ant/a.txt"], "holds no class folders"),
    ],
)
def test_a_tar_that_contradicts_itself_is_refused(tmp_path, names, message):
    with pytest.raises(DataError, match=message) as error:
        list_source(tar_of(tmp_path / "x.tar", names))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "outer, inner, message",
    [
        (["train/ant.tar", "val/ant.tar"], ["a.jpg"], "class without images"),
        (["ant.tar", "ant.tar"], ["a.jpg"], "x.tar:ant/a.jpg: is in the tar file 2 times"),
        (["ant.tar", "bee.tar"], ["a.jpg", "._a.jpg"], None),
        (["ant.tar", "bee.tar"], ["./deeper/a.jpg", "deeper/.x.jpg"], None),
    ],
)
def test_tars_of_classes_are_checked_too(tmp_path, outer, inner, message):
    tar_of(tmp_path / "inner.tar", inner)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in outer:
            archive.add(tmp_path / "inner.tar", name)
    if message is None:
        listing = list_source(tmp_path / "x.tar")
        assert listing.classes == ("ant", "bee") and listing.targets.tolist() == [0, 1]
    else:
        with pytest.raises(DataError, match=message):
            list_source(tmp_path / "x.tar")
