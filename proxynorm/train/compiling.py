"""How a network is computed: torch's switches, and torch.compile with eager execution behind it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from proxynorm.cli import first_line
from proxynorm.nn import inductor_options, recompute
from proxynorm.train.settings import Settings


def compile_mode(
    settings: Settings, device: torch.device, accumulation: int
) -> tuple[str | None, str | None]:
    """Return torch.compile's mode, None to run eagerly, and a line where it is not what was asked.

    compile=auto compiles on CUDA, where it saves passes over feature maps.
    """
    on_gpu, mode = device.type == "cuda", settings.compile_mode
    if not (on_gpu if settings.compile == "auto" else settings.compile):
        return None, None
    if settings.recompute:
        return None, "recompute=true: the network runs eagerly, not compiled"
    if mode == "reduce-overhead" and (accumulation > 1 or not fixed_shapes(settings)):
        # A CUDA graph replays on fixed addresses: no second forward before the update, one shape.
        why = "needs a single micro-batch per update and images of one size; default is used"
        return "default", f"compile_mode=reduce-overhead {why}"
    return mode, None


def set_switches(settings: Settings, device: torch.device) -> None:
    """Choose CUDA's kernels: the fastest, or those that give the same bits each time."""
    if device.type != "cuda":
        return  # a CPU sums in one order
    same_bits = settings.deterministic
    torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    torch.backends.cudnn.allow_tf32 = True
    # Trying all kernels pays where the shapes come again; each new one costs a second.
    torch.backends.cudnn.benchmark = fixed_shapes(settings) and not same_bits
    if same_bits:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS's first call
        torch.utils.deterministic.fill_uninitialized_memory = False
        # torch names each operation that has no such kernel, in a warning.
        torch.use_deterministic_algorithms(True, warn_only=True)


def fixed_shapes(settings: Settings) -> bool:
    """Return whether all training batches have one shape: no growing images, none left out."""
    return settings.data.ramp is None and settings.data.on_bad == "raise"


def choose_execution(
    model: nn.Module,
    settings: Settings,
    device: torch.device,
    accumulation: int,
    say: Callable[[str], None],
) -> None:
    """Let `model` compute with recomputation or compiled, in place; say what is not as asked."""
    mode, notice = compile_mode(settings, device, accumulation)
    if notice:
        say(notice)
    if settings.recompute:
        recompute(model)
    if mode is not None:
        compile_network(model, mode, fixed_shapes(settings), say)


def compile_network(model: nn.Module, mode: str, fixed: bool, say: Callable[[str], None]) -> None:
    """Compile `model` in place; if inductor fails, say why in one line and run eagerly.

    fixed: compile each shape by itself, faster kernels than one for all shapes.
    """
    options = {**inductor_options(), **torch._inductor.list_mode_options(mode)}

    def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        try:
            return torch._inductor.compile(graph, inputs, options)
        except Exception as error:
            if model._compiled_call_impl is not None:
                say(f"torch.compile failed, the run goes on eagerly: {first_line(error)}")
            model._compiled_call_impl = None  # this call ends in the graph as it was captured
            return graph

    # The backward pass, too, is compiled before anything runs, so that its failure is seen here.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    model.compile(backend=inductor_or_eager, dynamic=False if fixed else None)
