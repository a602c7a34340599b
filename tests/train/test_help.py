"""train.py --help: every key is explained, in 80 columns."""

from __future__ import annotations

import re

import pytest

from proxynorm.train.config import groups
from proxynorm.train.help import fold, help_text

ARGUMENTS = [[f"{group}={name}"] for group in ("optim", "schedule") for name in groups()[group]]
ARGUMENTS += [["data=folder"], ["data=beton", "loader=ffcv"], ["experiment=imagenet_resnet50"]]
ARGUMENTS += [["model=efficientnet_b0", "logger=none"], ["debug=overfit", "regularization=extra"]]


@pytest.mark.parametrize("arguments", [[], *ARGUMENTS], ids=" ".join)
def test_every_key_is_explained_in_80_columns(arguments):
    text = help_text(arguments)
    assert max(map(len, text.splitlines())) <= 80
    lines = text[text.index("Keys: ") :].splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"  [a-z]", line):  # the explanation stands beside the key or below it
            assert re.search(r"\S {1,}\S", line[2:]) or following.startswith(" " * 20), line
    assert "(ln_pn)" in text and not re.search(r"=\?\?\?|None|True", text)


def test_the_options_in_use_are_shown():
    text = help_text(["experiment=imagenet_efficientnet_b0", "norm=gn", "data.root=/a", "batch=5"])
    for words in (
        "(efficientnet_b0)",
        "(beton)",
        "norm=gn: Group Norm",
        "data.root=/a",
        "batch=5 ",
    ):
        assert words in text


def test_each_family_of_experiments_is_one_line():
    text = help_text([])
    lines = [line for line in text.splitlines() if line.startswith("  imagenet_")]
    assert len(lines) == 8 and len(lines[0].split()) > 3
    assert lines[1].startswith("  imagenet_efficientnet_b{0,1,2,3,4,5}_g16 ")


def test_names_are_folded_as_a_shell_unfolds_them():
    names = ["b0", "b1", "b2", "b0_g16", "r16e", "r24e", "r32e", "v1", "v2", "none"]
    assert [*dict.fromkeys(fold(names))] == [
        "b{0,1,2}",
        "b0_g16",
        "r{16,24,32}e",
        "v1",
        "v2",
        "none",
    ]
