"""Write a run's model as safetensors, config and model card, and as ONNX: python scripts/export.py run=DIR onnx=true"""

from __future__ import annotations

from dataclasses import dataclass

from proxynorm.cli import option, script
from proxynorm.errors import ConfigError


@dataclass
class Options:
    run: str = option("", "run folder; required")
    output: str = option("", "folder of the files; none given: RUN/export")
    weights: str = option("last", "last or best")
    licence: str = option("mit", "of the weights, for the model card")
    onnx: bool = option(False, "also model.onnx, checked with onnxruntime")


def main(options: Options) -> int:
    from proxynorm.export import export_run

    if not options.run:
        raise ConfigError("run=FOLDER must be given")
    output = options.output or f"{options.run}/export"
    for file, difference in export_run(
        options.run, output, options.weights, options.onnx, options.licence
    ).items():
        print(f"{output}/{file}: largest difference of the logits {difference:g}")
    return 0


if __name__ == "__main__":
    script(Options, main, __doc__)
