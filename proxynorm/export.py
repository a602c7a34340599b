"""A trained run as files for others: safetensors, config.json, a model card, ONNX; each is loaded back and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save
from torch import nn

from proxynorm.nn.freeze import freeze
from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.files import write_atomic, write_json, write_text
from proxynorm.train.build import build_model
from proxynorm.train.config import settings_from
from proxynorm.train.restore import Restored, checkpoint_path, restore

# Keys of a run's configuration that say where and how it ran, not what the model is.
PLACES = ("runs_dir", "name", "logger", "loader", "checkpoint", "debug", "resume", "device")
ONNX_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """What an export's config.json holds beside the model's configuration.

    inputs: classes, channels, size (pixels), and mean and std per channel on the 0..1 scale.
    metrics: the run's summary.
    """

    model: nn.Module
    inputs: dict[str, Any]
    metrics: dict[str, Any]


def export_run(
    run: str | Path,
    output: str | Path,
    weights: str = "last",
    onnx: bool = False,
    licence: str = "mit",
) -> dict[str, float]:
    """Write a run's model to the folder `output`: model.safetensors, config.json, README.md; model.onnx if asked for.

    Returns the largest differences from the run's own logits, by file. Raises CheckpointError if the run has no such
    checkpoint or summary, or if what was written does not give the same logits; ConfigError where a library is missing.
    """
    run, output = Path(run), Path(output)
    restored = restore(checkpoint_path(str(run), None, weights))
    if not (run / "summary.json").is_file():
        raise CheckpointError(f"{run} has no summary.json: the run has not ended")
    content = describe(restored, run, weights)
    output.mkdir(parents=True, exist_ok=True)
    tensors = save({key: value.contiguous() for key, value in restored.model.state_dict().items()})
    # safetensors' own save_file leaves mode 0600
    write_atomic(output / "model.safetensors", lambda stream: stream.write(tensors))
    write_json(output / "config.json", content)
    images = example_images(content["inputs"])
    differences = {
        "model.safetensors": largest_difference(restored.model, load(output).model, images)
    }
    if differences["model.safetensors"] != 0:
        raise CheckpointError(
            f"{output / 'model.safetensors'}: the logits differ from the run's by {differences['model.safetensors']:g}"
        )
    if onnx:
        differences["model.onnx"] = export_onnx(restored.model, output / "model.onnx", images)
    write_text(output / "README.md", model_card(content, onnx, licence))
    return differences


def describe(restored: Restored, run: Path, weights: str) -> dict[str, Any]:
    """The content of config.json."""
    config = OmegaConf.to_container(OmegaConf.create((run / "config.yaml").read_text()))
    config = {key: value for key, value in config.items() if key not in PLACES}
    config["data"] = {
        key: value for key, value in config["data"].items() if key not in ("root", "cache")
    }
    settings, inputs = restored.settings, restored.content["inputs"]
    summary = json.loads((run / "summary.json").read_text())
    last = {
        key: summary[key] for key in ("top1", "top5", "loss", "count", "epochs", "steps", "seed")
    }
    if weights == "best":
        last |= {key: restored.content[key] for key in ("top1", "top5", "loss", "count")} | {
            "steps": restored.content["step"]
        }
    size = settings.data.eval_size or settings.data.image_size
    split = (
        "training images that were held out"
        if settings.data.holdout
        else "images of the evaluation set"
    )
    return {
        "config": config,
        "inputs": {**inputs, "size": size},
        "metrics": {**last, "weights": weights, "split": split},
    }


def load(folder: str | Path) -> Exported:
    """The exported model, in evaluation mode, with its description. Raises CheckpointError."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing; export the run with scripts/export.py"
            )
    content = json.loads((folder / "config.json").read_text())
    settings, inputs = settings_from(OmegaConf.create(content["config"])), content["inputs"]
    model = build_model(settings, len(inputs["classes"]), inputs["channels"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return Exported(model.eval(), inputs, content["metrics"])


def example_images(inputs: dict[str, Any], count: int = 4) -> torch.Tensor:
    """Random images (count, channels, size, size) of unit scale, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        count, inputs["channels"], inputs["size"], inputs["size"], generator=generator
    )


@torch.no_grad()
def largest_difference(first: nn.Module, second: nn.Module, images: torch.Tensor) -> float:
    return (first(images) - second(images)).abs().max().item()


def export_onnx(model: nn.Module, path: Path, images: torch.Tensor) -> float:
    """Write the frozen model (proxy constants folded) as ONNX with any batch size.

    Returns the largest difference of the logits under onnxruntime. Raises ConfigError where onnx, onnxscript or
    onnxruntime is missing, CheckpointError if the logits differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"onnx=true needs {error.name}: pip install 'proxynorm[export]'"
        ) from error
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        freeze(model),
        (images,),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = model(images[:3])
    found = torch.from_numpy(
        session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})[0]
    )
    difference = (wanted - found).abs().max().item()
    if not difference <= ONNX_TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise CheckpointError(
            f"{path}: the logits under onnxruntime differ from the run's by {difference:g}"
        )
    return difference


ONNX_LOAD = """
`model.onnx` needs onnxruntime alone. Its input `images` are float32 (any number, {channels}, {size}, {size}), normalized as above; its
output `logits` has a column a class:

```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
images = numpy.zeros((1, {channels}, {size}, {size}), numpy.float32)  # (x - mean) / std of yours
logits = session.run(["logits"], {{"images": images}})[0]
```
"""


def model_card(content: dict[str, Any], onnx: bool, licence: str) -> str:
    """The README.md of an export, from what config.json holds."""
    config, inputs, metrics = content["config"], content["inputs"], content["metrics"]
    recipe = [
        f"- {key}: `{json.dumps(config[key], ensure_ascii=False)}`"
        for key in (
            "model",
            "norm",
            "optim",
            "schedule",
            "regularization",
            "data",
            "batch",
            "norm_batch",
            "epochs",
            "seed",
        )
        if key in config
    ]
    files = "`model.safetensors`, `config.json`" + (
        ", `model.onnx` (inference, proxy constants folded)" if onnx else ""
    )
    return f"""---
license: {licence}
library_name: proxynorm
tags: [image-classification, proxy-normalization, {config["norm"]["name"]}]
---

# {config["model"]["name"]}, {config["norm"]["name"]}, {config["data"]["name"]}

Trained with proxynorm (Labatie et al., "Proxy-Normalizing Activations to Match Batch Normalization while Removing Batch
Dependence", arXiv 2106.03743). Files: {files}.

## Measured

Top-1 {metrics["top1"]:.2f} %, top-5 {metrics["top5"]:.2f} %, cross-entropy {metrics["loss"]:.4f} on
{metrics["count"]} {metrics["split"]}: one run (seed {metrics["seed"]}), the {metrics["weights"]} weights, after
{metrics["steps"]} weight updates. No spread over seeds is known from this run alone.

## Inputs

{inputs["channels"]} × {inputs["size"]} × {inputs["size"]}, values in 0..1, then (x − mean) / std with mean
{inputs["mean"]} and std {inputs["std"]}; {len(inputs["classes"])} classes, named in `config.json`.

## Load

```python
from proxynorm.export import load

exported = load("FOLDER")  # exported.model, exported.inputs, exported.metrics
```
{ONNX_LOAD.format(**inputs) if onnx else ""}
## Recipe

{chr(10).join(recipe)}

## Licence

Of the weights: {licence}. The data set ({config["data"]["name"]}) has its own terms.
"""
