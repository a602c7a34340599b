"""The README.md of an export: a model card for the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import EvalResult, ModelCardData

from proxynorm import __version__
from proxynorm.train.run_folder import git

CARD = "README.md"
HERE = '"."'  # the path in the card's example, which runs in the folder of the card
RECIPE = "model norm weights freeze optim schedule regularization data batch norm_batch".split()
RECIPE += ["epochs", "max_steps", "seed"]


def model_card(content: dict[str, Any], onnx: bool, licence: str) -> str:
    """Return the card from the content of config.json. licence: its identifier on the Hub."""
    config, inputs, metrics = content["config"], content["inputs"], content["metrics"]
    names = {key: config[key]["name"] for key in ("model", "norm", "data")}
    templates = [Path(__file__).with_name(name) for name in ("model_card.md", "model_card_onnx.md")]
    card, onnx_load = (template.read_text() for template in templates)
    recipe = {key: config[key] for key in RECIPE if config.get(key) is not None}
    decay = config["regularization"].get("ema_decay")
    averaged = (
        f"moving averages of the weights, decay {decay:g}" if decay else "the weights themselves"
    )
    shape = f"{inputs['channels']}, {inputs['size']}, {inputs['size']}"
    return card.format(
        **metrics,
        **inputs,
        **names,
        front_matter=_front_matter(names, metrics, licence),
        number_of_classes=len(inputs["classes"]),
        shape=shape,
        crop=config["data"].get("eval_ratio", 1.0),
        averaged=averaged,
        recipe="\n".join(f"| {key} | {_cell(value)} |" for key, value in recipe.items()),
        install=_install(),
        folder=HERE,
        licence=licence,
        onnx=", `model.onnx` (inference, proxy constants folded)" if onnx else "",
        onnx_load=onnx_load.format(shape=shape) if onnx else "",
    )


def _front_matter(names: dict[str, str], metrics: dict[str, Any], licence: str) -> str:
    """Return the metadata that the Hub shows: tags, licence, accuracy."""
    accuracy = EvalResult(
        task_type="image-classification",
        dataset_type=names["data"],
        dataset_name=names["data"],
        dataset_split=metrics["split"],
        metric_type="accuracy",
        metric_value=round(metrics["top1"], 2),
    )
    return ModelCardData(
        license=licence,
        library_name="proxynorm",
        pipeline_tag="image-classification",
        tags=["image-classification", "proxy-normalization", names["norm"]],
        model_name=f"{names['model']}.{names['norm']}",
        eval_results=[accuracy],
    ).to_yaml()


def _cell(value: Any) -> str:
    """Format a value of the recipe; for a group, its name and the keys that are set."""
    if not isinstance(value, dict):
        return json.dumps(value)
    given = {key: item for key, item in value.items() if item and key != "name"}
    words = ", ".join(f"{key}={json.dumps(item)}" for key, item in given.items())
    return f"{value['name']}: {words}" if words else value["name"]


def _install() -> str:
    """Return a command that installs this version or, if its address is unknown, a sentence."""
    # pip records the origin of a distribution in direct_url.json (PEP 610).
    try:
        text = metadata.distribution("proxynorm").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        text = None
    origin = json.loads(text or "{}")
    if "vcs_info" in origin:
        address = _published(origin["url"], origin["vcs_info"]["commit_id"])
    else:
        address = _published(git("remote", "get-url", "origin"), git("rev-parse", "HEAD"))
    if address is not None:
        return f"```bash\npip install 'proxynorm[train] @ git+{address}'\n```"
    return (
        f"Install proxynorm {__version__} with its extra `[train]` from the clone or wheel "
        "that you have: where\nthis card was written, no address of its repository was known. "
        "The package index has another\nproject of that name."
    )


def _published(url: str | None, commit: str | None) -> str | None:
    """Return a repository's address for pip, without secrets; None if it is local."""
    url = url or ""
    if match := re.fullmatch(r"(\w+@[\w.-]+):(.+)", url):
        url = f"ssh://{match[1]}/{match[2]}"  # pip does not accept git's short form
    parts = urlsplit(url)
    if parts.scheme not in ("https", "ssh") or not parts.hostname or commit is None:
        return None
    user = f"{parts.username}@" if parts.scheme == "ssh" and parts.username else ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{user}{parts.hostname}{port}{parts.path}@{commit}"
