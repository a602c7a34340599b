"""Convert a zoo of networks and check all that convert and freeze promise of them.

    python tests/acceptance/convert_zoo.py [part …] [--only NAME …] [--again]

prints one JSON line a network and writes results/conversion/zoo.json and zoo.md. It goes on where
an earlier run ended; --again starts over. Parts: timm, torchvision, detection, segmentation, smp,
monai (the last two where these packages are installed). On one core it takes half an hour or so.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from proxynorm import conversion_report, convert, freeze, parameter_groups
from proxynorm.files import write_text
from proxynorm.nn import NormAct2d

FOLDER = Path(__file__).resolve().parents[2] / "results" / "conversion"
NORMS = ("ln_pn", "gn_pn")
TOLERANCE = 1e-5  # between frozen and unfrozen, as a fraction of the output's scale

Call = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Case:
    """A network of the zoo.

    Attributes:
        library, name: what it is called there.
        make: builds it, with random weights.
        inputs: its example_inputs; None: random images, as convert guesses them.
        onnx: inputs to export it with; None: it takes no single image, so it is not exported.
        options: further options of convert, such as no_activation.
        parts: modules whose outputs are compared instead of the network's. A detector's boxes are
            sorted by scores that lie close together in a network with random weights.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: object = None
    onnx: Tensor | None = None
    options: dict[str, object] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"


TIMM = """
resnet18 seresnext26d_32x4d resnest14d efficientnet_b0 mobilenetv3_small_050 regnety_002
densenet121 dla34 ghostnet_050 resnetv2_50 efficientnet_cc_b0_4e mixnet_s botnet26t_256
coatnet_nano_rw_224 resnet26d resnet26t resnetaa50 resnext26ts seresnet50 ecaresnet26t skresnet18
res2net50_26w_4s res2next50 resnet50_gn resnetv2_50x1_bit gcresnet33ts legacy_seresnet18
legacy_xception dla60x dpn68 inception_v3 regnetx_002 regnetz_005 efficientnet_es
efficientnet_lite0 efficientnet_b1_pruned efficientnetv2_rw_t tf_efficientnet_b0
tf_efficientnetv2_b0 mnasnet_small semnasnet_100 spnasnet_100 fbnetc_100 fbnetv3_b mobilenetv1_100
mobilenetv2_050 mobilenetv3_large_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium
hardcorenas_a tinynet_e lcnet_050 ghostnetv2_100 repghostnet_050 hrnet_w18_small selecsls42
ese_vovnet19b_dw darknet17 cspdarknet53 cspresnet50 rexnet_100 gernet_s mobileone_s0 repvgg_a0
tresnet_m hgnet_tiny hgnetv2_b0 halonet26t lambda_resnet26t eca_botnext26ts_256 bat_resnext26ts
mobilevit_xxs mobilevitv2_050 coat_lite_tiny efficientformer_l1 efficientformerv2_s0
efficientvit_b0 efficientvit_m0 fastvit_t8 repvit_m0_9 nextvit_small tiny_vit_5m_224 visformer_tiny
levit_128s convmixer_1024_20_ks9_p14 poolformer_s12 swiftformer_xs starnet_s1 shvit_s1 xception41
inception_v4 convnext_atto nfnet_l0 edgenext_xx_small inception_next_atto focalnet_tiny_srf
mambaout_femto
""".split()

# one block a stage: the blocks of a stage are alike
_ONE_BLOCK_EACH = {"layers": (1, 1, 1, 1)}
TIMM_SMALLER: dict[str, dict[str, object]] = {
    **dict.fromkeys(
        "resnet26d resnet26t resnetaa50 seresnet50 ecaresnet26t res2net50_26w_4s res2next50 "
        "resnet50_gn resnetv2_50 seresnext26d_32x4d resnest14d tresnet_m".split(),
        _ONE_BLOCK_EACH,
    ),
    "densenet121": {"block_config": (2, 2, 2, 2)},
}
# norms over vectors, for which NormAct2d is not made
TIMM_OPTIONS: dict[str, dict[str, object]] = {
    "efficientvit_m0": {"keep": ["head.bn"]},
    "shvit_s1": {"keep": ["head.bn"]},
    "repvit_m0_9": {"keep": ["head.*"]},
    "nextvit_small": {"keep": ["*.e_mhsa.norm"]},
}
_SIZES = {"halonet26t": 256, "bat_resnext26ts": 256, "inception_v3": 96, "inception_v4": 96}

TORCHVISION = """
alexnet resnet18 resnext50_32x4d densenet121 googlenet inception_v3
mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 shufflenet_v2_x0_5 shufflenet_v2_x1_0
regnet_x_400mf regnet_y_400mf efficientnet_b0 efficientnet_v2_s maxvit_t convnext_tiny
""".split()

DETECTION = {
    "fasterrcnn_resnet50_fpn": ("backbone", "rpn.head"),
    "fasterrcnn_resnet50_fpn_v2": ("backbone", "rpn.head"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("backbone", "rpn.head"),
    "maskrcnn_resnet50_fpn": ("backbone", "rpn.head"),
    "keypointrcnn_resnet50_fpn": ("backbone", "rpn.head"),
    "retinanet_resnet50_fpn": ("backbone", "head"),
    "retinanet_resnet50_fpn_v2": ("backbone", "head"),
    "fcos_resnet50_fpn": ("backbone", "head"),
    "ssdlite320_mobilenet_v3_large": ("backbone", "head"),
    "ssd300_vgg16": ("backbone", "head"),
}

SEGMENTATION = """
fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large
""".split()

SMP = (
    *((kind, "resnet18") for kind in "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN".split()),
    *((kind, "resnet18") for kind in "DeepLabV3 DeepLabV3Plus UPerNet".split()),
    *(("Unet", e) for e in "mobilenet_v2 timm-efficientnet-b0 efficientnet-b0 densenet121".split()),
    *(("Unet", e) for e in "se_resnet50 timm-regnety_002 vgg11_bn xception dpn68".split()),
    *(("DeepLabV3Plus", e) for e in "mobilenet_v2 timm-mobilenetv3_small_075".split()),
    ("FPN", "mit_b0"),
    ("Segformer", "mit_b0"),
)


def cases(parts: list[str]) -> Iterator[Case]:
    """The networks of the parts, in order."""
    for part in parts:
        yield from PARTS[part]()


def _timm() -> Iterator[Case]:
    import timm

    for name in TIMM:
        options = TIMM_OPTIONS.get(name, {})
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        is_fixed = config is not None and config.fixed_input_size
        size = config.input_size[-1] if is_fixed else _SIZES.get(name, 64)
        make = functools.partial(
            timm.create_model, name, num_classes=10, **TIMM_SMALLER.get(name, {})
        )
        images = torch.randn(2, 3, size, size)
        yield Case("timm", name, make, images, images, options)


def _torchvision() -> Iterator[Case]:
    from torchvision import models

    for name in TORCHVISION:
        size = {"maxvit_t": 224, "inception_v3": 299}.get(name, 64)
        kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        make = functools.partial(models.get_model, name, num_classes=10, **kwargs)
        images = torch.randn(2, 3, size, size)
        yield Case("torchvision", name, make, images, images)


def _detection() -> Iterator[Case]:
    from torchvision import models, ops

    def call(model: nn.Module) -> object:
        torch.manual_seed(0)
        dtype = next(model.parameters()).dtype
        images = [torch.rand(3, *sides).to(dtype) for sides in ((96, 112), (112, 96))]
        box = torch.tensor([[8.0, 10.0, 60.0, 70.0], [20.0, 5.0, 90.0, 80.0]], dtype=dtype)
        target = {
            "boxes": box,
            "labels": torch.tensor([1, 1]),
            "masks": torch.ones(2, 96, 96, dtype=torch.uint8),
            "keypoints": torch.tensor([30.0, 40.0, 1.0]).repeat(2, 17, 1),
        }
        return model(images, [target, target] if model.training else None)

    for name, parts in DETECTION.items():
        kwargs = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
        if name.startswith("keypoint"):
            kwargs["num_classes"] = 2
        make = functools.partial(
            models.get_model, name, weights=None, weights_backbone=None, **kwargs
        )
        yield Case("torchvision", name, make, call, parts=parts)
    name, parts = "fasterrcnn_resnet50_fpn", DETECTION["fasterrcnn_resnet50_fpn"]
    make = functools.partial(
        models.get_model,
        name,
        weights=None,
        weights_backbone=None,
        norm_layer=ops.FrozenBatchNorm2d,
        min_size=96,
        max_size=128,
    )
    yield Case("torchvision", f"{name}+FrozenBatchNorm2d", make, call, parts=parts)


def _segmentation() -> Iterator[Case]:
    from torchvision import models

    for name in SEGMENTATION:
        kwargs = {"weights": None, "weights_backbone": None, "num_classes": 5}
        make = functools.partial(models.get_model, name, **kwargs)
        images = torch.randn(2, 3, 64, 64)
        yield Case("torchvision", name, make, images, images)


def _smp() -> Iterator[Case]:
    smp = importlib.import_module("segmentation_models_pytorch")
    for kind, encoder in SMP:
        make = functools.partial(getattr(smp, kind), encoder, encoder_weights=None, classes=4)
        size = 256 if kind == "PAN" else 64  # PAN pools thrice behind the encoder
        images = torch.randn(2, 3, size, size)
        yield Case("smp", f"{kind}-{encoder}", make, images, images)


def _monai() -> Iterator[Case]:
    nets = importlib.import_module("monai.networks.nets")
    maps = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    levels = {"channels": (8, 16, 32), "strides": (2, 2)}
    dyn = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    table: dict[str, dict[str, object]] = {
        "UNet": {**maps, **levels, "norm": "batch", "num_res_units": 2},
        "UNet-instance": {**maps, **levels, "num_res_units": 2},
        "UNet-relu": {**maps, **levels, "norm": "batch", "act": "relu"},
        "AttentionUnet": {**maps, **levels},
        "BasicUNet": {"spatial_dims": 2, "features": (8, 8, 16, 32, 64, 8)},
        "BasicUNet-batch": {
            "spatial_dims": 2,
            "features": (8, 8, 16, 32, 64, 8),
            "norm": ("batch", {"affine": True}),
        },
        "BasicUNetPlusPlus": {"spatial_dims": 2, "features": (8, 8, 16, 32, 64, 8)},
        "DynUNet": {**maps, **dyn, "norm_name": "batch"},
        "DynUNet-instance": {**maps, **dyn},
        "SegResNet": {"spatial_dims": 2, "init_filters": 8},
        "SegResNet-batch": {"spatial_dims": 2, "init_filters": 8, "norm": "batch"},
        "FlexibleUNet": {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"},
        "FlexibleUNet-resnet18": {"in_channels": 3, "out_channels": 2, "backbone": "resnet18"},
        "EfficientNetBN": {
            "model_name": "efficientnet-b0",
            "pretrained": False,
            "spatial_dims": 2,
            "in_channels": 3,
        },
        "DenseNet121": {"spatial_dims": 2, "in_channels": 1, "out_channels": 4},
        "SEResNet50": {"spatial_dims": 2, "in_channels": 3, "num_classes": 4},
        "VNet": {"spatial_dims": 2, "in_channels": 1, "out_channels": 2},
        "HighResNet": {"spatial_dims": 2, "in_channels": 1, "out_channels": 2},
        "AHNet": {"spatial_dims": 2, "in_channels": 3, "upsample_mode": "bilinear"},
        "ResNet": {
            "block": "basic",
            "layers": [1, 1, 1, 1],
            "block_inplanes": [8, 16, 32, 64],
            "spatial_dims": 2,
            "n_input_channels": 3,
        },
    }
    for name, kwargs in table.items():
        make = functools.partial(getattr(nets, name.partition("-")[0]), **kwargs)
        channels = kwargs.get("in_channels") or kwargs.get("n_input_channels") or 1
        size = 128 if name == "AHNet" else 64
        images = torch.randn(2, int(channels), size, size)  # type: ignore[call-overload]
        yield Case("monai", name, make, images, images)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "detection": _detection,
    "segmentation": _segmentation,
    "smp": _smp,
    "monai": _monai,
}


def converted(case: Case, norm: str, verify: bool = True) -> nn.Module:
    """The network, converted from random weights that are the same each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norms that never run, as the row says
        return convert(case.make(), norm, case.inputs, verify=verify, **case.options)


def check(case: Case, norm: str, is_full: bool = True) -> dict[str, object]:
    """All that is promised of one network under one norm, but ONNX; the figures of its row.

    Not in full: without what is the same under every norm (the comparison, saving, copying).

    Raises:
        ValueError: convert refuses the network.
        AssertionError: a promise is broken.
    """
    model = converted(case, norm, verify=is_full)
    layers = [m for m in model.modules() if isinstance(m, NormAct2d)]
    call = case.inputs if callable(case.inputs) else lambda net: net(case.inputs)
    _train_a_step(model, call, layers)
    model.eval()
    expected = _outputs(model, call, case.parts)
    for name, twin in _twins(case, norm, model).items() if is_full else ():
        difference = _difference(expected, _outputs(twin.eval(), call, case.parts))
        assert difference == 0, f"{name}: outputs differ by {difference:.1e} of their scale"
    frozen = freeze(model)
    difference = _difference(expected, _outputs(frozen, call, case.parts))
    if difference > TOLERANCE:  # float32's rounding, which the network amplifies: float64 tells
        doubled = _frozen_difference_in_double(model, case)
        assert doubled <= 1e-9, f"frozen differs by {difference:.1e}, by {doubled:.1e} in float64"
    rows = conversion_report(model)
    return {
        "norms": len(layers),
        "with_pn": sum(layer.proxied for layer in layers),
        "left": sum(row.action.startswith("left as it is") for row in rows),
        "frozen_difference": float(f"{difference:.1e}"),
    }


def _train_a_step(model: nn.Module, call: Call, layers: list[NormAct2d]) -> None:
    """One step of SGD from random norms; every PN parameter must have got a gradient."""
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, parameter.mean().item(), 0.1)
    optimizer = torch.optim.SGD(parameter_groups(model.train(), 1e-4), lr=1e-3, momentum=0.9)
    torch.manual_seed(1)
    losses = [t for t in tree_leaves(call(model)) if isinstance(t, Tensor) and t.requires_grad]
    assert losses, "the output in training has no gradient"
    sum(t.square().mean() for t in losses).backward()
    grads = [layer.proxy_weight.grad for layer in layers if layer.proxied]
    assert grads and all(g is not None and g.isfinite().all() for g in grads), "no gradient of PN"
    optimizer.step()


def _twins(case: Case, norm: str, model: nn.Module) -> dict[str, nn.Module]:
    """The model once more, by each way of copying it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    restored = converted(case, norm, verify=False)
    restored.load_state_dict(model.state_dict())
    return {"copy.deepcopy": copy.deepcopy(model), "torch.save": loaded, "state_dict": restored}


@torch.no_grad()
def _outputs(model: nn.Module, call: Call, parts: tuple[str, ...]) -> list[Tensor]:
    """The tensors that the model, or these parts of it, returned; random numbers are the same."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        seen.extend(t.detach().clone() for t in tree_leaves(output) if isinstance(t, Tensor))

    handles = [model.get_submodule(name).register_forward_hook(note) for name in parts or ("",)]
    torch.manual_seed(2)
    call(model)
    for handle in handles:
        handle.remove()
    return [t for t in seen if t.is_floating_point()]


def _frozen_difference_in_double(model: nn.Module, case: Case) -> float:
    doubled = copy.deepcopy(model).double()
    call = case.inputs if callable(case.inputs) else lambda net: net(case.inputs.double())
    first, second = (_outputs(m, call, case.parts) for m in (doubled, freeze(doubled)))
    return _difference(first, second)


def _difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference, as a fraction of the output's scale."""
    assert len(first) == len(second) > 0
    scale = [t.abs().max().clamp_min(1e-12) for t in first]
    gaps = [((a - b).abs().max() / s).item() for a, b, s in zip(first, second, scale)]
    assert all(gap == gap for gap in gaps), "outputs are not finite"
    return max(gaps)


def onnx(case: Case, norm: str) -> str:
    """Export the frozen network; where that fails, the original has to fail as well."""
    if case.onnx is None:
        return "not tried"
    try:
        _export(freeze(converted(case, norm, verify=False)), case.onnx)
        return "exported"
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    try:
        _export(case.make().eval(), case.onnx)
    except Exception:
        return "nor the original"
    return f"failed, though the original is exported: {message}"


def _export(model: nn.Module, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (images,), io.BytesIO(), dynamo=True, optimize=False, verbose=False
        )


def row_of(case: Case) -> dict[str, object]:
    """A row of the zoo: "ok", "refused" with convert's reason, or "failed" with the promise.

    A network that the first norm converts may be refused by another one, which its own entry says.
    """
    row: dict[str, object] = {"network": case.key, "result": "ok"}
    start = time.monotonic()
    for norm in NORMS:
        try:
            row[norm] = check(case, norm, is_full=norm == NORMS[0])
        except ValueError as error:
            if norm == NORMS[0]:
                return row | {"result": "refused", "why": str(error)}
            row[norm] = {"refused": str(error)}
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            why = f"{norm}: {type(error).__name__}: {said[0]}"
            return row | {"result": "failed", "why": why}
        gc.collect()
    return row | {"seconds": round(time.monotonic() - start, 1)}


def write(rows: dict[str, dict[str, Any]]) -> None:
    """zoo.json, a line a network, and zoo.md, the table."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows.values())
    write_text(FOLDER / "zoo.json", f"[\n{lines}\n]\n")
    write_text(FOLDER / "zoo.md", table(list(rows.values())))


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown page of the zoo."""
    by_result = {
        r: [row for row in rows if row["result"] == r] for r in ("ok", "refused", "failed")
    }
    text = [
        "# Networks that convert and freeze were tried with",
        "",
        "Made by `python tests/acceptance/convert_zoo.py`. Each network was converted with "
        f"{' and '.join(NORMS)}, trained for a step and frozen; with {NORMS[0]} also compared with "
        "the original, saved with torch.save and as a state_dict, deep-copied and, after all "
        "others, exported to ONNX (where this is not tried yet, the table says so). Frozen differs "
        "by the given fraction of the output's scale, in float32; where that is more than 1e-5, by "
        "less than 1e-9 in float64.",
        "",
        f"{len(by_result['ok'])} networks converted, {len(by_result['refused'])} refused, "
        f"{len(by_result['failed'])} failed.",
        "",
        "| network | norms | with PN | left | frozen differs by (ln_pn, gn_pn) | ONNX |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in by_result["ok"]:
        first, second = (row[norm] for norm in NORMS)
        frozen = [f"{r['frozen_difference']:.0e}" if "norms" in r else "–" for r in (first, second)]
        text.append(
            f"| {row['network']} | {first['norms']} | {first['with_pn']} | {first['left']} | "
            f"{', '.join(frozen)} | {row.get('onnx', 'not tried')} |"
        )
    refused = [row for row in by_result["ok"] if "refused" in row[NORMS[1]]]
    if refused:
        text += ["", f"## Refused with {NORMS[1]}", ""]
        text += [f"- **{row['network']}**: {row[NORMS[1]]['refused']}" for row in refused]
    for result, title in (("refused", "Refused"), ("failed", "Failed")):
        if by_result[result]:
            text += ["", f"## {title}", ""]
            text += [f"- **{row['network']}**: {row['why']}" for row in by_result[result]]
    return "\n".join(text) + "\n"


def _kept() -> dict[str, dict[str, Any]]:
    """The rows of earlier runs, by network."""
    path = FOLDER / "zoo.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    return {row["network"]: row for row in rows}


def main() -> int:
    """Run the parts and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="part")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--again", action="store_true", help="do not go on, start over")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.again:
        write({})
    chosen = [c for c in cases(options.parts) if not options.only or c.name in options.only]
    for case in chosen:
        if case.key not in _kept():
            _add(row_of(case))
    for case in chosen:  # after all others, since exporting takes three times as long
        row = _kept()[case.key]
        if row["result"] == "ok" and "onnx" not in row:
            told = onnx(case, NORMS[0])
            failed = {"result": "failed", "why": told} if told.startswith("failed") else {}
            _add(row | {"onnx": told} | failed)
    return 1 if any(row["result"] == "failed" for row in _kept().values()) else 0


def _add(row: dict[str, Any]) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)
    write({**_kept(), row["network"]: row})  # another process may work on another part


if __name__ == "__main__":
    sys.exit(main())
