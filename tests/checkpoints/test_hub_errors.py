"""A model that the hub does not give: one sentence says whether it is misspelt, gated or private, or out of reach."""

from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import hub as transformers_hub

from llmdrop import load_model
from llmdrop.streaming import shards


def answered(kind, status):
    return kind(f"{status} Client Error", response=SimpleNamespace(status_code=status, headers={}, request=None))


def unreachable(cause):
    error = LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    error.__cause__ = cause
    return error


MISSPELT = "name is misspelt, or it is private"
GATED = "it is gated"
NO_REVISION = "not this revision"
NO_NETWORK = "no network to the hub"
REASONS = (MISSPELT, GATED, NO_REVISION, NO_NETWORK)
CASES = [
    (answered(RepositoryNotFoundError, 401), MISSPELT),
    (answered(RepositoryNotFoundError, 404), MISSPELT),
    (answered(GatedRepoError, 401), GATED),
    (answered(GatedRepoError, 403), GATED),
    (answered(RevisionNotFoundError, 404), NO_REVISION),
    (unreachable(ConnectionError("no route to host")), NO_NETWORK),
    (unreachable(TimeoutError("timed out")), NO_NETWORK),
    (unreachable(answered(HfHubHTTPError, 503)), NO_NETWORK),
    (unreachable(None), NO_NETWORK),
    (unreachable(OfflineModeIsEnabled("offline mode is enabled")), NO_NETWORK),
]


@pytest.mark.parametrize("error, reason", CASES)
@pytest.mark.parametrize("loader", ["transformers", "streaming"])
def test_the_reason_is_named_and_no_other(error, reason, loader, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*args, **kwargs):
        raise error

    if loader == "transformers":
        monkeypatch.setattr(transformers_hub, "hf_hub_download", refuse)
        load = load_model
    else:
        monkeypatch.setattr(shards, "snapshot_download", refuse)
        load = shards.open_checkpoint
    with pytest.raises(FileNotFoundError, match=f"cannot (load|get) 'me/tiny': .*{reason}") as raised:
        load("me/tiny")
    message = str(raised.value)
    assert [other for other in REASONS if other in message] == [reason]
    assert "\n" not in message and len(message) < 350


def test_what_the_hub_says_beyond_these_is_passed_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise answered(HfHubHTTPError, 451)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match="cannot load 'me/tiny': .*451"):
        load_model("me/tiny")
