"""Export of a trained run: safetensors, config.json, a model card, ONNX.

The weights and the ONNX file are loaded back, and their logits are compared with the run's.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save
from torch import Tensor, nn

from proxynorm.errors import CheckpointError, ConfigError
from proxynorm.files import write_atomic, write_json, write_text
from proxynorm.loading import CONFIG, WEIGHTS, load_export
from proxynorm.model_card import CARD, model_card
from proxynorm.nn.freeze import freeze
from proxynorm.train.restore import Restored, checkpoint_path, restore

# Keys of a run's configuration that do not describe the model, but where and how it ran.
LEFT_OUT = ("runs_dir", "name", "logger", "loader", "checkpoint", "debug", "resume", "device")
ONNX_TOLERANCE = 1e-4
load = load_export  # used in the model cards of version 0.1.0


def export_run(
    run: str | Path,
    output: str | Path,
    weights: str = "last",
    onnx: bool = False,
    licence: str = "mit",
) -> dict[str, float]:
    """Write a run's model to the folder `output`: model.safetensors, config.json, README.md.

    weights: "last" or "best"; onnx: also write model.onnx; licence: of the weights.

    Returns {file: largest difference from the run's logits}. Raises CheckpointError if the run has
    no such checkpoint or no summary, or if an exported file gives different logits; ConfigError if
    a library is missing.
    """
    for package in ("onnx", "onnxruntime", "onnxscript") if onnx else ():
        if find_spec(package) is None:  # check before anything is written
            raise ConfigError(f"onnx=true needs {package}: install proxynorm's extra [export]")
    run, output = Path(run), Path(output)
    restored = restore(checkpoint_path(str(run), None, weights))
    if not (run / "summary.json").is_file():
        raise CheckpointError(f"{run} has no summary.json: the run has not ended")
    content = _describe(restored, run, weights)
    output.mkdir(parents=True, exist_ok=True)
    tensors = save({key: value.contiguous() for key, value in restored.model.state_dict().items()})
    path = output / WEIGHTS
    # safetensors' own save_file ignores the umask and leaves mode 0600.
    write_atomic(path, lambda stream: stream.write(tensors))
    write_json(output / CONFIG, content)
    inputs = content["inputs"]
    shape = (4, inputs["channels"], inputs["size"], inputs["size"])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = restored.model(images)
        difference = (load_export(output).model(images) - logits).abs().max().item()
    if difference != 0:
        raise CheckpointError(f"{path}: the logits differ from the run's by {difference:g}")
    differences = {path.name: difference}
    path = output / "model.onnx"
    path.unlink(missing_ok=True)  # one from an earlier export has other weights
    if onnx:
        differences[path.name] = _export_onnx(restored.model, path, images, logits)
    write_text(output / CARD, model_card(content, onnx, licence))
    return differences


def _describe(restored: Restored, run: Path, weights: str) -> dict[str, Any]:
    """Return the content of config.json: config, inputs, metrics."""
    config = OmegaConf.to_container(OmegaConf.create((run / "config.yaml").read_text()))
    config = {key: value for key, value in config.items() if key not in LEFT_OUT}
    if (eps := (restored.content.get("start") or {}).get("eps")) is not None:
        config["norm"]["eps"] = eps  # from the pretrained weights that the run started with
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("root", "cache")}
    if config.get("weights"):  # leave out the folders of this machine
        config["weights"] = Path(config["weights"]).name
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


def _export_onnx(model: nn.Module, path: Path, images: Tensor, logits: Tensor) -> float:
    """Write the frozen model as ONNX. Returns its largest difference from `logits`."""
    import onnxruntime

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
    # A batch of another size than the exported one shows that the batch size is dynamic.
    (output,) = session.run(None, {session.get_inputs()[0].name: images[:3].numpy()})
    expected = logits[:3]
    difference = (expected - torch.from_numpy(output)).abs().max().item()
    # Not `difference >`, which is false for NaN.
    if not difference <= ONNX_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CheckpointError(
            f"{path}: the logits under onnxruntime differ from the run's by {difference:g}"
        )
    return difference
