"""Run copies of a network on example inputs, so that the network and all random generators stay as
they are.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_map

from proxynorm.conversion.kinds import is_activation

Run = Callable[[nn.Module], object]
_SIZES = (64, 224, 299, 32, 128, 256)


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's generators, CUDA's among them, as they were."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    # values are needed, whatever the caller's default device and whether it works on fake tensors
    with unset_fake_temporarily(), torch.device("cpu"), torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def copy_to_run(model: nn.Module) -> nn.Module:
    """A deep copy of the network, its shared activations separated.

    Tensors without values (meta, fake) get random ones on the CPU.

    Raises:
        ValueError: the network cannot be copied.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        own = (*vars(module).values(), *module._parameters.values(), *module._buffers.values())
        for tensor in (value for value in own if isinstance(value, Tensor)):
            if _has_no_values(tensor):
                values = _random(tensor.shape).to(tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(values) if is_parameter else values
            elif not tensor.is_leaf:  # deepcopy refuses these
                memo[id(tensor)] = tensor.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"cannot convert this {type(model).__name__}: convert tries its changes on a copy "
            f"first, and copy.deepcopy fails with {type(error).__name__}: {error}"
        ) from error
    separate_shared_activations(copied)
    return copied


def separate_shared_activations(model: nn.Module) -> None:
    """Give each attribute that holds a shared activation without parameters a copy of its own.

    The copies compute the same; each attribute can then be replaced without touching the others.
    """
    found = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves repetitions out
            if child is None or not is_activation(child) or any(True for _ in child.parameters()):
                continue
            if child in found:
                setattr(parent, name, copy.deepcopy(child))
            found.add(child)


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _random(shape: torch.Size) -> Tensor:
    """Return values with which a deep network neither overflows nor vanishes.

    All are positive, as running variances must be; a weight's row sums to about 1.
    """
    values = (1 + torch.rand(shape)) / 1.5
    return values / max(values[0].numel(), 1) if len(shape) > 1 and len(values) else values


def run(model: nn.Module, call: Run, training: bool, seed: int = 0) -> object:
    """The network's output in one mode, generators seeded, with gradients in training."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    model.train(training)
    with torch.set_grad_enabled(training):
        return call(model)


def runs_of(model: nn.Module, example_inputs: object) -> Iterator[Run]:
    """Ways to call the network: the given one, or guesses at its images in the order to try."""
    if callable(example_inputs) and not isinstance(example_inputs, Tensor):
        yield example_inputs
        return
    for inputs in _guessed(model) if example_inputs is None else [example_inputs]:
        yield partial(_call_with, inputs)


def _call_with(inputs: object, model: nn.Module) -> object:
    """Call a network with a fresh copy of the inputs: a tuple's one by one, a dict's by keyword."""
    fresh = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    if isinstance(fresh, tuple):
        return model(*fresh)
    return model(**fresh) if isinstance(fresh, dict) else model(fresh)


def _guessed(model: nn.Module) -> Iterator[Tensor]:
    """Two random maps each of the usual sizes, with the channels of the first convolution."""
    convs = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    first = next(convs, None)
    tensors = (*model.parameters(), *model.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    dims = 2 if first is None else first.weight.ndim - 2
    channels = 3 if first is None else first.in_channels
    config = getattr(model, "pretrained_cfg", None) or {}
    own = config.get("input_size", ())[-1:] if hasattr(config, "get") else ()
    for size in dict.fromkeys((_SIZES[0], *own, *_SIZES[1:])):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, channels, *[size] * dims, generator=generator)
        # copies of networks without values are on the CPU
        yield images.to("cpu" if _has_no_values(like) else like.device, like.dtype)
