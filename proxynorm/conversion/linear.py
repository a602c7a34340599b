"""What convert knows of the calls that a norm's value may meet before the next layer: which hand it on linearly (or
pool it), which begin another layer, which ask for its shape alone. Any other may be part of an activation."""

from __future__ import annotations

from collections.abc import Container

from torch import fx, nn

from proxynorm.conversion.elementwise import called_function, is_norm

SUMS = {"add", "iadd", "sub", "isub", "rsub", "subtract", "sum", "mean"}
PRODUCTS = {"mul", "imul", "multiply"}
QUOTIENTS = {"truediv", "itruediv", "div", "divide", "true_divide"}
# A new layer's value, or a norm's: the search for an activation ends here.
_LAYERS = {
    "matmul",
    "mm",
    "bmm",
    "einsum",
    "tensordot",
    "linear",
    "bilinear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "scaled_dot_product_attention",
    "batch_norm",
    "instance_norm",
    "group_norm",
    "layer_norm",
    "rms_norm",
    "local_response_norm",
    "normalize",
}
_PASSING = {
    "view",
    "view_as",
    "reshape",
    "reshape_as",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
    "t",
    "contiguous",
    "squeeze",
    "unsqueeze",
    "expand",
    "expand_as",
    "broadcast_to",
    "as_strided",
    "getitem",
    "select",
    "narrow",
    "index_select",
    "gather",
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "unbind",
    "cat",
    "concat",
    "concatenate",
    "stack",
    "hstack",
    "vstack",
    "dstack",
    "repeat",
    "repeat_interleave",
    "tile",
    "roll",
    "flip",
    "fliplr",
    "flipud",
    "rot90",
    "unfold",
    "fold",
    "pad",
    "constant_pad_nd",
    "cumsum",
    "diff",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "interpolate",
    "upsample",
    "upsample_bilinear",
    "upsample_nearest",
    "grid_sample",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "amax",
    "amin",
    "max",
    "min",
    "neg",
    "negative",
    "pos",
    "positive",
    "clone",
    "copy",
    "detach",
    "to",
    "type",
    "type_as",
    "float",
    "double",
    "half",
    "bfloat16",
    "cpu",
    "cuda",
    "requires_grad",
    "where",
    "masked_fill",
}
_PASSING_ATTRIBUTES = {"T", "mT", "H", "mH", "data", "real", "values"}
_SHAPES = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "get_device",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "new_tensor",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
}
# Calls that take of their second argument the shape or kind alone.
_LIKE = {"view_as", "reshape_as", "expand_as", "type_as", "to"}
_SHAPE_ATTRIBUTES = {
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "requires_grad",
    "itemsize",
    "nbytes",
}
# An argument, by place and name, in which a call is not linear.
_NOT_LINEAR_IN = {
    "where": (0, "condition"),
    "masked_fill": (1, "mask"),
    **dict.fromkeys(QUOTIENTS, (1, "other")),
}
_PASSING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Fold,
    nn.Unfold,
    nn.modules.dropout._DropoutNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_NORM_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
_LIBRARIES = ("torch.", "timm.", "torchvision.", "proxynorm.")


def may_stand_between(module: nn.Module) -> bool:
    """Whether the module may stand between a norm and its activation: it drops, blurs or pools and learns nothing."""
    name = type(module).__name__
    known = (nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d)
    return isinstance(module, known) or "DropBlock" in name or "BlurPool" in name


def plain_name(node: fx.Node) -> str:
    """Name of the torch function or method that a node calls, without the mark of an in-place one; "" for others."""
    name = called_function(node) or ""
    return name if name.endswith("__") else name.rstrip("_")


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes of whose values a call makes its own."""
    return node.all_input_nodes[:1] if plain_name(node) in _LIKE else node.all_input_nodes


def arguments(node: fx.Node, values: Container[fx.Node]) -> list[fx.Node]:
    """The arguments of a call that are among `values`, as often as they occur."""
    return [
        given
        for given in (*node.args, *node.kwargs.values())
        if isinstance(given, fx.Node) and given in values
    ]


def asks_shape(node: fx.Node) -> bool:
    """Whether a node asks for a tensor's shape or kind alone, or makes another of that shape."""
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return plain_name(node) in _SHAPES


def begins_layer(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node calls a layer that learns, or a norm, of a known library."""
    if node.op != "call_module":
        return plain_name(node) in _LAYERS
    module = root.get_submodule(str(node.target))
    torchs = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, *_NORM_MODULES))
    learns = next(module.parameters(), None) is not None and type(module).__module__.startswith(
        _LIBRARIES
    )
    return torchs or learns or is_norm(module)


def is_linear(node: fx.Node, root: nn.Module, values: Container[fx.Node]) -> bool:
    """Whether a call is known to be linear in those of its arguments that are among `values`, or to pool."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return isinstance(module, _PASSING_MODULES) or may_stand_between(module)
    name, given = plain_name(node), arguments(node, values)
    if node.target is getattr:
        return node.args[1] in _PASSING_ATTRIBUTES
    if node.op == "call_function" and not name:
        return getattr(node.target, "__module__", "").startswith(
            ("timm.", "torchvision.")
        )  # paths dropped, windows …
    if name in ("max", "min"):
        return len(node.all_input_nodes) == 1
    if name in PRODUCTS:
        return len(given) < 2
    place, keyword = _NOT_LINEAR_IN.get(name, (len(node.args), ""))
    bent = [
        *node.args[place : place + 1],
        node.kwargs.get(keyword),
        node.kwargs.get("rounding_mode"),
    ]
    if any(
        isinstance(argument, str) or (isinstance(argument, fx.Node) and argument in values)
        for argument in bent
    ):
        return False
    return name in SUMS | QUOTIENTS | _PASSING
