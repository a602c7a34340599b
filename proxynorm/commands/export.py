"""Write a run's model as safetensors, config.json and model card, and as ONNX.

python scripts/export.py run=runs/NAME onnx=true
"""

from __future__ import annotations

from dataclasses import dataclass

from proxynorm.cli import option


@dataclass
class Options:
    run: str = option("???", "run folder")
    output: str = option("", "folder of the files; none given: RUN/export")
    weights: str = option("last", "last or best")
    licence: str = option("mit", "of the weights, for the model card")
    onnx: bool = option(False, "also model.onnx, checked with onnxruntime")
    push: str | None = option(None, "upload to this repository of the Hugging Face Hub: OWNER/NAME")
    private: bool = option(False, "push=: make the repository private, if it is new")


def main(options: Options) -> None:
    from proxynorm.export import export_run

    output = options.output or f"{options.run}/export"
    found = export_run(options.run, output, options.weights, options.onnx, options.licence)
    for file, difference in found.items():
        print(f"{output}/{file}: largest difference of the logits {difference:g}")
    if options.push:
        from proxynorm.hub import push

        print(push(output, options.push, options.private))
