"""Compare a converted copy with the original before the original is changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from torch import Tensor, nn

from proxynorm.conversion.dependence import tensors_in
from proxynorm.conversion.kinds import is_norm
from proxynorm.conversion.run import Run, copy_to_run, run, same

_TOLERANCE = 1e-3  # of per-sample invariance, as a fraction of the output's scale
Surgery = Callable[[nn.Module], None]


class StandIn(nn.Sequential):
    """The original norm, and what followed it, in the place of a NormAct2d."""


def check_same(model: nn.Module, call: Run, surgery: Surgery) -> None:
    """Raise ValueError, naming the first module that differs, unless surgery with stand-ins changes
    no output.

    Outputs must be the same bits, in training and, after that, in evaluation. Where two runs of the
    original differ (on GPUs they may) the comparison is to rounding.
    """
    outputs = _outputs(model, call)
    changed = _outputs(model, call, surgery)
    if _all_same(outputs, changed):
        return
    again = _outputs(model, call)
    if not _all_same(outputs, again) and _all_same(outputs, changed, 1e-4):
        return
    raise ValueError(
        f"cannot convert this {type(model).__name__}: with its activations joined to its norms it "
        f"computes something else, first in {_first_difference(model, call, surgery)}. Leave the "
        "norms around it as they are with keep=[...]. The network is left as it was"
    )


def check_per_sample(model: nn.Module, call: Run, surgery: Surgery) -> None:
    """Raise ValueError if a converted copy, in training, fails, or mixes images that the original
    does not mix in evaluation.

    Networks that take no single tensor, that draw random numbers in training, or that keep a batch
    norm tell nothing.
    """
    copied = copy_to_run(model)
    surgery(copied)
    told = f"cannot convert this {type(model).__name__}: "
    try:
        first, second = (run(copy_to_run(copied), call, True, seed) for seed in (0, 1))
    except Exception as error:
        if isinstance(_outputs(model, call)[0], str):  # so does the original, without its targets
            return
        raise ValueError(
            f"{told}converted, it fails in training: {error}. The network is left as it was"
        ) from error
    keeps_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in copied.modules())
    if keeps_batch_norm or not same(first, second):
        return
    if _is_per_sample(copied, call, True) is False and _is_per_sample(model, call, False):
        raise ValueError(
            f"{told}in training, with a norm that does not depend on the batch, its output for an "
            "image still depends on the others. The network is left as it was"
        )


def _is_per_sample(model: nn.Module, call: Run, training: bool) -> bool | None:
    """Return whether the first image alone gives its output in the batch; None if untold."""
    batches: list[Tensor] = []

    def alone(copied: nn.Module) -> object:
        def slice_images(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            batches.append(args[0])
            return (args[0][:1],)

        copied.register_forward_pre_hook(slice_images)
        return call(copied)

    try:
        whole, single = (run(copy_to_run(model), each, training) for each in (call, alone))
    except Exception:  # the network takes no such batch
        return None
    wholes = tensors_in(whole)
    if any(t.ndim == 0 or len(t) != len(batches[0]) for t in wholes):
        return None
    return same([t[:1] for t in wholes], tensors_in(single), _TOLERANCE)


def _outputs(model: nn.Module, call: Run, surgery: Surgery | None = None) -> list[object]:
    """A copy's outputs in training and in evaluation, each an error's text where it fails."""
    copied = copy_to_run(model)
    if surgery is not None:
        surgery(copied)
    outputs: list[object] = []
    for training in (True, False):
        try:
            outputs.append(run(copied, call, training))
        except Exception as error:
            outputs.append(str(error))
    return outputs


def _all_same(first: list[object], second: list[object], tolerance: float = 0.0) -> bool:
    pairs = list(zip(first, second))
    return all(isinstance(a, str) == isinstance(b, str) and same(a, b, tolerance) for a, b in pairs)


def _first_difference(model: nn.Module, call: Run, surgery: Surgery) -> str:
    """Name of the first module, in the order in which they end, whose output differs."""
    for training in (True, False):
        records = [_record(model, call, training, s) for s in (None, surgery)]
        for name, output in records[0].items():
            if name in records[1] and not same(output, records[1][name]):
                return f"{name or 'the model itself'} ({type(model.get_submodule(name)).__name__})"
    return "the model itself"


def _record(
    model: nn.Module, call: Run, training: bool, surgery: Surgery | None
) -> dict[str, list[Tensor]]:
    """The outputs of all modules that are neither norms nor parts of what replaced one."""
    copied = copy_to_run(model)
    outputs: dict[str, list[Tensor]] = {}
    if surgery is not None:
        surgery(copied)
    stand_ins = [m for m in copied.modules() if isinstance(m, StandIn)]
    replaced = {part for stand_in in stand_ins for part in stand_in.modules()}
    for name, module in copied.named_modules():
        if module not in replaced and not is_norm(module) and not isinstance(module, nn.Identity):
            module.register_forward_hook(
                lambda m, args, output, name=name: outputs.setdefault(
                    name, [t.clone() for t in tensors_in(output)]
                )
            )
    with suppress(Exception):  # the records up to here tell
        run(copied, call, training)
    return outputs
