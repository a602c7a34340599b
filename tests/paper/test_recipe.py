"""Runs of another recipe are refused, not reported as the table's own."""

import shutil

import pytest
from omegaconf import OmegaConf

from proxynorm.cli import parse_options
from proxynorm.commands.reproduce import Options, main
from proxynorm.errors import ConfigError
from proxynorm.paper.plan import plan_text, status_text
from proxynorm.paper.records import collect, refuse_other_recipes
from proxynorm.paper.table import load_table, table_runs
from proxynorm.train import config
from tests.tiny_table import TINY, write_run


@pytest.mark.parametrize("command", ["run", "collect", "report"])
def test_after_an_edit_of_the_table_its_old_runs_are_refused(tiny, tmp_path, stand_in, command):
    write_run(table_runs(tiny, tmp_path / "runs")[0], 50.0)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs=1", "epochs=7"))
    words = [
        f"command={command}",
        f"table={tmp_path}/tiny.yaml",
        f"root={tmp_path}/runs",
        f"results={tmp_path}/results",
    ]
    with pytest.raises(
        ConfigError,
        match=r"^bn-s0 was not trained as .* says \(epochs: 1 → 7\); remove .*/bn-s0, or keep",
    ):
        main(parse_options(Options, [*words, "wandb=disabled"]))
    assert not (tmp_path / "results").exists()


def test_irrelevant_keys_may_differ_and_overrides_count(tiny, tmp_path):
    runs = table_runs(tiny, tmp_path / "runs")
    write_run(runs[0], 50.0)
    config = runs[0].folder / "config.yaml"
    config.write_text(config.read_text().replace("recompute: false\n", ""))  # a key of later days
    incidental = ["device=cuda", "loader.workers=3", "logger=none"]
    refuse_other_recipes(with_overrides(tiny, tmp_path, *incidental), tmp_path)
    with pytest.raises(ConfigError, match=r"\(epochs: 1 → 2\)"):
        refuse_other_recipes(with_overrides(tiny, tmp_path, "epochs=2"), tmp_path)
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 2\n"))
    assert collect(runs[0], tmp_path / "results")
    (runs[0].folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"\(epochs: 2 → 1\)"):
        refuse_other_recipes(runs, tmp_path / "results")
    refuse_other_recipes(with_overrides(tiny, tmp_path, "epochs=2"), tmp_path / "results")


def with_overrides(table, tmp_path, *overrides):
    """The table's runs under train=[…]."""
    return table_runs(table, tmp_path / "runs", overrides=overrides)


def other_epochs(run, epochs):
    """Makes the run's folder that of a training of so many epochs."""
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1\n", f"epochs: {epochs}\n"))


def test_the_advice_names_the_folders_and_an_override_helps(tiny, tmp_path):
    runs = table_runs(tiny, tmp_path / "runs")
    for run in runs[:2]:
        write_run(run, 50.0)
        other_epochs(run, 3)
    with pytest.raises(ConfigError, match=r"; remove \S*/bn-s0, \S*/ln_pn-s0, or .*train=\["):
        refuse_other_recipes(runs, tmp_path)
    refuse_other_recipes(with_overrides(tiny, tmp_path, "epochs=3"), tmp_path)


def test_status_and_plan_mark_runs_of_another_recipe(tiny, tmp_path):
    runs = table_runs(tiny, tmp_path / "runs")
    for run in runs[:2]:
        write_run(run, 50.0)
    other_epochs(runs[0], 3)
    assert collect(runs[0], tmp_path / "results")
    for _ in ("the folder", "the archive alone"):
        lines = status_text(runs, tmp_path / "results").splitlines()
        assert lines[0].split(maxsplit=2) == ["bn-s0", "other", "another recipe (epochs: 3 → 1)"]
        assert lines[-1] == "1 done, 1 other, 2 missing"
        assert "1 done, 1 other" in status_text(
            with_overrides(tiny, tmp_path, "epochs=3"), tmp_path / "results"
        )
        text = plan_text(tiny, runs, tmp_path / "results", verbose=True)
        assert (
            "= 4 runs; 1 done" in text
            and "bn-s0: another recipe (epochs: 3 → 1)" in text
            and "[other] python" in text
        )
        shutil.rmtree(runs[0].folder, ignore_errors=True)


def test_hydra_composes_once_for_cells_that_differ_only_in_values(monkeypatch, tmp_path):
    """The cells that are composed without Hydra are as Hydra composes them."""
    compose, calls = config.compose, []
    monkeypatch.setattr(config, "compose", lambda *words: calls.append(words) or compose(*words))
    config._compose.cache_clear()
    cells = [
        run
        for run in table_runs(load_table("mini_search"), tmp_path / "it's here")
        if run.seed == 0
    ]
    composed = {run.name: config.compose_config(run.arguments) for run in cells}
    assert len(cells) == 72 and len(calls) == 9  # the norms
    for run in cells[::20]:
        assert OmegaConf.to_yaml(composed[run.name]) == OmegaConf.to_yaml(
            config._compose(*run.arguments)
        )
