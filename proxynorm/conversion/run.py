"""Run copies of a network on example inputs, without side effects on it or random state."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from proxynorm.conversion.kinds import kind_of
from proxynorm.nn.freeze import deep_copy

Forward = Callable[[nn.Module], object]  # calls a network on example inputs
# Sides of the images that are tried: 64 is fast, 224 and 299 are ImageNet's, 32 is CIFAR's.
_SIZES = (64, 224, 299, 32, 128, 256)


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch, including CUDA's, on exit."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    # tensors created here need values, even if the default device is meta
    with torch.device("cpu"), torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def copy_to_run(model: nn.Module) -> nn.Module:
    """A deep copy of the network with its shared activations separated.

    For a network on the meta device, which has no values, the copy has random values on the CPU.
    """
    copied = deep_copy(model)
    if any(parameter.is_meta for parameter in copied.parameters()):
        copied.to_empty(device="cpu")
        for tensor in (*copied.parameters(), *copied.buffers()):
            # Each row of a weight sums to about 1, so a deep network's values neither overflow nor
            # vanish. All values are positive, as running variances must be.
            values = (1 + torch.rand(tensor.shape)) / 1.5
            values /= max(tensor[:1].numel(), 1) if tensor.ndim > 1 else 1
            tensor.data = values.to(tensor.dtype)
    separate_shared_activations(copied)
    return copied


def separate_shared_activations(model: nn.Module) -> None:
    """Copy shared activations without parameters, so that each attribute holds its own module.

    Each can then be replaced without affecting the others.
    """
    found = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children omits duplicates
            if child is None or kind_of(child) != "activation" or [*child.parameters()]:
                continue
            if child in found:
                setattr(parent, name, copy.deepcopy(child))
            found.add(child)


def run(model: nn.Module, forward: Forward, training: bool, seed: int = 0) -> object:
    """The network's output in one mode, with seeded generators, and with gradients in training."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    model.train(training)
    with torch.set_grad_enabled(training):
        return forward(model)


def forwards_of(model: nn.Module, example_inputs: object) -> Iterator[Forward]:
    """Ways to call the network: on the given inputs, or on images of several sizes, in order."""
    if callable(example_inputs) and not isinstance(example_inputs, Tensor):
        yield example_inputs
        return
    for inputs in _guessed(model) if example_inputs is None else [example_inputs]:
        yield partial(_call_with, inputs)


def _call_with(inputs: object, model: nn.Module) -> object:
    """Call a network with a copy of the inputs: a tuple's one by one, a dict's by keyword."""
    fresh = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    if isinstance(fresh, tuple):
        return model(*fresh)
    return model(**fresh) if isinstance(fresh, dict) else model(fresh)


def first_tensor(model: nn.Module) -> Tensor:
    """A floating-point tensor with the network's device and dtype: its first, if it has any."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def _guessed(model: nn.Module) -> Iterator[Tensor]:
    """Batches of two random maps of the usual sizes, with the channels of the first convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    like = first_tensor(model)
    shape = (2, 3) if first is None else (2, first.in_channels)
    dims = 2 if first is None else len(first.kernel_size)
    config = getattr(model, "pretrained_cfg", None) or {}
    own = config.get("input_size", ())[-1:] if hasattr(config, "get") else ()
    for size in dict.fromkeys((_SIZES[0], *own, *_SIZES[1:])):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(*shape, *[size] * dims, generator=generator)
        # the copy of a network on the meta device is on the CPU
        yield images.to("cpu" if like.is_meta else like.device, like.dtype)
