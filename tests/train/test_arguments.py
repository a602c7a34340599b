"""Arguments of train.py: text stays as typed, and other programs' words lead to our keys."""

from __future__ import annotations

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from proxynorm.errors import ConfigError
from proxynorm.train.arguments import KEY_OF, SYNONYMS, TEXT_KEYS, TEXT_LISTS, quote_arguments
from proxynorm.train.config import check_arguments, compose_config, flat_keys, groups, settings_from
from proxynorm.train.settings import run_name

ODD = ["123456_1", "1.10", "1e3", "0x10", "1_000", "007", "yes", "True", "nan", ".5", "-1", "a,b"]
ODD += ["it's", 'say "x"', "a b", " a", "run=3", "a#b", "~x", "50%", "a\\b", "a\\", "[x]", "{x}"]


@pytest.mark.parametrize("text", ODD)
def test_text_stays_as_it_was_typed(text):
    keys = ["logger.project", "data.root", "data.cache", "runs_dir"]
    keys += ["name"] if "/" not in text else []
    settings = settings_from(compose_config(f"{key}={text}" for key in keys))
    values = (settings.logger.project, settings.data.root, settings.data.cache, settings.runs_dir)
    assert {*values, run_name(settings)} == {text}


def test_paths_with_an_equals_sign_are_paths(tmp_path):
    settings = settings_from(compose_config(["data=folder", "data.root=/d/run=3", "runs_dir=a=b"]))
    assert (settings.data.root, settings.runs_dir) == ("/d/run=3", "a=b")


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("[1_0,2024_01,a]", ["1_0", "2024_01", "a"]),
        ("a,1.10", ["a", "1.10"]),
        ("[yes, 'a,b']", ["yes", "a,b"]),
        ("[]", []),
        ("1e3", ["1e3"]),
    ],
)
def test_tags_are_texts(text, tags):
    assert settings_from(compose_config([f"logger.tags={text}"])).logger.tags == tags


def test_null_quotes_and_interpolations_keep_their_meaning(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/s")
    words = ["name=null", "data.root='1_0'", "runs_dir=${oc.env:SCRATCH}/r"]
    settings = settings_from(compose_config(words))
    assert (settings.name, settings.data.root, settings.runs_dir) == (None, "1_0", "/s/r")


def test_names_that_look_like_one_number_are_two_runs(run_small):
    """Hydra reads both names as the number 101: the second run would be found finished."""
    folders = {run_small(f"name={name}", "epochs=1").folder.name for name in ("1_01", "10_1")}
    assert folders == {"1_01", "10_1"}


def test_texts_of_a_sweep_stay_separate():
    words = quote_arguments(
        ["name=1_0,b", "logger.tags=[1_0],[b]", "norm=bn,ln"], groups(), sweep=True
    )
    assert words == ["name='1_0',b", "logger.tags=['1_0'],[b]", "norm=bn,ln"]
    parsed = OverridesParser.create().parse_overrides(words)
    assert all(item.is_sweep_override() for item in parsed)
    assert [*parsed[0].sweep_string_iterator()] == ["'1_0'", "b"]


def test_quoting_twice_changes_nothing():
    words = [f"name={text}" for text in ODD] + ["logger.tags=[1_0,a]", "experiment=2024_01"]
    once = quote_arguments(words, groups())
    assert quote_arguments(once, groups()) == once


def test_the_command_line_overrides_wandb_variables(monkeypatch):
    for name, value in (("PROJECT", "2024_01"), ("TAGS", "1_0,mine"), ("RUN_GROUP", "g")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = settings_from(compose_config([])).logger
    assert (logger.project, logger.tags, logger.group) == ("2024_01", ["1_0", "mine"], "g")
    logger = settings_from(compose_config(["logger.project=x", "logger.tags=[y]"])).logger
    assert (logger.project, logger.tags) == ("x", ["y"])
    monkeypatch.setenv("WANDB_PROJECT", "")
    assert settings_from(compose_config([])).logger.project == "proxynorm"


def test_text_keys_follow_the_declared_types():
    assert {"name", "runs_dir", "data.root", "logger.entity", "model.name"} <= TEXT_KEYS
    assert {"logger.tags", "freeze"} == TEXT_LISTS
    others = {"batch", "optim.lr", "norm_batch", "compile", "data.mean"}
    assert not others & (TEXT_KEYS | TEXT_LISTS)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("lr=0.1", "no key 'lr'; write optim.lr=…"),
        ("optim.learning_rate=0.1", "no key 'optim.learning_rate'; write optim.lr=…"),
        ("learning-rate=0.1", "write optim.lr=…"),
        ("wd=1e-4", "write optim.weight_decay=…"),
        ("batch_size=32", "write batch=…"),
        ("bs=32", "write batch=…"),
        ("arch=resnet50", "write model=…"),
        ("momentum=0.9", "write optim.momentum=…"),
        ("workers=4", "write loader.workers=…"),
        ("num_workers=4", "write loader.workers=…"),
        ("mixup=0.2", "write regularization.mixup=…"),
        ("dataset=folder", "write data=…"),
        ("data.img_size=64", "write data.image_size=…"),
        ("gpus=2", "torchrun --standalone --nproc-per-node=GPUS"),
        ("num_classes=10", "the data set tells the number of classes"),
        ("grad_accum=4", "give micro_batch=IMAGES"),
        ("amp=true", "write precision=…"),
        ("pretrained=true", "write weights=…"),
        ("flip=false", "write data.flip=…"),
        ("--norm ln_pn", "write norm=…"),
        ("--lr=0.1", "write optim.lr=…"),
        ("--batch-size 32", "write batch=…"),
        ("-b 32 norm=bn", "write batch=…"),
        ("--resume x.pt", "write resume=…"),
        ("resume=x.pt", "weights=FILE starts from a file"),
        ("--resume must", "write resume=…"),
        ("--precision 16", "write precision=…"),
        ("--dtype fp16", "write precision=…"),
        ("torch_compile=true", "write compile=…"),
        ("--norm batch", "write norm=…"),
        ("--arch resnet18", "write model=…"),
        ("norm=bn --foo", "arguments have the form key=value"),
        ("--config-path=/c experiment=mine", "replace the configuration"),
        ("gpu=0", "write device=cuda:N"),
        ("accumulate=4", "give micro_batch=IMAGES"),
        ("config=mine.yaml", "a recipe is experiment=NAME"),
        ("checkpoint=x.pt", "weights=FILE starts from a file"),
        ("optimizer=adamw", "write optim=…"),
        ("optim.lr_scale=fc:10", "optim.lr_scale=fc:10: must be numbers by name, as {fc:10}"),
        ("model=resnet_18", "did you mean 'resnet18'?"),
        ("optim=adamw", "optim.name= takes any optimizer of timm's"),
        ("seed=0,1", "seed=0,1: several values need -m, as in: python train.py -m seed=0,1"),
        ("norm=bn,ln", "norm=bn,ln: several values need -m"),
        ("precision=fp32,bf16", "several values need -m"),
        ("batch=1=2", "batch=1=2: the value cannot be read"),
        ("--config-dir=/no/where norm=bn", "--config-dir=/no/where: no such folder"),
        ("-m batch=10 micro_batch=3 seed=0,1", "batch=10 is not divisible by micro_batch=3"),
    ],
)
def test_words_of_other_programs_are_answered_with_our_key(words, advice):
    with pytest.raises(ConfigError, match=re.escape(advice)):
        check_arguments(words.split())


def test_the_doctor_also_answers_options_with_dashes():
    with pytest.raises(ConfigError, match="'--norm': write norm=…"):
        compose_config(["batch=8", "--norm", "bn"])


def test_synonyms_lead_to_keys_and_are_not_keys():
    """A word leads to a single key, which exists."""
    words = [word for words in SYNONYMS["keys"].values() for word in words.split()]
    assert len(words) == len(set(words)) == len(KEY_OF)
    known = {*flat_keys(compose_config([])), *groups()}
    assert not set(words) & known
    assert set(SYNONYMS["keys"]) <= known


def test_a_sweep_starts_if_only_some_runs_are_wrong():
    assert check_arguments(["-m", "batch=100,8", "micro_batch=8"])[0] == "-m"


def test_the_rate_of_a_numbered_part_and_null_tags():
    settings = settings_from(compose_config(["optim.lr_scale={1:0.1}", "logger.tags=null"]))
    assert settings.optim.lr_scale == {"1": 0.1} and settings.logger.tags is None


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "regnety_002"])
def test_any_timm_name_is_a_model(name):
    direct = settings_from(compose_config([f"model={name}"]))
    long = settings_from(compose_config(["model=timm", f"model.name={name}"]))
    assert direct == long and name in run_name(direct)
    assert check_arguments(["-m", f"model={name},resnet20v2"])


def test_options_in_a_folder_of_the_user(tmp_path):
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "mine.yaml").write_text("name: gn_pn\ngroups: 4\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "2024_01.yaml").write_text("# @package _global_\nbatch: 24\n")
    for folder in (f"--config-dir={tmp_path}", f"hydra.searchpath=[{tmp_path}]"):
        words = check_arguments([folder, "norm=mine", "experiment=2024_01"])
        settings = settings_from(compose_config(words))
        assert (settings.norm.groups, settings.batch) == (4, 24)
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        check_arguments(["--config-dir", str(tmp_path), "norm=mien"])
