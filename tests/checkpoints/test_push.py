"""save_model(push_to_hub=): what was saved arrives at a hub, here one of our own; what keeps it from there is said."""

import base64
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from exports import TOKENIZER, wide
from huggingface_hub import constants

from llmdrop import DropPlan, load_model, save_model

TOKEN = "hf_good"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload needs. repositories: {id: {path: content}}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.read_only = False
        self.broken = False
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, content, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_request(self) -> None:
        hub = self.server
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        if hub.broken:
            return self.answer({"error": "the hub is being repaired"}, 500)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid user token."}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        if hub.read_only:
            return self.answer({"error": "You don't have the rights to do this"}, 403)
        if path == "/api/validate-yaml":  # the card's metadata
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            url = {"url": f"{hub.address}/{name}"}
            if name in hub.repositories:
                return self.answer({"error": "You already created this model repo"} | url, 409)
            hub.repositories[name] = {}
            return self.answer(url)
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/.*)?)?", path)
        files = hub.repositories[found[1]]
        if found[2] == "preupload":
            paths = [file["path"] for file in json.loads(sent)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if found[2] == "commit":
            for entry in map(json.loads, sent.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            made = {"commitUrl": f"{hub.address}/{found[1]}/commit/0", "commitOid": "0" * 40}
            return self.answer(made | {"success": True})
        if found[2] == "tree":
            rows = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            return self.answer(rows)
        return self.answer({"id": found[1], "sha": "0" * 40, "siblings": [{"rfilename": name} for name in files]})

    do_GET = do_POST = handle_request


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def contents(path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
def test_what_was_saved_arrives(format, hub, tmp_path):
    model = wide(DropPlan([1, 3]))
    path = save_model(model, TOKENIZER, tmp_path / "smaller", format=format, push_to_hub="me/smaller")
    assert hub.repositories == {"me/smaller": contents(path)} and "README.md" in hub.repositories["me/smaller"]
    there = tmp_path / "there"
    for name, data in hub.repositories["me/smaller"].items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(data)
    assert load_model(there, device="cpu")[0].num_parameters() == model.num_parameters()


def test_a_gguf_arrives_under_a_name_of_ones_own(hub, tmp_path):
    path = save_model(wide(), TOKENIZER, tmp_path / "m.gguf", format="gguf", push_to_hub="smaller")
    assert hub.repositories == {"me/smaller": {"m.gguf": path.read_bytes()}}


def test_nothing_is_asked_of_the_hub_by_default(hub, tmp_path):
    save_model(wide(), TOKENIZER, tmp_path / "smaller")
    assert not hub.asked


def test_what_is_on_the_hub_is_replaced_on_request_only(hub, tmp_path):
    former = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"old", "notes.md": b"mine"}
    hub.repositories["me/smaller"] = dict(former)
    with pytest.raises(FileExistsError, match="cannot push 'me/smaller' .*has it already.* saved in .*first$"):
        save_model(wide(), TOKENIZER, tmp_path / "first", push_to_hub="me/smaller")
    assert hub.repositories["me/smaller"] == former
    path = save_model(wide(), TOKENIZER, tmp_path / "first", overwrite=True, push_to_hub="me/smaller")
    assert hub.repositories["me/smaller"] == contents(path) | {"notes.md": b"mine"}, "old shards would be read, too"


def no_token(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


def no_network(hub, monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


BEFORE = {  # what keeps a push from the hub, what is raised, what is said
    "no token": (no_token, PermissionError, "there is no token; run `hf auth login`"),
    "wrong token": (lambda hub, m, p: m.setenv("HF_TOKEN", "hf_bad"), PermissionError, "does not know this token"),
    "offline": (lambda hub, m, p: m.setattr(constants, "HF_HUB_OFFLINE", True), ConnectionError, "HF_HUB_OFFLINE"),
    "no network": (no_network, ConnectionError, "it is out of reach"),
    "broken": (lambda hub, m, p: setattr(hub, "broken", True), OSError, "it answers 500 .*being repaired"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_what_is_known_beforehand_is_said_before_anything_is_saved(case, hub, tmp_path, monkeypatch):
    arrange, kind, says = BEFORE[case]
    arrange(hub, monkeypatch, tmp_path)
    with pytest.raises(kind, match=f"cannot push 'me/smaller' to the hub: .*{says}") as raised:
        save_model(wide(), TOKENIZER, tmp_path / "smaller", push_to_hub="me/smaller")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    assert not (tmp_path / "smaller").exists() and not hub.repositories


def test_without_the_right_to_write_it_is_saved_all_the_same(hub, tmp_path):
    hub.read_only = True
    with pytest.raises(PermissionError, match="may not write there; .*; it is saved in .*smaller$"):
        save_model(wide(), TOKENIZER, tmp_path / "smaller", push_to_hub="others/smaller")
    assert load_model(tmp_path / "smaller", device="cpu")


@pytest.mark.parametrize("name", ["a/b/c", "", "white space", "me/"])
def test_a_name_that_no_hub_has(name, hub, tmp_path):
    with pytest.raises(ValueError, match="is no name on the hub; expected owner/name"):
        save_model(wide(), TOKENIZER, tmp_path / "smaller", push_to_hub=name)
    assert not hub.asked and not (tmp_path / "smaller").exists()
