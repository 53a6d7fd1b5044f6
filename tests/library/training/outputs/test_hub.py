"""Uploads against a stand-in for the hub on this machine, through the real huggingface_hub."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_runs import AfterStep, image_folder, train, use_two_blocks, words_of_a_run

from library.errors import UserError
from library.training.options import HubOptions
from library.training.outputs.hub import HubPath, Uploads, fetch_state

TOKEN = "hf_secretsecretsecret"
COMMIT = "a" * 40


class StandIn(BaseHTTPRequestHandler):
    """The few calls of the hub's API that uploading and fetching make. `server.files`: what was uploaded."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.path, self.headers.get("Authorization")))
        if self.server.refuses:
            return self.answer({"error": f"Invalid credentials {TOKEN}"}, 401)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.address}/me/loras", "name": "me/loras", "id": "me/loras"})
        if "/preupload/" in self.path:
            self.server.may_go.wait(1)
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.address}/me/loras/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        if self.server.refuses:
            return self.answer({"error": "Invalid credentials"}, 401)
        names = [{"rfilename": name} for name in self.server.files]
        if "/resolve/" in self.path:
            return self.file()
        if "/tree/" in self.path:
            return self.answer(
                [{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in self.server.files.items()]
            )
        self.answer({"id": "me/loras", "sha": COMMIT, "siblings": names, "tags": [], "private": True, "downloads": 0, "likes": 0})

    do_HEAD = do_GET

    def file(self) -> None:
        content = self.server.files[self.path.split("/resolve/")[1].split("/", 1)[1]]
        self.send_response(200)
        for name, value in {
            "Content-Length": len(content),
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self, content, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.files, server.calls, server.created, server.refuses = {}, [], [], False
    server.may_go = threading.Event()  # uploads wait for it
    server.may_go.set()
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # so long takes its shutdown
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()


@pytest.fixture
def lora(tmp_path) -> Path:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"weights")
    return path


def uploads(**more) -> Uploads:
    return Uploads(HubOptions(huggingface_repo_id="me/loras", huggingface_token=TOKEN, **more))


@pytest.mark.option("huggingface_path_in_repo")
def test_a_file_goes_into_its_folder_of_a_private_repository(hub, lora, capsys):
    copies = uploads(huggingface_path_in_repo="cats/")
    copies.prepare()
    copies.file(lora)
    assert hub.files == {"cats/mine.safetensors": b"weights"} and hub.created[0]["visibility"] == "private"
    assert all(token == f"Bearer {TOKEN}" for _, token in hub.calls)
    printed = capsys.readouterr()
    assert f"uploaded {lora} to me/loras" in printed.out and TOKEN not in printed.out + printed.err


@pytest.mark.option("huggingface_repo_type", "huggingface_repo_visibility")
def test_public_and_without_a_folder(hub, lora):
    copies = uploads(huggingface_repo_visibility="public", huggingface_repo_type="dataset")
    copies.prepare()
    copies.file(lora)
    assert hub.created[0]["visibility"] == "public" and hub.created[0]["type"] == "dataset"
    assert list(hub.files) == ["mine.safetensors"]


@pytest.mark.option("async_upload")
def test_in_the_background_all_arrive_before_the_end_and_before_a_removal(hub, tmp_path):
    copies = uploads(async_upload=True)
    hub.may_go.clear()
    paths = [tmp_path / f"mine-{number}.safetensors" for number in range(3)]
    for path in paths:
        path.write_bytes(path.name.encode())
        copies.file(path)
    assert not hub.files
    hub.may_go.set()  # who waited for an upload until here has seen it end without having begun
    copies.before_removal()
    assert sorted(hub.files) == [path.name for path in paths]


def test_a_hub_that_refuses_ends_no_run_and_loses_no_file_and_the_token_is_not_shown(hub, lora, capsys):
    hub.refuses = True
    copies = uploads()
    copies.prepare()
    copies.file(lora, last=True)
    printed = "".join(capsys.readouterr())
    assert copies.failed == [lora] and lora.read_bytes() == b"weights"
    assert "the hub cannot be used" in printed and f"{lora} was not uploaded" in printed and TOKEN not in printed


def test_nothing_happens_without_a_repository_or_on_another_process(hub, lora):
    for quiet in (Uploads(HubOptions()), Uploads(HubOptions(huggingface_repo_id="me/loras"), active=False)):
        quiet.prepare()
        quiet.file(lora)
        quiet.finish()
    assert hub.calls == []


def test_a_state_comes_back_as_it_went(hub, tmp_path):
    folder = tmp_path / "mine-state"
    folder.mkdir()
    (folder / "state.json").write_text("{}", encoding="utf-8")
    (folder / "optimizer.safetensors").write_bytes(b"moments")
    uploads(huggingface_path_in_repo="runs", save_state_to_huggingface=True).state(folder)
    fetched = fetch_state("me/loras/runs/mine-state", TOKEN)
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    with pytest.raises(UserError, match="has no folder runs/other"):
        fetch_state("me/loras/runs/other", TOKEN)


@pytest.mark.option("huggingface_token", "resume_from_huggingface", "save_state_to_huggingface", "huggingface_repo_id")
def test_a_run_leaves_its_files_on_the_hub_and_goes_on_from_there_and_the_token_is_nowhere(hub, monkeypatch, tmp_path, capsys):
    use_two_blocks(monkeypatch.setattr)
    images, shared = (
        image_folder(tmp_path / "images", 2),
        ["--huggingface_repo_id=me/loras", f"--huggingface_token={TOKEN}"],
    )
    train(words_of_a_run(
        images, tmp_path / "first", "--max_train_steps=2", "--save_state", "--save_state_to_huggingface", "--log_config",
        f"--logging_dir={tmp_path / 'first' / 'logs'}", *shared,
    ))  # fmt: skip
    assert {"mine.safetensors", "mine-state/state.json"} <= set(hub.files)
    assert hub.files["mine.safetensors"] == (tmp_path / "first" / "mine.safetensors").read_bytes()
    assert all(token == f"Bearer {TOKEN}" for _, token in hub.calls)
    words = ["--max_train_steps=3", "--resume=me/loras/mine-state", "--resume_from_huggingface", *shared]
    done = []
    train(words_of_a_run(images, tmp_path / "second", *words), AfterStep(lambda run: done.append(run.loop.progress.step)))
    assert done == [3], "the run went on after its second step"
    written = [path for name in ("first", "second") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in "".join(capsys.readouterr())


def test_places_of_states():
    assert HubPath.parse("me/loras/runs/a:main:dataset") == HubPath("me/loras", "runs/a", "main", "dataset")
    assert HubPath.parse("me/loras/a") == HubPath("me/loras", "a", None, None)
    for wrong in ("me/loras", "loras", "me/loras/a:b:c:d", "me//a"):
        with pytest.raises(UserError, match="expected user/repo/folder"):
            HubPath.parse(wrong)
