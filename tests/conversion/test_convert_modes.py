"""convert on forwards that depend on the mode, or that differ between calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from proxynorm import convert, freeze
from proxynorm.nn import NormAct2d
from tests.helpers import with_random_norms


class Scaled(nn.Module):
    """An activation whose slope its repr does not show."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * self.slope


class Net(nn.Module):
    """A network whose forward is given as a function."""

    def __init__(self, forward: Callable, **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.end, self.call = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            forward,
        )
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


class FrozenNorm(Net):
    """A batch norm that stays in evaluation, by a train() that returns nothing."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.bn.eval()


class Optional(nn.Module):
    """A functional activation in a forward with an option."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor, double: bool = False) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return 2 * x if double else x


class ByMode(nn.Module):
    """The calls behind the norm, and before it, depend on the mode."""

    def __init__(
        self, training: nn.Module, evaluation: nn.Module, aside: Callable | None = None
    ) -> None:
        super().__init__()
        self.conv, self.bn, self.aside = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), aside
        self.training_act, self.evaluation_act = training, evaluation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.training and self.aside is not None:
            self.seen = self.aside(x).mean()
        x = self.bn(x)
        x = (
            F.elu(x)
            if self.aside is F.elu
            else self.training_act(x)
            if self.training
            else self.evaluation_act(x)
        )
        return F.elu(2 * x)


@pytest.mark.parametrize(
    "model, parts",
    [
        (
            ByMode(nn.ReLU(), nn.SiLU()),
            ["bn (BatchNorm2d)", "training and evaluation, differ in the activation"],
        ),
        (
            ByMode(nn.ReLU(), nn.Identity()),
            ["bn (BatchNorm2d)", "in evaluation mode", "ELU behind mul"],
        ),
    ],
)
def test_activations_that_differ_by_mode_are_refused(model: nn.Module, parts: list[str]) -> None:
    expected = model.eval()(torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError) as caught:
        convert(model, "bn")
    assert all(part in str(caught.value) for part in parts)
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)), expected)


def behind(s: Net, x: torch.Tensor) -> torch.Tensor:
    return s.bn(s.conv(x))


def parts() -> dict[str, nn.Module]:
    return {
        "a": nn.SiLU(),
        "b": nn.SiLU(),
        "p": nn.PReLU(init=0.1),
        "q": nn.PReLU(init=0.7),
        "k": Scaled(1.0),
        "l": Scaled(3.0),
        "blur": nn.AvgPool2d(3, 1, 1),
        "block": Optional(),
    }


@pytest.mark.parametrize(
    "forward, reason",
    [
        (
            lambda s, x: s.end(s.p(behind(s, x)) if s.training else s.q(behind(s, x))),
            "cannot place bn .* training and evaluation, differ",
        ),
        (
            lambda s, x: s.q(s.bn(s.end(s.p(behind(s, x))))),
            "cannot place bn .*its calls, or .* differ in the activation",
        ),
        (
            lambda s, x: s.l(s.bn(s.end(s.k(behind(s, x))))),
            "computes something else, first in the model itself",
        ),
        (
            lambda s, x: s.end(s.a(s.blur(behind(s, x)) if s.training else behind(s, x))),
            "computes something else, first in .* in evaluation",
        ),
    ],
)
def test_what_only_one_mode_or_call_shows_is_refused(forward: Callable, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        convert(Net(forward, **parts()), "bn", keep=["block.bn"])


class ModuleOrFunction(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.a(behind(self, x)) if self.training else F.silu(behind(self, x)))


class OnceOrTwice(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.end(self.a(behind(self, x)))
        return y if self.training else self.a(self.end(self.a(behind(self, x))))


class AsideInTraining(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(self.bn(self.conv(x))) + (F.elu(self.conv(x)) if self.training else 0)


@pytest.mark.parametrize(
    "kind, forward, keep",
    [
        (
            Net,
            lambda s, x: s.end(s.a(behind(s, x)) if s.training else s.b(behind(s, x))),
            ["block.bn"],
        ),
        (ModuleOrFunction, None, ["block.bn"]),
        (OnceOrTwice, None, ["block.bn"]),
        (Net, lambda s, x: s.block(x) + s.block(x, True) + s.a(behind(s, x)), []),
        (Net, lambda s, x: s.block(x, s.training) + s.a(behind(s, x)), []),
        (AsideInTraining, None, ["block.bn"]),
    ],
)
def test_branches_by_mode_and_option_stay(
    kind: type[Net], forward: Callable | None, keep: list[str]
) -> None:
    torch.manual_seed(0)
    original = with_random_norms(kind(forward, **parts()))
    model, x = convert(copy.deepcopy(original), "bn", keep=keep), torch.randn(2, 3, 8, 8)
    assert isinstance(model.bn, NormAct2d) and model.bn.apply_act
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), original.train(training)(x))


def test_options_by_keyword_and_a_train_that_returns_nothing() -> None:
    torch.manual_seed(0)
    original = with_random_norms(
        FrozenNorm(
            lambda s, x: s.block(x, double=True) + s.a(behind(s, x)), a=nn.SiLU(), block=Optional()
        )
    )
    original.eval()
    model, x = convert(copy.deepcopy(original), "bn"), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), original(x))
    torch.testing.assert_close(freeze(model)(x), original(x))


def test_dropout_in_training_and_an_activation_aside_are_placed() -> None:
    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        self.seen = self.b(x).mean() if self.training else 0
        x = self.bn(x)
        return self.end(self.a(self.drop(x) if self.training else x))

    torch.manual_seed(0)
    original = with_random_norms(Net(forward, a=nn.SiLU(), b=nn.SiLU(), drop=nn.Dropout2d(0.5)))
    model, x = convert(copy.deepcopy(original), "bn"), torch.randn(2, 3, 8, 8)
    assert isinstance(model.bn.drop, nn.Dropout2d)
    for training in (True, False):
        results = []
        for each in (original, model):
            torch.manual_seed(1)
            each.train(training)
            results.append(each(x))
        torch.testing.assert_close(*results)


def test_converting_gives_no_warning():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(*layers), "gn_pn")
