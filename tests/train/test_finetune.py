"""Starting from weights: what is taken over, what is new, what is frozen, at which rates."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from proxynorm import create_model
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.export import export_run
from proxynorm.nn import parameter_groups
from proxynorm.train import checkpoint, finetune
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.finetune import Weights, read_weights
from proxynorm.train.optimizer import layers_of, scale_rates
from proxynorm.train.parts import classifier_names, freeze_parts
from proxynorm.train.restore import restore
from proxynorm.train.run import train
from proxynorm.train.settings import NormSettings, OptimSettings, Settings
from tests.acceptance.test_resume import Killed, at_step, kill
from tests.helpers import assert_same_run

STEPS = "max_steps=2"


def carried(norm: str, source: str, classes: int = 10, **settings):
    """Return a network, another one that took over its weights, and the notes about it."""
    arguments = {"depth": 8, "width": 8, "in_chans": 1}
    old = create_model("resnet20v2", source, 10, **arguments)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(0.1)
    new = create_model("resnet20v2", norm, classes, **arguments)
    given = Settings(model={"name": "resnet20v2"}, norm=NormSettings(norm), weights="FILE")
    weights = Weights(old.state_dict(), norm=source, **settings)
    start = finetune.carry_over(new, weights, given, list(map(str, range(classes))))
    return old, new, start["notes"]


def test_the_same_network_takes_over_everything():
    old, new, notes = carried("bn_pn", "bn_pn")
    values = new.state_dict()
    assert all(torch.equal(value, values[key]) for key, value in old.state_dict().items())
    assert len(notes) == 1 and notes[0].endswith("classifier kept")


@pytest.mark.parametrize(
    ("source", "norm", "said"),
    [
        (
            "bn",
            "ln_pn",
            "norm bn → ln_pn; new: 14 tensors (proxy_bias, proxy_weight); left out: 21 tensors "
            "(num_batches_tracked, running_mean, running_var)",
        ),
        ("ln_pn", "bn", "(num_batches_tracked, running_mean, running_var); left out: 14 tensors "),
        ("ln_pn", "gn_pn", "norm ln_pn → gn_pn"),
        ("ln", "ln_ws", None),
        ("ln_ws", "gn", None),
    ],
)
def test_another_norm_takes_over_what_it_shares(source, norm, said):
    old, new, notes = carried(norm, source)
    assert torch.equal(new.norm.weight, old.norm.weight)
    assert said is None or said in notes[0]
    assert torch.equal(new.fc.weight, old.fc.weight)
    values = {finetune.plain_name(key): value for key, value in old.state_dict().items()}
    for key, value in new.state_dict().items():
        if "conv" in key or "stem" in key:
            assert torch.equal(value, values[finetune.plain_name(key)])


def test_other_classes_get_a_new_classifier():
    _, new, notes = carried("ln", "ln", classes=3)
    assert "new classifier for 3 classes" in notes[0] and new.fc.weight.shape[0] == 3


def test_other_classes_of_the_same_number_get_a_new_classifier():
    old = create_model("resnet20v2", "ln", 2, depth=8, width=8)
    new = create_model("resnet20v2", "ln", 2, depth=8, width=8)
    settings = Settings(model={"name": "resnet20v2"}, norm=NormSettings("ln"), weights="FILE")
    weights = Weights(old.state_dict(), classes=["cat", "dog"])
    notes = finetune.carry_over(new, weights, settings, ["bus", "car"])["notes"]
    assert "new classifier for 2 classes" in notes[0]
    assert not torch.equal(old.fc.weight, new.fc.weight)


def test_another_network_is_refused():
    old = create_model("resnet20v2", "ln", 2, depth=8, width=16)
    new = create_model("resnet20v2", "ln", 2, depth=8, width=8)
    settings = Settings(model={"name": "resnet20v2"}, norm=NormSettings("ln"), weights="FILE")
    with pytest.raises(ConfigError, match=r"weights=FILE: another network: \d+ of \d+ tensors"):
        finetune.carry_over(new, Weights(old.state_dict()), settings, ["a", "b"])


def test_layers_of_another_kind_are_refused():
    """As VGG11's features.16, a convolution, and that of VGG11-BN, a norm."""
    network = create_model("resnet20v2", "ln", 2, depth=8, width=8)
    tensors = {key: value.flatten() for key, value in network.state_dict().items()}
    settings = Settings(model={"name": "resnet20v2"}, norm=NormSettings("ln"), weights="FILE")
    with pytest.raises(ConfigError, match="weights=FILE: another network"):
        finetune.carry_over(network, Weights(tensors), settings, ["a", "b"])


def test_colour_weights_are_adapted_to_grey_images():
    old = create_model("resnet20v2", "ln", 2, depth=8, width=8)
    new = create_model("resnet20v2", "ln", 2, depth=8, width=8, in_chans=1)
    settings = Settings(model={"name": "resnet20v2"}, norm=NormSettings("ln"), weights="FILE")
    notes = finetune.carry_over(new, Weights(old.state_dict()), settings, ["a", "b"])["notes"]
    assert "first convolution adapted from 3 to 1 channel(s)" in notes[0]
    assert torch.allclose(new.stem.weight, old.stem.weight.sum(1, keepdim=True))


def test_a_run_needs_its_initial_weights_only_once(run_small, monkeypatch, capsys):
    """It starts from a folder or file, and is resumed, evaluated and finished without it."""
    first = run_small("name=first", "norm=bn", STEPS)
    options = (f"weights={first.folder}", "norm=ln_pn", "seed=1", "checkpoint.every_steps=3")
    whole = run_small("name=whole", *options)
    assert "started from" in capsys.readouterr().out
    assert whole.last["start"]["weights"] == str(first.folder)
    at_step(monkeypatch, 8, kill)
    with pytest.raises(Killed):
        run_small("name=cut", *options)
    shutil.rmtree(first.folder)
    cut = run_small("name=cut", *options)
    assert_same_run(whole, cut)
    assert run_small("name=cut", *options).status == 0
    assert restore(cut.folder / "checkpoints/best.pt").settings.weights == str(first.folder)
    assert json.loads((cut.folder / "summary.json").read_text())["weights"] == str(first.folder)
    longer = run_small("name=cut", *options[1:], "epochs=3", "resume=extend")  # without weights=
    assert longer.last["counters"]["step"] == 30
    assert longer.last["identity"]["weights"] == str(first.folder)
    assert OmegaConf.load(cut.folder / "config.yaml").weights == str(first.folder)
    assert run_small("name=cut", *options, "epochs=3").status == 0
    with pytest.raises(CheckpointError, match=r"another run \(weights: .*first → other\)"):
        run_small("name=cut", *options[1:], "epochs=3", "weights=other")
    with pytest.raises(CheckpointError, match="weights=.*: no file .*first; valid: a run folder"):
        run_small("name=cut", *options, "resume=never")
    assert run_small("name=cut", *options, "epochs=3").rows == longer.rows  # it was not cleared


def test_the_first_step_starts_from_the_weights(run_small):
    first = run_small("name=first", STEPS)
    again = run_small(
        "name=again", f"weights={first.folder}", "max_steps=1", "optim.lr=1e-9", "seed=3"
    )
    for key, value in first.last["model"].items():
        assert torch.allclose(value, again.last["model"][key], atol=1e-6), key


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema"])
def test_files_of_other_programs_are_read(tmp_path, wrapper):
    tensors = {f"module.{key}": value for key, value in tensors_of("ln").items()}
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / "w.pt")
    weights = read_weights(str(tmp_path / "w.pt"), Settings(), 10, 1)
    assert set(weights.tensors) == set(tensors_of("ln"))


def tensors_of(norm: str) -> dict[str, torch.Tensor]:
    return create_model("resnet20v2", norm, 10, depth=8, width=8, in_chans=1).state_dict()


def test_safetensors_and_exported_folders_are_read(tmp_path):
    save_file(tensors_of("ln"), tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert (
            read_weights(str(source), Settings(), 10, 1).tensors.keys() == tensors_of("ln").keys()
        )


def test_an_export_says_what_its_classifier_and_norms_are(run_small, tmp_path):
    folder = run_small(STEPS, "norm=gn", "norm.eps=1e-3", "name=exported").folder
    export_run(folder, tmp_path / "export")
    weights = read_weights(str(tmp_path / "export"), Settings(), 10, 1)
    assert weights.classes == restore(folder / "checkpoints/last.pt").inputs["classes"]
    assert (weights.norm, weights.eps) == ("gn", 1e-3)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no weights", "is not a readable checkpoint"),
        (Evil(), "save model.state_dict"),
        ([1, 2], "holds no weights by name"),
    ],
)
def test_a_file_without_weights_is_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=words) as error:
        read_weights(str(path), Settings(), 10, 1)
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_published_weights_while_offline_are_one_line_at_once(monkeypatch, tmp_path):
    def refused(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(finetune.socket, "create_connection", refused)
    monkeypatch.setattr(finetune, "getproxies", dict)
    monkeypatch.setattr(finetune.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(finetune.hub, "HF_HUB_CACHE", str(tmp_path))
    settings = Settings(model={"name": "resnet50"}, weights="timm")
    with pytest.raises(ConfigError, match="weights=timm: cannot fetch the weights of resnet50"):
        read_weights("timm", settings, 10, 3)
    with pytest.raises(ConfigError, match="^weights=timm: .*are published; train it$"):
        read_weights("timm", Settings(model={"name": "efficientnet_b0_g16"}), 10, 3)


def test_published_weights_are_carried_with_their_eps(monkeypatch, tmp_path, capsys):
    """timm's EfficientNet has another ε than ours, which the checkpoint records."""
    import timm

    original = timm.create_model

    def create(name, pretrained=False, **options):
        model = original(name, **options)
        model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": 1000}
        return model

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(finetune, "set_offline_if_unreachable", lambda: None)
    folder = run_other(tmp_path, "model=efficientnet_b0", "norm=bn", "weights=timm")
    assert checkpoint.load(folder / "checkpoints/last.pt")["start"]["eps"] == 1e-5
    assert "new classifier for 10 classes" in capsys.readouterr().out
    monkeypatch.setattr(timm, "create_model", original)
    assert restore(folder / "checkpoints/last.pt").model.bn1.eps == 1e-5


@pytest.mark.parametrize("norm", ["bn", "ln_pn", "gn_ws", "bn_pn"])
def test_frozen_parts_keep_weights_and_statistics(run_small, norm):
    options = (f"norm={norm}", "regularization.ema_decay=0.9", "regularization.dropout=0.1")
    start = run_small("name=start", *options, "max_steps=1", "optim.lr=1e-9").last["model"]
    frozen = ("stem", "stages.0", "stages.1.0*")
    run = run_small("name=a", *options, f"freeze=[{','.join(frozen)}]", "max_steps=4")
    end = run.last["model"]
    for key in end:
        same = torch.allclose(start[key], end[key], atol=1e-6)
        if "num_batches" not in key and "running" not in key:
            assert same == key.startswith((*frozen[:2], "stages.1.0")), key
    if norm.startswith("bn"):
        assert torch.equal(end["stages.0.0.norm1.running_mean"], torch.zeros(8))
        assert not torch.equal(end["norm.running_mean"], torch.zeros(32))


def test_the_body_is_all_but_the_classifier():
    model = create_model("resnet20v2", "bn", 10, depth=8, width=8)
    frozen = freeze_parts(model, ["body"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["fc.weight", "fc.bias"] and model.norm in frozen
    timm_model = create_model("resnet50v2", "bn", 10)
    freeze_parts(timm_model, ["body"])
    trainable = [name for name, p in timm_model.named_parameters() if p.requires_grad]
    assert trainable == ["head.fc.weight", "head.fc.bias"]


def test_wrong_patterns_are_one_line():
    model = create_model("resnet20v2", "bn", 10, depth=8, width=8)
    with pytest.raises(ConfigError, match="freeze: nothing is called layer1; the parts: stem, st"):
        freeze_parts(model, ["layer1"])
    with pytest.raises(ConfigError, match=r"freeze=\[\*\]: nothing is left to train"):
        freeze_parts(model, ["*"])
    with pytest.raises(ConfigError, match="optim.lr_scale: nothing is called head"):
        scale_rates(model, parameter_groups(model, 0.1), OptimSettings(lr_scale={"head": 2}))


def test_rates_are_scaled_by_part(run_small):
    options = ("schedule=constant", "schedule.warmup_epochs=0", "optim.lr=0.1", STEPS)
    run = run_small("optim.lr_scale={fc:10,stages*:0.5,stages.0:0.5}", *options)
    assert [row["lr"] for row in run.rows if row["event"] == "train"] == [0.1, 0.1]
    groups = run.last["optimizer"]["param_groups"]
    assert {round(group["lr"], 6) for group in groups} == {0.1, 1.0, 0.05, 0.025}


def test_layer_decay_lowers_the_rates_towards_the_stem():
    model = create_model("resnet50", "bn", 10)
    groups = scale_rates(model, parameter_groups(model, 0.1), OptimSettings(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.fc.weight)] == 1
    assert scale[id(model.conv1.weight)] == min(scale.values()) < 1e-4
    own = create_model("resnet20v2", "ln_pn", 10)
    layers = layers_of(own)
    assert layers["stem.weight"] == 0 and layers["fc.bias"] == max(layers.values()) > 5
    assert list(layers.values()) == sorted(layers.values())


def test_a_recipe_without_scales_keeps_its_two_groups():
    """Older checkpoints have two groups without lr_scale."""
    model = create_model("resnet20v2", "bn", 10, depth=8, width=8)
    groups = parameter_groups(model, 0.1)
    assert scale_rates(model, groups, OptimSettings()) is groups


def test_classifiers_are_found():
    assert classifier_names(create_model("resnet20v2", "bn", 3)) == {"fc"}
    assert classifier_names(create_model("efficientnet_b0", "bn", 3)) == {"classifier"}


def run_other(folder, *overrides: str):
    """Train a model of its own for a step; return its run folder."""
    small = ("data.limit=8", "data.holdout=8", "batch=4", "max_steps=1", "logger=none", "name=a")
    config = compose_config([*small, f"runs_dir={folder}", *overrides])
    assert train(settings_from(config), OmegaConf.to_container(config, resolve=True)) == 0
    return folder / "a"


def test_timms_arguments_that_load_weights_act_as_weights(tmp_path):
    """model.checkpoint_path of older commands acts as weights=, and is not needed again."""
    path = tmp_path / "w.pt"
    torch.save(create_model("timm/resnet10t", "bn", 10, in_chans=1).state_dict(), path)
    options = ("model=timm", "model.name=resnet10t", "norm=bn", f"+model.checkpoint_path={path}")
    folder = run_other(tmp_path, *options)
    last = folder / "checkpoints/last.pt"
    assert checkpoint.load(last)["start"]["weights"] == str(path)
    path.unlink()
    assert run_other(tmp_path, *options) == folder
    assert restore(last).model
