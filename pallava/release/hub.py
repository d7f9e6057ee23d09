"""Publishes a folder on the Hugging Face Hub: plans first, uploads only on request."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pallava.folder_build import MANIFEST_NAME, read_manifest
from pathcore.files import StrPath, sha256_of


@dataclass(frozen=True)
class PushPlan:
    """Files to upload, with their sizes in bytes."""

    repository: str
    files: dict[str, int]


def plan_push(folder: StrPath, repository: str) -> PushPlan:
    """Checks that a folder is complete and lists what a push would upload.

    Args:
        folder: Folder written by `xtuner-add export` or `merge`.
        repository: Repository on the Hub, as `owner/name`.

    Raises:
        FileNotFoundError: If the folder is not a finished release.
        ValueError: If a file is missing or was changed, or the repository name is invalid.
    """
    folder = Path(folder)
    inputs, rows = read_manifest(folder)
    if inputs is None or folder.name.endswith(".partial"):
        raise FileNotFoundError(
            f"{folder}: no finished release (expected {MANIFEST_NAME}); write it with `xtuner-add "
            "export`"
        )
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"repository {repository!r}: expected owner/name")
    for name, row in rows.items():
        path = folder / name
        # The model card may have been edited by hand.
        if not path.is_file() or (name != "README.md" and sha256_of(path) != row["sha256"]):
            raise ValueError(f"{path}: is missing or changed since it was written; export again")
    return PushPlan(repository, {name: (folder / name).stat().st_size for name in sorted(rows)})


def push(folder: StrPath, plan: PushPlan, *, private: bool = True) -> str:
    """Uploads a folder to the Hub with the token of the environment variable HF_TOKEN.

    Returns:
        URL of the commit.

    Raises:
        ValueError: If there is no token in the environment.
    """
    from huggingface_hub import HfApi

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ValueError("HF_TOKEN: set this environment variable to a token with write access")
    api = HfApi(token=token)
    api.create_repo(plan.repository, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=plan.repository, folder_path=os.fspath(folder), allow_patterns=sorted(plan.files)
    )
    return str(commit)
