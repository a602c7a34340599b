"""Compare a converted copy with the original before the original is changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from torch import Tensor, allclose, nn

from proxynorm.conversion.kinds import is_norm, tensors_in
from proxynorm.conversion.run import Forward, copy_to_run, run

_TOLERANCE = 1e-3  # for per-sample invariance, relative to the maximum of the output
Surgery = Callable[[nn.Module], None]
# Outputs by mode and module name; "" is the network itself.
_Outputs = dict[tuple[str, str], list[Tensor]]


class StandIn(nn.Sequential):
    """The original norm and the modules that followed it, in the place of a NormAct2d."""


def check_same(model: nn.Module, forward: Forward, surgery: Surgery, advice: str) -> None:
    """Raise ValueError if surgery with stand-ins changes an output; name the first such module.

    Outputs must be bit-identical in training, and then in evaluation. If two runs of the original
    differ (as they may on GPUs), outputs are compared up to rounding. advice: a sentence about what
    to do, without its full stop.
    """
    outputs, changed = _record(model, forward), _record(model, forward, surgery)
    if not all(outputs.values()):
        raise ValueError(
            f"cannot convert this {type(model).__name__}: no tensors are found in its output, so "
            "that it cannot be compared: pass example_inputs= a function that calls the model and "
            "returns the tensors of its output"
        )
    if _first_difference(outputs, changed) is None:
        return
    is_noisy = _first_difference(outputs, _record(model, forward)) is not None
    if is_noisy and _first_difference(outputs, changed, 1e-4) is None:
        return
    ours, theirs = (_record(model, forward, s, every_module=True) for s in (None, surgery))
    mode, name = _first_difference(ours, theirs) or ("training", "")
    where = f"{name or 'the model itself'} ({type(model.get_submodule(name)).__name__})"
    raise ValueError(
        f"cannot convert this {type(model).__name__}: with its activations joined to its norms it "
        f"computes something else, first in {where} in {mode}. {advice}. The network is left as it "
        "was"
    )


def check_per_sample(model: nn.Module, forward: Forward, surgery: Surgery) -> None:
    """Raise ValueError if a converted copy fails in training, or mixes images.

    It mixes images if, in training, its output for one image depends on the others, but in
    evaluation the original's does not. This is not checked for networks that take anything other
    than a tensor, draw random numbers in training, or keep a batch norm.
    """
    copied = copy_to_run(model)
    surgery(copied)
    prefix = f"cannot convert this {type(model).__name__}: "
    try:
        first, second = (run(copy_to_run(copied), forward, True, seed) for seed in (0, 1))
    except Exception as error:
        raise ValueError(
            f"{prefix}converted, it fails in training: {error}. The network is left as it was"
        ) from error
    keeps_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in copied.modules())
    if keeps_batch_norm or not _same(tensors_in(first), tensors_in(second)):
        return
    if _mixes_images(copied, forward, True) and not _mixes_images(model, forward, False):
        raise ValueError(
            f"{prefix}in training, with a norm that does not depend on the batch, its output for "
            "an image still depends on the others. Pass verify=False to convert it nevertheless. "
            "The network is left as it was"
        )


def _mixes_images(model: nn.Module, forward: Forward, training: bool) -> bool:
    """True if the first image alone gives another output; False if this cannot be tested."""
    batches: list[Tensor] = []

    def slice_images(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        batches.append(args[0])
        return (args[0][:1],)

    whole, alone = copy_to_run(model), copy_to_run(model)
    alone.register_forward_pre_hook(slice_images)
    try:
        outputs, single = (tensors_in(run(net, forward, training)) for net in (whole, alone))
    except Exception:  # the network does not take such a batch
        return False
    if any(t.ndim == 0 or len(t) != len(batches[0]) for t in outputs):
        return False
    return not _same([t[:1] for t in outputs], single, _TOLERANCE)


def _record(
    model: nn.Module, forward: Forward, surgery: Surgery | None = None, every_module: bool = False
) -> _Outputs:
    """The outputs of a copy in both modes.

    With every_module, they include those of all modules except norms and their stand-ins. If the
    network fails in a mode, its own output is missing.
    """
    copied = copy_to_run(model)
    if surgery is not None:
        surgery(copied)
    outputs: _Outputs = {}
    mode = "training"

    def note(name: str, module: nn.Module, args: object, output: object) -> None:
        outputs.setdefault((mode, name), [t.clone() for t in tensors_in(output)])

    replaced = {part for m in copied.modules() if isinstance(m, StandIn) for part in m.modules()}
    for name, module in copied.named_modules() if every_module else ():
        if module not in replaced and not is_norm(module) and not isinstance(module, nn.Identity):
            module.register_forward_hook(partial(note, name))
    for mode in ("training", "evaluation"):
        with suppress(Exception):
            outputs[mode, ""] = tensors_in(run(copied, forward, mode == "training"))
    return outputs


def _first_difference(
    ours: _Outputs, theirs: _Outputs, tolerance: float = 0.0
) -> tuple[str, str] | None:
    """Mode and name of the first module to finish whose output differs; None if there is none.

    A module that ran in only one of the networks is ignored, unless it is the network itself.
    """
    for key, tensors in ours.items():
        if key in theirs and not _same(tensors, theirs[key], tolerance):
            return key
    return next((key for key in ours.keys() ^ theirs.keys() if not key[1]), None)


def _same(first: list[Tensor], second: list[Tensor], tolerance: float = 0.0) -> bool:
    """True if the tensors are equal, with a tolerance relative to each one's maximum."""
    if [(t.shape, t.dtype) for t in first] != [(t.shape, t.dtype) for t in second]:
        return False
    for a, b in zip(first, second):
        has_scale = a.is_floating_point() and a.numel() > 0
        scale = float(a.detach().nan_to_num().abs().max()) if has_scale else 0.0
        if not allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True):
            return False
    return True
