"""Upload an export to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

import proxynorm
from proxynorm.errors import ConfigError
from proxynorm.loading import CONFIG, HUB, WEIGHTS, load_export
from proxynorm.model_card import CARD, HERE

FILES = (WEIGHTS, CONFIG, "model.onnx", "model.onnx.data")


def push(folder: str | Path, repo_id: str, private: bool = False, api: HfApi | None = None) -> str:
    """Upload an export folder to the Hub's repository OWNER/NAME and return its address.

    The repository is created if needed. An existing README.md is kept, as in timm's push_to_hf_hub.
    Raises CheckpointError if the folder does not load; ConfigError if there is no token or the Hub
    refuses.
    """
    folder = Path(folder)
    load_export(folder)
    if api is None and get_token() is None:
        raise ConfigError(f"push={repo_id}: no token; run hf auth login, or set HF_TOKEN")
    api = api or HfApi(library_name="proxynorm", library_version=proxynorm.__version__)
    try:
        # The Hub adds the owner if it is left out.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        names = [name for name in FILES if (folder / name).is_file()]
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        if not api.file_exists(repo_id, CARD):
            card = (folder / CARD).read_text().replace(HERE, f'"{HUB}{repo_id}"')
            operations.append(CommitOperationAdd(CARD, card.encode()))
        api.create_commit(repo_id, operations, commit_message="Add model")
    except Exception as error:  # the client raises errors of its HTTP library, whichever that is
        raise ConfigError(f"push={repo_id}: {' '.join(str(error).split())[:200]}") from error
    return f"https://huggingface.co/{repo_id}"
