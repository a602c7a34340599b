"""Bytes of feature maps that a compiled training step moves on a GPU, counted on any machine.

  python scripts/benchmark.py traffic model=layer act=[relu,silu] norm=[ln,ln_pn] json=FILE
  python scripts/benchmark.py traffic model=resnet50 norm=['torch bn',ln_pn] json=FILE

inductor lowers and fuses the graphs of the forward and the backward pass for a simulated GPU, an
H100 (sm_90). The traffic of a fused kernel is the size of the buffers that it reads and writes,
each counted once. No kernel is launched. Convolutions and matrix products (compiled: all library
kernels) are left out: they are the same for every norm. Maps are bfloat16, parameters of norms
float32.

model=layer is one norm and activation between two 1×1 convolutions, in bytes per element of its
map. Other models are whole networks, in MB per image. The column `operations` is the arithmetic of
the kernels, per element or in millions per image.

"torch bn" is torch's batch norm. It is also counted without compilation: each operator reads its
inputs, writes its outputs, and counts as one operation per element of its output. A batch norm
reads its inputs twice, because the statistics or sums have to be computed first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.scheduler as scheduler
import torch.utils._triton
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import _recursive_post_grad_passes, partition_fn
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from benchmarks.networks import ALL_NORMS, FORMATS, TORCH_BN, TORCH_LN, build, torch_layer
from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.nn import ACTIVATIONS, NormAct2d, inductor_options

Traffic = tuple[int, int, int]  # bytes, kernels and operations of a pass
GPU = torch.device("cuda:0")
LAYER = "layer"
NO_ARITHMETIC = {"load", "store", "store_reduction", "constant", "to_dtype", "get_index", "output"}
# the properties of the device that inductor reads, with the values of an H100
PROPERTIES = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32)
PROPERTIES.max_threads_per_multi_processor, PROPERTIES.max_threads_per_block = 2048, 1024
PROPERTIES.regs_per_multiprocessor, PROPERTIES.shared_memory_per_block_optin = 65536, 232448


@dataclass
class Options(common.ModelOptions):
    model: str = option(LAYER, "layer, or a model of proxynorm.create_model")
    norm: list[str] = option(
        [TORCH_BN, "ln", "ln_pn"], "norms; torch bn: torch's own", choices=ALL_NORMS
    )
    act: list[str] = option(["relu"], "activations of model=layer", choices=ACTIVATIONS)
    format: list[str] = option(
        ["channels_last"], "memory formats: nchw, channels_last", choices=FORMATS
    )
    batch: int = option(32, "images a step", "at least 1")
    size: int | None = option(
        None, "side of the images, pixels; None: 56 for layer, else 224", "at least 1"
    )
    channels: int = option(256, "channels of model=layer", "at least 1")


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    acts = options.act if options.model == LAYER else ["own"]
    for norm, act, memory_format in product(options.norm, acts, options.format):
        rows += measure(options, norm, act, memory_format)
        print(f"counted: {norm}, {act}, {memory_format}", flush=True)
    unit = "bytes an element" if options.model == LAYER else "MB an image"
    print(unit)
    common.show(rows)
    common.write_results(options, {"unit": unit, "rows": rows})


def measure(options: Options, norm: str, act: str, memory_format: str) -> list[dict[str, Any]]:
    """A row for the compiled step, preceded for torch bn by one for the eager step."""
    is_layer = options.model == LAYER
    side, channels = options.size or (56 if is_layer else 224), options.channels if is_layer else 3
    unit = options.batch * (channels * side * side if is_layer else 10**6)
    try:
        net = _layer(norm, act, channels) if is_layer else build(norm, options.model)
    except ValueError as error:  # ln_ws and +recompute need parts outside of the layer
        raise ConfigError(f"norm={norm} model={options.model}: {error}") from error
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16, memory_format=FORMATS[memory_format])
    state = net.state_dict(keep_vars=True)

    def step(images: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(state, tensors)), (images,))

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # only shapes: nothing is computed
        images = torch.empty(options.batch, channels, side, side, dtype=torch.bfloat16)
        images = images.to(memory_format=FORMATS[memory_format])
        # a layer's input needs a gradient, a network's images do not
        arguments = [images.requires_grad_(is_layer), *map(mode.from_tensor, state.values())]
        # eager first, because later it would add to existing gradients
        passes = {"eager": eager(step, arguments)} if norm == TORCH_BN else {}
        passes["compiled"] = compiled(step, arguments, inductor_options())
    return [
        {
            **{"norm": norm, "act": act, "format": memory_format, "mode": kind},
            **{"forward": forward[0] / unit, "backward": backward[0] / unit},
            **{"total": moved / unit, "kernels": kernels, "operations": arithmetic / unit},
        }
        for kind, (forward, backward) in passes.items()
        for moved, kernels, arithmetic in [map(sum, zip(forward, backward))]
    ]


def _layer(norm: str, act: str, channels: int) -> nn.Module:
    """The norm and activation between two 1×1 convolutions, in training mode."""
    middle: nn.Module = NormAct2d(channels, norm.removeprefix("torch "), False, act)
    if norm in (TORCH_BN, TORCH_LN):
        middle = torch_layer(middle, norm)
    first, last = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
    return nn.Sequential(first, middle, last)


def compiled(
    step: Callable[..., Tensor], arguments: list[Tensor], options: dict[str, Any]
) -> list[Traffic]:
    """Traffic of the forward and the backward pass as inductor compiles them."""
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def keep(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((graph, inputs))
        return make_boxed_func(graph.forward)

    # the flag makes the layers use their plain operations, as under torch.compile
    with mock.patch.object(torch.compiler, "_is_compiling_flag", True), config.patch(options):
        run = aot_function(
            step, keep, keep, partition_fn=partition_fn, decompositions=select_decomp_table()
        )
        out = run(*arguments)
        out.backward(torch.ones_like(out))
        with simulated_gpu():
            return [lower(*graph, is_backward) for graph, is_backward in zip(graphs, (False, True))]


def lower(graph: fx.GraphModule, inputs: Sequence[Any], is_backward: bool) -> Traffic:
    """Lower and fuse the graph for the simulated GPU; count the traffic of its kernels."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    # The graph was traced on the CPU, so its factory functions name that device.
    def move(value: Any) -> Any:
        return GPU if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, move)
        node.kwargs = fx.node.map_aggregate(node.kwargs, move)
    graph.recompile()
    with mode:
        inputs = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU) for t in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    with tracing(TracingContext(mode)), V.set_fake_mode(mode):
        _recursive_post_grad_passes(graph, is_inference=False)
        # Again, for the nodes that the passes made.
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward)
        handlers = V.set_graph_handler(lowered), V.set_debug_handler(DebugContext())
        with handlers[0], handlers[1], V.set_extern_kernel_nodes([]):
            lowered.run(*inputs)
            lowered.init_wrapper_code()
            lowered._update_scheduler()  # fuses kernels; their code is not needed
            left_out = (scheduler.ExternKernelSchedulerNode, scheduler.NopKernelSchedulerNode)
            kernels = [n for n in lowered.scheduler.nodes if not isinstance(n, left_out)]
            moved = sum(kernel.get_read_write_buffers_sizes() for kernel in kernels)
            return moved, len(kernels), sum(map(operations, kernels))


def operations(kernel: scheduler.BaseSchedulerNode) -> int:
    """Arithmetic operations of a fused kernel over all elements, inlined constants included."""
    total = 0
    for node in kernel.get_nodes():
        counts = node._body.op_counts
        arithmetic = sum(n for name, n in counts.items() if name not in NO_ARITHMETIC)
        total += arithmetic * math.prod(map(int, (*node._sizes[0], *node._sizes[1])))
    return total


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Make torch and Triton see an H100, for which code can be generated but not run."""

    def convolution_format(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
        formats = (suggest_memory_format(x), suggest_memory_format(weight))
        return torch.channels_last if torch.channels_last in formats else torch.contiguous_format

    def properties(*_: object) -> SimpleNamespace:
        return PROPERTIES

    interface, worker = device_interface.CudaInterface, device_interface.CudaInterface.Worker
    patches = [
        *((owner, "is_available", lambda: True) for owner in (torch.cuda, interface)),
        *((owner, "current_device", lambda: 0) for owner in (torch.cuda, interface, worker)),
        *((o, "get_device_properties", properties) for o in (torch.cuda, interface, worker)),
        *((owner, "has_triton", lambda *_: True) for owner in (scheduler, torch.utils._triton)),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "_lazy_init", lambda: None),
        (interface, "get_compute_capability", lambda *_: 90),
        (torch._C, "_conv_determine_backend_memory_format", convolution_format),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            value = staticmethod(value) if isinstance(owner, type) else value
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class Operators(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor)]
        left_out = any(word in func.__name__ for word in ("convolution", "mm.", "empty", "detach"))
        if outputs and not func.is_view and not left_out:
            inputs = [t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            reads = 2 if "batch_norm" in func.__name__ else 1
            self.bytes += reads * sum(inputs) + sum(outputs)
            self.kernels += 1
            self.elements += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def eager(step: Callable[..., Tensor], arguments: list[Tensor]) -> list[Traffic]:
    """Traffic of the forward and the backward pass, operator by operator."""
    with Operators() as forward:
        out = step(*arguments)
    gradient = torch.ones_like(out)
    with Operators() as backward:
        out.backward(gradient)
    return [(counted.bytes, counted.kernels, counted.elements) for counted in (forward, backward)]
