"""The upload of a folder to the hub."""

from __future__ import annotations

from pathlib import Path

from clpl_moe.common.errors import OptionError, UserError, one_line


def check_name(name: str) -> None:
    """Raise :class:`OptionError` for what cannot be the name of a model on the hub: before the work, not after it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError("push_to_hub", one_line(error)) from None


def upload(folder: Path, name: str, revision: str | None, private: bool) -> str:
    """Upload a folder; returns the address of the commit.

    Raises:
        UserError: the hub cannot be reached or does not take it. The folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message="Upload a model with clpl_moe"
        )
    except Exception as error:  # of the hub, of the network, of the library for it, which changes
        hint = f"{folder} is complete: `hf auth login` or HF_TOKEN, then `hf upload {name} {folder}`"
        raise UserError(f"push_to_hub: {type(error).__name__}: {one_line(error)}; {hint}") from None
    return commit.commit_url
