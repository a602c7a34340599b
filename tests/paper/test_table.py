"""Tables as data: well formed, with trainable cells and references that may be quoted."""

import pytest

from proxynorm.errors import ConfigError
from proxynorm.nn import NORMS
from proxynorm.paper.table import load_table, read_chosen, table_names, table_runs
from proxynorm.train.arguments import quoted
from proxynorm.train.config import check_choice, compose_config, groups, parse, settings_from
from tests.helpers import ROOT
from tests.tiny_table import TINY

TABLES = (
    "demo",
    "efficientnet_g16",
    "imagenet_batch",
    "imagenet_norms",
    "mini_batch",
    "mini_depth",
    "mini_norms",
    "mini_regularization",
    "mini_search",
    "study",
    "study_depth",
)


def test_the_tables_are_there():
    assert table_names() == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_cells_have_distinct_plain_names(name):
    cells = load_table(name).expand()
    assert len({cell.name for cell in cells}) == len(cells) > 1
    assert all("/" not in cell.name and "=" not in cell.name for cell in cells)


@pytest.mark.parametrize("name", TABLES)
def test_cells_are_trainable(name):
    """Every group choice exists; a cell for every set of keys composes."""
    chosen = {norm: {"optim.base_lr": 0.1} for norm in NORMS}
    data = ["data.root=somewhere"] if name.startswith(("imagenet", "efficientnet")) else []
    kinds = {}
    for run in table_runs(load_table(name), "runs", chosen):
        overrides = parse(list(run.cell.overrides))
        for override in overrides:
            check_choice(override, groups())
        kinds.setdefault(frozenset(override.key_or_group for override in overrides), run)
    for run in kinds.values():
        settings = settings_from(compose_config([*run.arguments, *data]))
        assert settings.name == run.name and settings.logger.group == name


def test_references_are_the_sister_papers():
    table = load_table("efficientnet_g16")
    values = {reference.cell: reference.value for reference in table.references}
    assert len(values) == 24 and {reference.label for reference in table.references} == {"D"}
    assert (values["b0-native-ln_pn"], values["b5-half-gn"]) == (79.42, 83.59)


def test_the_papers_own_tables_are_not_quoted():
    assert load_table("imagenet_norms").references == []


def test_runs_go_through_all_cells_before_the_next_seed(tiny):
    assert [run.name for run in table_runs(tiny, "runs")] == [
        "bn-s0",
        "ln_pn-s0",
        "bn-s1",
        "ln_pn-s1",
    ]


def test_tuned_tables_take_what_the_search_chose():
    table = load_table("mini_norms")
    chosen = {cell.name: {"optim.base_lr": 0.25} for cell in table.expand()}
    assert all("optim.base_lr=0.25" in cell.overrides for cell in table.expand(chosen))
    with pytest.raises(ConfigError, match="nothing for bn"):
        table.expand({})


def test_chosen_values_come_from_results_else_from_the_package(tmp_path, monkeypatch):
    table = load_table("mini_norms")
    shipped = read_chosen(table, tmp_path)
    assert shipped == read_chosen(table, ROOT / "results") and "bn" in shipped
    (tmp_path / "mini_search").mkdir()
    (tmp_path / "mini_search" / "chosen.json").write_text('{"chosen": {"bn": {}}}')
    assert read_chosen(table, tmp_path) == {"bn": {}}
    monkeypatch.setattr("proxynorm.paper.table.SHIPPED", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"chosen.json is missing: first .* run table=mini_sea"):
        read_chosen(table, tmp_path / "elsewhere")


def test_the_split_of_a_table_follows_its_holdout(tiny, tmp_path):
    assert tiny.split == "200 training images that were held out"
    path = tmp_path / "whole.yaml"
    path.write_text(TINY.replace("data.holdout=200, ", ""))
    assert load_table(str(path)).split == "the test set"


def test_rules_apply_to_the_cells_they_name():
    cells = {cell.name: cell for cell in load_table("efficientnet_g16").expand()}
    assert "data.image_size=192" in cells["b2-half-gn"].overrides
    assert not any(item.startswith("data.image_size") for item in cells["b2-native-gn"].overrides)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "with space",
        "it's",
        "a\\'b",
        "$(touch x)",
        "back\\",
        "`x`; rm",
        "a,b",
        "ünï",
        "x=y",
        "12",
    ],
)
def test_quoting_reaches_the_configuration_literally(text):
    config = compose_config([f"logger.group={quoted(text)}", f"logger.tags=[{quoted(text)}]"])
    assert config.logger.group == text and config.logger.tags == [text]


@pytest.mark.parametrize(
    "change, message",
    [
        ("rows: [norm]", "no axis 'nrom'"),
        ("cells:", "unexpected keyword"),
        ("first: ln_pn", "no cell 'lnpn'"),
        ("expect: equal", "expect"),
    ],
)
def test_a_malformed_table_is_one_clear_line(tmp_path, change, message):
    wrong = {
        "rows: [norm]": "rows: [nrom]",
        "cells:": "colour: red\ncells:",
        "first: ln_pn": "first: lnpn",
        "expect: equal": "expect: same",
    }
    path = tmp_path / "wrong.yaml"
    path.write_text(TINY.replace(change, wrong[change]))
    with pytest.raises(ConfigError, match=message) as error:
        load_table(str(path))
    assert "\n" not in str(error.value)


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mini_norms'"):
        load_table("mininorms")
