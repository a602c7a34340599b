"""The power decomposition: its formula, side effects, files and warning."""

import csv
import json
import xml.dom.minidom

import matplotlib.image
import pytest
import torch
from torch import nn

from proxynorm import NormAct2d, create_model, power_decomposition
from proxynorm.analysis.power import PowerRow
from proxynorm.analysis.power_monitor import (
    collapse_warning,
    from_metrics,
    mean_rows,
    measure,
    to_metrics,
    write_csv,
)
from proxynorm.analysis.power_plots import p1_figure, power_figure
from proxynorm.analysis.random_net import mean_field_p1, random_net
from proxynorm.analysis.style import norm_label, norm_style, save_figure
from proxynorm.data import DataSpec, LoaderSpec, open_data
from tests.data.conftest import needs_fashion_mnist
from tests.helpers import ROOT


def images(count=12, seed=0, size=32):
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def tiny_model(norm="ln"):
    torch.manual_seed(0)
    return create_model("resnet20v2", norm, 10, depth=8, width=4, in_chans=1)


def by_definition(y):
    """P1 … P4 of y, (N, C, H, W), as defined in proxynorm.analysis.power."""
    mean, std = y.double().mean((2, 3)), y.double().std((2, 3), correction=0)
    return [
        mean.mean(0).square().mean(),
        mean.var(0, correction=0).mean(),
        std.mean(0).square().mean(),
        std.var(0, correction=0).mean(),
    ]


@pytest.mark.parametrize("norm", ["ln", "gn", "in", "bn", "ln_pn"])
def test_the_terms_are_those_of_the_definition(norm):
    layer, x = NormAct2d(8, norm), torch.randn(10, 8, 5, 5) * 2 + torch.randn(8, 1, 1)
    wanted = by_definition(layer.normalize(x))
    (row,) = power_decomposition(nn.Sequential(layer), [x])
    assert (row.p1, row.p2, row.p3, row.p4) == pytest.approx(
        [term.item() for term in wanted], abs=1e-6
    )
    assert sum(wanted).item() == pytest.approx(1, abs=1e-3)


def test_streaming_over_batches_equals_one_batch():
    model = tiny_model()
    whole, parts = (
        power_decomposition(model, [images()]),
        power_decomposition(model, images().split(5)),
    )
    for one, other in zip(whole, parts, strict=True):
        assert (one.p1, one.p2, one.p3, one.p4) == pytest.approx(
            (other.p1, other.p2, other.p3, other.p4), abs=1e-6
        )


def test_rows_follow_the_forward_pass_and_name_the_norms():
    model = tiny_model()
    rows = power_decomposition(model, [images()])
    assert (
        [row.depth for row in rows] == list(range(1, 8))
        and rows[0].name == "stages.0.0.norm1"
        and rows[-1].name == "norm"
    )
    assert {row.name for row in rows} == {
        name for name, module in model.named_modules() if isinstance(module, NormAct2d)
    }


def test_tuples_that_begin_with_images_are_batches_too():
    model = tiny_model()
    assert power_decomposition(model, [(images(), torch.zeros(12))]) == power_decomposition(
        model, [images()]
    )


@pytest.mark.parametrize("norm", ["bn", "bn_pn", "ln_pn"])
def test_the_model_is_left_as_it_was(norm):
    model = tiny_model(norm).train()
    model.stages[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, hooks = (
        [module.training for module in model.modules()],
        [len(m._forward_pre_hooks) for m in model.modules()],
    )
    power_decomposition(model, [images()])
    assert modes == [module.training for module in model.modules()] and hooks == [
        len(m._forward_pre_hooks) for m in model.modules()
    ]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_model_is_left_as_it_was_after_an_error_too():
    model = tiny_model("bn").train()
    with pytest.raises(RuntimeError):
        power_decomposition(model, [torch.randn(2, 3, 32, 32)])
    assert (
        model.training and model.norm.running_mean is not None and not model.norm._forward_pre_hooks
    )


def test_a_compiled_model_is_measured_eagerly():
    model = tiny_model()
    eager = power_decomposition(model, [images(2)])
    model.compile()
    assert power_decomposition(model, [images(2)]) == eager


def test_wrong_calls_are_errors():
    with pytest.raises(ValueError, match="no NormAct2d"):
        power_decomposition(nn.Sequential(nn.Conv2d(1, 1, 1)), [images()])
    with pytest.raises(ValueError, match="no images"):
        power_decomposition(tiny_model(), [])


def test_mean_field_has_the_known_values():
    """The mean-field recursion for Layer Norm, by its first values."""
    known = {1: 0.337, 2: 0.520, 3: 0.634, 5: 0.767, 10: 0.898, 20: 0.967, 30: 0.986, 50: 0.996}
    found = mean_field_p1(50)
    assert [found[k - 1] for k in known] == pytest.approx(list(known.values()), abs=1e-3)
    assert mean_field_p1(3, 0.0, 0.0)[:3] == pytest.approx([1 / torch.pi, 0.494, 0.605], abs=1e-3)


def test_random_nets_are_functions_of_their_seed():
    first, same, other = (
        random_net("ln", 8, 2, seed=seed)(images(2, size=4).expand(-1, 3, -1, -1))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert random_net("ln", 8, 2)[0].padding_mode == "circular"


def test_metrics_and_csv_keep_the_rows(tmp_path):
    rows = [PowerRow("a.norm1", 1, 0.1, 0.2, 0.3, 0.4), PowerRow("norm", 2, 0.4, 0.3, 0.2, 0.1)]
    assert from_metrics({"event": "power", "step": 3, **to_metrics(rows)}) == rows
    assert mean_rows([rows, rows]) == rows
    write_csv(tmp_path / "power.csv", {"ln": rows}, "norm")
    found = list(csv.DictReader(open(tmp_path / "power.csv")))
    assert found[1] == {
        "norm": "ln",
        "name": "norm",
        "depth": "2",
        "p1": "0.400000",
        "p2": "0.300000",
        "p3": "0.200000",
        "p4": "0.100000",
    }


def test_figures_are_the_same_bytes_again(tmp_path):
    rows = [PowerRow("a", depth, 0.1 * depth, 0.1, 0.5, 0.2) for depth in (1, 2, 3)]
    for name in ("one", "two"):
        figure = power_figure({"ln": rows, "bn": rows}, {"ln": [0.1, 0.2, 0.3]})
        save_figure(figure, tmp_path / f"{name}.png", ["pdf"])
        nets = {"ln": [rows, rows], "ln_pn": [rows, rows]}
        field = {"ln": [0.1, 0.2, 0.3]}
        save_figure(p1_figure({"P1": nets}, mean_field=field), tmp_path / f"{name}.svg")
    for suffix in ("png", "pdf", "svg"):
        one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
    assert xml.dom.minidom.parseString(one).documentElement.tagName == "svg"


def test_a_norm_and_its_proxy_normalized_version_share_a_colour():
    plain, proxied, other = norm_style("ln"), norm_style("ln_pn"), norm_style("bn_pn")
    assert plain["color"] == proxied["color"] != other["color"]
    assert (plain["linestyle"], proxied["linestyle"]) == ("--", "-")
    assert [norm_label(norm) for norm in ("ln_pn", "gn_ws", "bn")] == ["LN+PN", "GN+WS", "BN"]
    assert norm_label("ln_pn-depth44") == "LN+PN, depth44"
    assert norm_label("my-run_pn") == "my-run_pn" and norm_style("my-run_pn") == {}


@pytest.mark.parametrize("panels", [4, 5])
def test_unused_panels_stay_empty(tmp_path, panels):
    rows = [PowerRow("a", depth, 0.1 * depth, 0.1, 0.5, 0.2) for depth in (1, 2, 3)]
    figure = power_figure({f"epoch {number}": rows for number in range(panels)})
    save_figure(figure, tmp_path / "power.png")
    picture = matplotlib.image.imread(tmp_path / "power.png")[..., :3]
    height, width, _ = picture.shape
    lower = picture[height // 2 : int(0.85 * height)]
    assert (lower[:, width * 3 // 4 :] == 1).all() and not (lower[:, : width // 4] == 1).all()


def test_collapse_gives_a_warning():
    rows = [PowerRow("a", 1, 0.2, 0, 0.8, 0), PowerRow("b", 2, 0.95, 0, 0.05, 0)]
    assert collapse_warning(rows, 0.96) is None
    assert "worst b (depth 2) with 0.950" in collapse_warning(rows, 0.9)


def test_the_monitor_measures_images_from_all_over_the_evaluation_set(monkeypatch):
    data = open_data(DataSpec(name="fashion_mnist"), LoaderSpec("torchvision", 0))
    seen = []
    monkeypatch.setattr(
        data,
        "prepare",
        lambda batch, *rest, _prepare=data.prepare: seen.append(batch) or _prepare(batch, *rest),
    )
    rows = measure(tiny_model(), data, images=20, batch=8)
    assert len(rows) == 7 and sum(int(batch.valid.sum()) for batch in seen) == 20
    indices = torch.cat([batch.indices[batch.valid] for batch in seen])
    assert indices.max() - indices.min() > 9000


@pytest.fixture
def script():
    """The command `proxynorm power`."""
    from proxynorm.commands import power

    return power


def test_the_command_writes_csv_plot_and_summary(tmp_path, script):
    options = script.Options(
        str(tmp_path), norms=["ln", "ln_pn"], width=16, depth=3, images=4, nets=2
    )
    assert script.main(options) is None
    written = {path.name for path in tmp_path.iterdir()}
    figures = {f"{name}.{kind}" for name in ("p1", "power") for kind in ("png", "pdf", "svg")}
    assert written == {"power.csv", "summary.json"} | figures
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["largest_distance_of_ln_from_mean_field"]["each net"]) == 2


def test_the_command_shows_the_logged_powers_of_a_run(tmp_path, script):
    rows = [PowerRow("a.norm1", 1, 0.1, 0.2, 0.3, 0.4), PowerRow("norm", 2, 0.4, 0.3, 0.2, 0.1)]
    lines = [
        {"event": "power", "step": step, "epoch": step / 4, **to_metrics(rows)} for step in (0, 4)
    ]
    (tmp_path / "config.yaml").write_text("norm: {name: ln_pn}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert script.main(script.Options(str(tmp_path / "power"), run=str(tmp_path))) is None
    found = list(csv.DictReader(open(tmp_path / "power" / "power.csv")))
    assert [row["step"] for row in found] == ["epoch 0", "epoch 0", "epoch 1", "epoch 1"]


@needs_fashion_mnist
def test_the_command_decomposes_a_checkpoint(tmp_path, script):
    run = str(ROOT / "tests" / "fixtures" / "run_v1")
    options = script.Options(str(tmp_path), run=run, weights="last", images=4, device="cpu")
    assert script.main(options) is None
    found = list(csv.DictReader(open(tmp_path / "power.csv")))
    assert len(found) == 7 and {row["step"] for row in found} == {"last"}
