"""The configuration: every file composes, and mistakes are one line with the nearest name."""

from __future__ import annotations

import re

import pytest
import torch
from omegaconf import OmegaConf

from proxynorm.errors import ConfigError
from proxynorm.nn import NORMS
from proxynorm.train.config import CONFIGS, check_arguments, compose_config, groups, settings_from
from proxynorm.train.optimizer import create_schedule
from proxynorm.train.settings import RegularizationSettings, Settings, identity, run_name

NEEDED = {
    ("data", "folder"): ["data.root=x"],
    ("data", "beton"): ["data.root=x"],
    ("model", "timm"): ["model.name=resnet18"],
}


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, names in groups().items() for name in names]
)
def test_every_option_composes(group, name):
    overrides = [f"{group}={name}", *NEEDED.get((group, name), [])]
    if group == "experiment" and compose_config(overrides).data.name != "fashion_mnist":
        overrides.append("data.root=x")
    settings_from(compose_config(overrides))


@pytest.mark.parametrize("experiment", [[], ["experiment=imagenet_efficientnet_b2", "data.root=x"]])
def test_debug_overfit_turns_off_all_that_keeps_the_loss_up(experiment):
    settings = settings_from(compose_config([*experiment, "debug=overfit"]))
    assert (
        settings.debug.overfit
        and settings.schedule.name == "constant"
        and settings.optim.weight_decay == 0
    )
    assert settings.regularization == RegularizationSettings(
        name="none", ema_every=settings.regularization.ema_every
    )


def test_every_file_says_what_it_is():
    for path in CONFIGS.rglob("*.yaml"):
        lines = [
            line for line in path.read_text().splitlines() if not line.startswith("# @package")
        ]
        assert lines[0].startswith("# ") and len(lines[0]) > 6, path


def test_every_norm_has_a_file():
    assert set(groups()["norm"]) == set(NORMS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("norm=LN_PN", "norm=LN_PN: no such norm; did you mean 'ln_pn'?"),
        ("norm=ln_pm", "norm=ln_pm: no such norm; did you mean 'ln_pn'? valid: bn, bn_pn"),
        ("modle=resnet50", "no key 'modle'; did you mean 'model'?"),
        ("bacth=3", "no key 'bacth'; did you mean 'batch'?"),
        ("optim.momentun=0.5", "did you mean 'optim.momentum'? valid: optim.base_batch"),
        ("batch=many", "batch=many: must be a whole number in digits"),
        ("epochs=1e3", "epochs=1000.0: must be a whole number in digits"),
        ("epochs=null", "epochs=null: must be a whole number in digits"),
        ("patience=[1,2]", "patience=[1, 2]: must be a whole number in digits, or null"),
        ("deterministic=maybe", "deterministic=maybe: must be true or false"),
        ("seed=99999999999999999999", "seed=99999999999999999999: is too large"),
        ("weights=", "weights= is empty: give a value, or leave it out"),
        ("runs_dir=", "runs_dir= is empty"),
        ("norm=null", "norm=null: no such norm; valid: bn"),
        ("experiment=null", "for none, leave it out"),
        (
            "norm.name=foo",
            "valid: bn, bn_pn, gn, gn_pn, gn_ws, gn_ws_pn, in, in_pn, ln, ln_pn, ln_ws",
        ),
        ("optim.eps=0", "no key 'optim.eps'; write +optim.eps=… if the chosen optim uses it"),
        ("optim.lr_scale={fc:nan}", "optim.lr_scale.fc=nan: must be above 0 and finite"),
        ("data=folder data.root=/x data.std=[0.2,nan,1]", "data.std=nan: must be above 0"),
        ("data=folder data.root=/x data.mean=[123,116,103]", "data.mean=123: must be from 0 to 1"),
        ("batch=0", "batch=0: must be at least 1"),
        ("epochs=-1", "epochs=-1: must be at least 1"),
        ("batch=10 micro_batch=3", "batch=10 is not divisible by micro_batch=3"),
        ("precision=fp8", "precision=fp8: did you mean 'fp32'? valid: auto, bf16, fp16"),
        (
            "norm=bn norm_batch=48",
            "norm_batch=48 does not divide the 128 images of a process's forward",
        ),
        ("norm=bn_pn norm_batch=64 micro_batch=32", "norm_batch=64 does not divide the 32 images"),
        ("norm_batch=local", "norm_batch=local: valid: a number of images, 'global'"),
        ("data=folder", "data.root must be given, as data.root=…"),
        ("norm=[bn,ln]", "no such norm"),
        ("name=../elsewhere", "must be a plain folder name"),
        ("name=..", "name=..: must be a plain folder name"),
        ("name=.", "must be a plain folder name"),
        ("name=", "name= is empty"),
        ("logger.mode=foo", "logger.mode=foo: valid: auto, disabled, offline, online"),
        (
            "schedule=multistep schedule.milestones=5",
            "must be a list of numbers, as [1,2], or null",
        ),
        (
            "schedule=multistep schedule.milestones=[3,nan]",
            "schedule.milestones=nan: must be at least 0 and finite",
        ),
        ("schedule.name=foo", "schedule.name=foo: valid: constant, cosine"),
        ("+foo=1", "no key 'foo'; valid: batch"),
        ("+data.rot=1", "no key 'data.rot'; did you mean 'data.root'?"),
        ("--foo", "unrecognized arguments: --foo; arguments have the form key=value"),
        ("--cfg", "argument --cfg/-c: expected one argument"),
        ("optim.lr=0", "optim.lr=0: must be above 0 and finite"),
        ("batch", "arguments have the form key=value"),
        ("-m norm=bn,lln", "norm=lln: no such norm"),
    ],
)
def test_mistakes_are_one_line(argument, message):
    with pytest.raises(ConfigError) as error:
        check_arguments(argument.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            "checkpoint.every_steps=0,-1 norm.groups=0 optim.base_batch=0 power.images=0",
            "at least 1",
        ),
        ("data.image_size=0,65536 norm.nodes=0,65536", "from 1 to 65535"),
        ("loader.timeout=0 data.limit=0", "at least 1"),
        ("debug.profile_steps=-3 norm.eps=-1 nonfinite_limit=-1 seed=-1", "at least 0 and finite"),
        (
            "schedule.min_lr=-1 schedule.warmup_epochs=-1 optim.weight_decay=-1,inf "
            "regularization.mixup=-1",
            "at least 0 and finite",
        ),
        (
            "optim.lr=inf,-1,nan optim.base_lr=0 optim.clip_grad=0,-1 checkpoint.every_minutes=-1",
            "above 0 and finite",
        ),
        (
            "regularization.label_smoothing=2 regularization.mix_probability=3 power.threshold=nan "
            "regularization.random_erasing=-1",
            "from 0 to 1",
        ),
        (
            "regularization.stochastic_depth=2 optim.momentum=2 regularization.ema_decay=2,1",
            "at least 0 and below 1",
        ),
    ],
)
def test_a_value_out_of_its_range_is_named_with_it(values, words):
    config = compose_config([])
    for key, listed in (item.split("=") for item in values.split()):
        for value in listed.split(","):
            with pytest.raises(ConfigError) as error:
                settings_from(OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={value}"])))
            assert str(error.value) == f"{key}={value}: must be {words}"


def test_defaults_lie_in_their_ranges():
    settings_from(OmegaConf.merge(OmegaConf.structured(Settings), {"model": {"name": "resnet50"}}))


def test_normalization_batches_divide_every_process_s_forward():
    settings = settings_from(compose_config(["norm=bn", "batch=128", "norm_batch=32"]))
    assert settings.micro_batch_for(4) == 32
    with pytest.raises(ConfigError, match="norm_batch=32 does not divide the 16 images"):
        settings.micro_batch_for(8)
    for unconcerned in ("norm=ln_pn norm_batch=48", "norm=bn norm_batch=global"):
        assert settings_from(compose_config(unconcerned.split())).micro_batch_for(8) == 16


def test_learning_rate_follows_the_batch():
    rates = [
        settings_from(compose_config([f"batch={batch}"])).learning_rate for batch in (32, 128, 256)
    ]
    assert rates == pytest.approx([0.025, 0.1, 0.2])
    assert settings_from(compose_config(["batch=32", "optim.lr=0.3"])).learning_rate == 0.3


def test_run_name_follows_what_is_trained():
    def name(*overrides: str) -> str:
        return run_name(settings_from(compose_config(overrides)))

    assert name() == name(
        "device=cpu", "loader=torchvision", "logger=none", "max_steps=3", "checkpoint.every_steps=5"
    )
    assert name() == name("nonfinite=skip", "nonfinite_limit=3")
    others = {
        name(),
        name("norm=bn"),
        name("batch=64"),
        name("seed=1"),
        name("model.width=8"),
        name("data.limit=100"),
        name("optim.weight_decay=0.1"),
        name("regularization=extra"),
        name("norm_batch=4"),
        name("epochs=6"),
    }
    assert len(others) == 10
    assert name("name=mine") == "mine"
    assert "ln_pn" in name() and "b128" in name() and "s0" in name()


def test_identity_does_not_depend_on_the_machine():
    flat = identity(settings_from(compose_config(["device=cpu", "data.root=/somewhere"])))
    assert not [
        key for key in flat if key.split(".")[0] in ("device", "logger", "loader", "runs_dir")
    ]
    assert "/somewhere" not in flat.values()


HEAD = ("command", "hardware", "time", "accuracy", "status", "source")


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda path: path.stem
)
def test_experiments_have_a_head_and_take_effect(path):
    lines = [
        line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")
    ]
    head = dict(line.split(": ", 1) for line in lines if line.split(": ")[0] in HEAD)
    assert tuple(head) == HEAD
    assert head["status"] in ("measured", "quoted", "not run")
    assert f"experiment={path.stem} " in head["command"]
    config = compose_config([f"experiment={path.stem}", "data.root=x"])
    rung = re.fullmatch(r"imagenet_resnet50_(\d+)epochs", path.stem)
    ladder = (4096, int(rung[1])) if rung else (1024, 65)
    assert (config.batch, config.epochs) == ((768, 350) if "efficientnet" in path.stem else ladder)
    assert str(config.model.name) in path.stem


def test_imagenet_learning_rates_are_the_recipes():
    rate = {
        name: settings_from(
            compose_config([f"experiment={name}", "data.root=x", "batch=512"])
        ).learning_rate
        for name in ("imagenet_resnet50", "imagenet_efficientnet_b0")
    }
    assert rate == pytest.approx(
        {"imagenet_resnet50": 512 * 2**-11, "imagenet_efficientnet_b0": 512 * 2**-14}
    )


@pytest.mark.parametrize(
    "name", [name for name in groups()["experiment"] if "efficientnet" in name]
)
def test_efficientnets_cut_and_mix_as_the_authors_do(name):
    """λ is 0.95 … 0.8 for B1 … B5, none for B0; mixup 0.1 up to B2, then 0.2."""
    number = int(re.search(r"_b(\d)", name)[1])
    regularization = settings_from(
        compose_config([f"experiment={name}", "data.root=x"])
    ).regularization
    assert regularization.cutmix_lambda == (None, 0.95, 0.9, 0.9, 0.85, 0.8)[number]
    assert (regularization.mixup, regularization.cutmix) == (0.1 if number < 3 else 0.2, 0)


def test_a_sweep_of_a_new_key_keeps_its_plus():
    words = "-m +optim.eps=1e-8,1e-7".split()
    assert check_arguments(words) == words


@pytest.mark.parametrize("epochs", [16, 24, 32, 40, 56, 88])
def test_the_epoch_ladder_follows_ffcv_imagenet(epochs):
    """From epoch 2 the rate falls linearly from 1.7 to 0; the resolution grows as configured."""
    settings = settings_from(
        compose_config([f"experiment=imagenet_resnet50_{epochs}epochs", "data.root=x"])
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    schedule = create_schedule(optimizer, settings, steps_per_epoch=10)
    for epoch in (2, 5, epochs // 2, epochs - 1):
        schedule.step_update(10 * epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            1.7 * (epochs - epoch) / (epochs - 2), rel=1e-5
        )
    start, end = settings.data.ramp
    assert 0.65 < start / epochs < 0.76 < end / epochs < 0.87
    assert (settings.data.start_size, settings.data.image_size, settings.data.eval_size) == (
        160,
        192,
        256,
    )
