"""Write a run's model as safetensors, config.json and model card, and as ONNX.

python scripts/export.py run=runs/NAME onnx=true
"""

from __future__ import annotations

from dataclasses import dataclass

from proxynorm.cli import option


@dataclass
class Options:
    run: str = option("???", "run folder")
    output: str | None = option(None, "output folder; default: RUN/export")
    weights: str = option("last", "checkpoint: last or best")
    licence: str = option("mit", "licence of the weights, for the model card")
    onnx: bool = option(False, "also write model.onnx, checked with onnxruntime")
    push: str | None = option(None, "upload to this repository of the Hugging Face Hub: OWNER/NAME")
    private: bool = option(False, "with push=: make a new repository private")


def main(options: Options) -> None:
    from proxynorm.export import export_run

    output = options.output or f"{options.run}/export"
    differences = export_run(options.run, output, options.weights, options.onnx, options.licence)
    for file, difference in differences.items():
        print(f"{output}/{file}: largest difference of the logits {difference:g}")
    if options.push:
        from proxynorm.hub import push

        print(push(output, options.push, options.private))
