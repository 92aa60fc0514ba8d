"""Upload a saved model to the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

ANSWERS = {  # of the hub, by HTTP status
    401: (PermissionError, "the hub does not know this token; run `hf auth login` again or set another HF_TOKEN"),
    403: (PermissionError, "this token may not write there; use one with write access, or a name of your own"),
    409: (FileExistsError, "the hub has it already; overwrite=True replaces the model in it, or choose another name"),
}


def check_can_push(name: str) -> None:
    """Find out beforehand what would keep a model from the hub; name: "owner/name", or a name of one's own.

    Raises ValueError for what is no such name, PermissionError without a token that the hub knows, ConnectionError in
    offline mode and where the hub is out of reach.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name on the hub; expected owner/name, or a name of your own") from error
    with _explained(name):
        HfApi().whoami()


def push(path: Path, name: str, overwrite: bool = False) -> str:
    """Upload a saved directory or GGUF into the model repository `name`, made if need be; returns its address.

    Raises what `check_can_push` raises, PermissionError without the right to write there, FileExistsError where the
    repository exists (overwrite=True replaces the model in it), OSError for any other answer of the hub.
    """
    api = HfApi()
    with _explained(name, f"; it is saved in {path}"):
        repo = api.create_repo(name, exist_ok=overwrite)
        message = "Saved by llmdrop"
        if path.is_file():
            api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo.repo_id, commit_message=message)
        else:
            former = ["model*.safetensors", "model.safetensors.index.json"] if overwrite else None
            api.upload_folder(folder_path=path, repo_id=repo.repo_id, commit_message=message, delete_patterns=former)
    return str(repo)


@contextmanager
def _explained(name: str, end: str = "") -> Iterator[None]:
    """Whatever the hub's client raises becomes one sentence."""
    try:
        yield
    except Exception as error:  # transport errors have no common class across releases
        kind, reason = _reason(error)
        raise kind(f"cannot push {name!r} to the hub: {reason}{end}") from error


def _reason(error: Exception) -> tuple[type[OSError], str]:
    if isinstance(error, LocalTokenNotFoundError):
        return PermissionError, "there is no token; run `hf auth login`, or set HF_TOKEN to one with write access"
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError, "HF_HUB_OFFLINE forbids it; unset that"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        says = " ".join((error.server_message or str(error)).split())[:300]
        return ANSWERS.get(status, (OSError, f"it answers {status} ({says})"))
    return ConnectionError, f"it is out of reach ({' '.join(str(error).split())[:300] or type(error).__name__})"
