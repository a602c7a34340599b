"""Runs of another recipe are refused, not reported as the table's own."""

import pytest
from omegaconf import OmegaConf

from proxynorm import config
from proxynorm.cli import parse_options
from proxynorm.errors import ConfigError
from proxynorm.reproduce.recipe import refuse_other_recipes
from proxynorm.reproduce.records import collect
from proxynorm.reproduce.runs import table_runs
from proxynorm.reproduce.table import load_table
from scripts.reproduce import Options, main
from tests.reproduce.tiny_table import TINY, write_run


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
        ConfigError, match="^bn-s0 was trained with epochs=1, the table says 7; remove .*/bn-s0, or give"
    ):
        main(parse_options(Options, [*words, "wandb=disabled"]))
    assert not (tmp_path / "results").exists()


def test_what_does_not_decide_the_training_may_differ_and_overrides_count(tiny, tmp_path):
    runs = table_runs(tiny, tmp_path / "runs")
    write_run(runs[0], 50.0)
    config = runs[0].folder / "config.yaml"
    config.write_text(config.read_text().replace("recompute: false\n", ""))  # a key of later days
    refuse_other_recipes(runs, tmp_path, ["device=cuda", "loader.workers=3", "logger=none"])
    with pytest.raises(ConfigError, match="epochs=1, the table says 2"):
        refuse_other_recipes(runs, tmp_path, ["epochs=2"])
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 2\n"))
    assert collect(runs[0], tmp_path / "results")
    config.unlink(), (runs[0].folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match="epochs=2, the table says 1"):
        refuse_other_recipes(runs, tmp_path / "results")
    refuse_other_recipes(runs, tmp_path / "results", ["epochs=2"])


def test_hydra_composes_once_for_the_cells_that_differ_in_values_alone(monkeypatch, tmp_path):
    """The check of a table's runs composes every cell; what comes out is what Hydra makes of the same words."""
    compose, calls = config._compose, []
    monkeypatch.setattr(config, "_compose", lambda *words: calls.append(words) or compose(*words))
    config._base.cache_clear()
    cells = [run for run in table_runs(load_table("mini_norms_lr"), tmp_path / "it's here") if run.seed == 0]
    composed = {run.name: config.compose_config(run.arguments()) for run in cells}
    assert len(cells) == 56 and len(calls) == 9  # the norms
    for run in cells[::20]:
        assert OmegaConf.to_yaml(composed[run.name]) == OmegaConf.to_yaml(compose("train", run.arguments()))
