"""A trained run as files for others: safetensors, config.json, a model card, ONNX.

Each file is loaded back, and its logits are compared with the run's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save
from torch import Tensor, nn

from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.files import write_atomic, write_json, write_text
from proxynorm.nn.freeze import freeze
from proxynorm.train.build import build_model
from proxynorm.train.config import settings_from
from proxynorm.train.restore import Restored, checkpoint_path, restore

# Keys of a run's configuration that say where and how it ran, not what the model is.
PLACES = ("runs_dir", "name", "logger", "loader", "checkpoint", "debug", "resume", "device")
RECIPE = ("model", "norm", "optim", "schedule", "regularization", "data")
RECIPE += ("batch", "norm_batch", "epochs", "seed")
ONNX_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """A loaded export.

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
    """Write a run's model to the folder `output`: model.safetensors, config.json, README.md.

    weights: "last" or "best"; onnx: write model.onnx as well; licence: of the weights.

    Returns the largest differences from the run's own logits, by file. Raises CheckpointError if
    the run has no such checkpoint or summary, or if what was written does not give the same logits;
    ConfigError where a library is missing.
    """
    run, output = Path(run), Path(output)
    restored = restore(checkpoint_path(str(run), None, weights))
    if not (run / "summary.json").is_file():
        raise CheckpointError(f"{run} has no summary.json: the run has not ended")
    content = describe(restored, run, weights)
    output.mkdir(parents=True, exist_ok=True)
    tensors = save({key: value.contiguous() for key, value in restored.model.state_dict().items()})
    path = output / "model.safetensors"
    # safetensors' own save_file ignores the umask and leaves mode 0600.
    write_atomic(path, lambda stream: stream.write(tensors))
    write_json(output / "config.json", content)
    images = example_images(content["inputs"])
    with torch.no_grad():
        logits = restored.model(images)
        difference = (load(output).model(images) - logits).abs().max().item()
    if difference != 0:
        raise CheckpointError(f"{path}: the logits differ from the run's by {difference:g}")
    differences = {path.name: difference}
    if onnx:
        path = output / "model.onnx"
        differences[path.name] = export_onnx(restored.model, path, images, logits)
    write_text(output / "README.md", model_card(content, onnx, licence))
    return differences


def load(folder: str | Path) -> Exported:
    """Load an exported model, in evaluation mode, with its description. Raises CheckpointError."""
    folder = Path(folder)
    for path in (folder / "config.json", folder / "model.safetensors"):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; export the run with scripts/export.py")
    content = json.loads((folder / "config.json").read_text())
    settings, inputs = settings_from(OmegaConf.create(content["config"])), content["inputs"]
    model = build_model(settings, len(inputs["classes"]), inputs["channels"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return Exported(model.eval(), inputs, content["metrics"])


def describe(restored: Restored, run: Path, weights: str) -> dict[str, Any]:
    """The content of config.json: config, inputs, metrics."""
    config = OmegaConf.to_container(OmegaConf.create((run / "config.yaml").read_text()))
    config = {key: value for key, value in config.items() if key not in PLACES}
    if (eps := (restored.content.get("start") or {}).get("eps")) is not None:
        config["norm"]["eps"] = eps  # came with the weights that the run began with
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("root", "cache")}
    summary = json.loads((run / "summary.json").read_text())
    measured = ("top1", "top5", "loss", "count")
    metrics = {key: summary[key] for key in (*measured, "epochs", "steps", "seed")}
    if weights == "best":
        metrics |= {key: restored.content[key] for key in measured}
        metrics["steps"] = restored.content["step"]
    data = restored.settings.data
    held_out = "training images that were held out"
    split = held_out if data.holdout else "images of the evaluation set"
    return {
        "config": config,
        "inputs": {**restored.content["inputs"], "size": data.eval_size or data.image_size},
        "metrics": {**metrics, "weights": weights, "split": split},
    }


def example_images(inputs: dict[str, Any], count: int = 4) -> Tensor:
    """Random images (count, channels, size, size) of unit scale, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, inputs["channels"], inputs["size"], inputs["size"])
    return torch.randn(shape, generator=generator)


def export_onnx(model: nn.Module, path: Path, images: Tensor, logits: Tensor) -> float:
    """Write the frozen model (proxy constants folded) as ONNX with any batch size.

    Returns the largest difference from `logits` under onnxruntime. Raises ConfigError where onnx,
    onnxscript or onnxruntime is missing, CheckpointError if the logits differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        install = "pip install 'proxynorm[export]'"
        raise ConfigError(f"onnx=true needs {error.name}: {install}") from error
    program = torch.onnx.export(
        freeze(model),
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # Another batch size than the export's shows that the batch is dynamic.
    (found,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
    wanted = logits[:3]
    difference = (wanted - torch.from_numpy(found)).abs().max().item()
    # Written so that NaN is an error as well.
    if not difference <= ONNX_TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise CheckpointError(
            f"{path}: the logits under onnxruntime differ from the run's by {difference:g}"
        )
    return difference


def model_card(content: dict[str, Any], onnx: bool, licence: str) -> str:
    """The README.md of an export, from what config.json holds."""
    config, inputs = content["config"], content["inputs"]
    keys = [key for key in RECIPE if key in config]
    recipe = [f"- {key}: `{json.dumps(config[key], ensure_ascii=False)}`" for key in keys]
    templates = [Path(__file__).with_name(name) for name in ("model_card.md", "model_card_onnx.md")]
    card, onnx_load = (template.read_text() for template in templates)
    return card.format(
        **content["metrics"],
        **inputs,
        **{key: config[key]["name"] for key in ("model", "norm", "data")},
        number_of_classes=len(inputs["classes"]),
        recipe="\n".join(recipe),
        licence=licence,
        onnx=", `model.onnx` (inference, proxy constants folded)" if onnx else "",
        onnx_load=onnx_load.format(**inputs) if onnx else "",
    )
