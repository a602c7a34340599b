"""The network of a run, and how it is computed: precision, memory format, compilation."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

from proxynorm.cli import first_line
from proxynorm.data import DataInfo
from proxynorm.models import create_model
from proxynorm.nn import inductor_options, norm_spec, recompute
from proxynorm.train.finetune import LOADING
from proxynorm.train.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(settings: Settings, num_classes: int, channels: int) -> nn.Module:
    """Create the configured network, with random weights. Raises ConfigError."""
    arguments = {key: value for key, value in settings.model.items() if key not in LOADING}
    name, norm = arguments.pop("name"), asdict(settings.norm)
    if norm["eps"] is None and settings.model.get("pretrained") and "efficientnet" in name:
        norm["eps"] = 1e-5  # timm's, not the paper's: runs of version 0.1 do not record it
    return create_model(
        name,
        norm=norm.pop("name"),
        num_classes=num_classes,
        in_chans=channels,
        **norm,
        norm_batch=settings.norm_batch,
        drop_rate=settings.regularization.dropout,
        drop_path_rate=settings.regularization.stochastic_depth,
        **arguments,
    )


def seeded_model(settings: Settings, info: DataInfo) -> nn.Module:
    """Create the network with weights drawn from the run's seed."""
    torch.manual_seed(settings.seed)
    return build_model(settings, len(info.classes), info.channels)


def choose_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Return the compute precision; auto is fp32 on a CPU, bf16 on a GPU that has it, else fp16."""
    if settings.precision != "auto":
        return DTYPES[settings.precision]
    if device.type == "cpu":
        return torch.float32
    # Emulated bf16, as before Ampere, is slower than float32.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def choose_memory_format(settings: Settings, device: torch.device) -> torch.memory_format:
    """Return the memory format; auto is the faster one for the norm.

    The choice on CPUs is measured (scripts/benchmark.py step): oneDNN convolves in channels_last,
    but Instance Norm's sums over one channel's pixels then stride over memory. On GPUs, tensor
    cores convolve in channels_last, and our norms, unlike torch's group norm, keep it.
    """
    name = settings.memory_format
    if name == "auto":
        strides = device.type == "cpu" and norm_spec(settings.norm.name).kind == "in"
        name = "contiguous" if strides else "channels_last"
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def choose_kernels(settings: Settings, device: torch.device) -> None:
    """Choose CUDA's kernels: the fastest, or those that give the same bits each time."""
    if device.type != "cuda":
        return  # a CPU sums in one order
    same_bits = settings.deterministic
    torch.set_float32_matmul_precision("high")  # TF32, as in convolutions
    torch.backends.cudnn.allow_tf32 = True
    # Trying all kernels pays off if shapes recur; each new shape costs a second.
    torch.backends.cudnn.benchmark = fixed_shapes(settings) and not same_bits
    if same_bits:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS's first call
        torch.utils.deterministic.fill_uninitialized_memory = False
        # torch names each operation that has no such kernel, in a warning.
        torch.use_deterministic_algorithms(True, warn_only=True)


def fixed_shapes(settings: Settings) -> bool:
    """Return whether all training batches have one shape: images neither grow nor are left out."""
    return settings.data.ramp is None and settings.data.on_bad == "raise"


def compile_mode(
    settings: Settings, device: torch.device, accumulation: int
) -> tuple[str | None, str | None]:
    """Return torch.compile's mode (None: run eagerly), and a notice if it is not the one requested.

    compile=auto compiles on CUDA, where it saves passes over feature maps.
    """
    on_gpu, mode = device.type == "cuda", settings.compile_mode
    if not (on_gpu if settings.compile == "auto" else settings.compile):
        return None, None
    if settings.recompute:
        return None, "recompute=true: the network runs eagerly, not compiled"
    if mode == "reduce-overhead" and (accumulation > 1 or not fixed_shapes(settings)):
        # A CUDA graph replays on fixed addresses, so it needs one shape and no second forward
        # before the update.
        why = "needs a single micro-batch per update and images of one size; default is used"
        return "default", f"compile_mode=reduce-overhead {why}"
    return mode, None


def choose_execution(
    model: nn.Module,
    settings: Settings,
    device: torch.device,
    accumulation: int,
    say: Callable[[str], None],
) -> None:
    """Set up recomputation or compilation of `model`, in place.

    Prints a notice with `say` if that is not what the user asked for. If inductor fails, the run
    goes on eagerly.
    """
    mode, notice = compile_mode(settings, device, accumulation)
    if notice:
        say(notice)
    if settings.recompute:
        recompute(model)
    if mode is None:
        return
    options = {**inductor_options(), **torch._inductor.list_mode_options(mode)}

    def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        try:
            return torch._inductor.compile(graph, inputs, options)
        except Exception as error:
            if model._compiled_call_impl is not None:
                say(f"torch.compile failed, the run goes on eagerly: {first_line(error)}")
            model._compiled_call_impl = None  # later calls; this one runs the captured graph
            return graph

    # Compile the backward pass, too, before anything runs, so that its failure is caught here.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    # Kernels for one shape are faster than those for all shapes.
    model.compile(backend=inductor_or_eager, dynamic=False if fixed_shapes(settings) else None)
