"""Uploads to the Hugging Face hub, and states fetched from there. Nothing that goes wrong here ends a run or loses a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from library.errors import UserError, one_line
from library.training.options import HubOptions


class Uploads:
    """Copies of a run's files in a repository of the hub, with --huggingface_repo_id; without it nothing happens."""

    def __init__(self, options: HubOptions, active: bool = True) -> None:
        """active: whether this process uploads; in a run of several only the main one does."""
        self.options = options
        self.active = active and bool(options.huggingface_repo_id)
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._waiting: list[Future] = []
        self.failed: list[Path] = []

    def prepare(self) -> None:
        """Make the repository if it is not there. A wrong token is reported now, not after hours; the run goes on anyway."""
        if not self.active:
            return
        private = self.options.huggingface_repo_visibility != "public"
        try:
            self._api().create_repo(
                self.options.huggingface_repo_id, repo_type=self.options.huggingface_repo_type, private=private, exist_ok=True
            )
        except Exception as error:  # a hub that cannot be reached must not keep anyone from training
            tqdm.write(f"the hub cannot be used: {self._error_text(error)}; training goes on, files stay in --output_dir")

    def file(self, path: Path, *, last: bool = False) -> None:
        """Upload a file; with --async_upload in the background, except the last one."""
        self._do(lambda: self._upload_file(path), path, wait=last or not self.options.async_upload)

    def state(self, folder: Path) -> None:
        """Upload a folder with a saved state, if --save_state_to_huggingface."""
        if self.options.save_state_to_huggingface:
            self._do(lambda: self._upload_folder(folder), folder, wait=not self.options.async_upload)

    def before_removal(self) -> None:
        """Wait for uploads: a file must not be removed while it is read."""
        self.finish()

    def finish(self) -> None:
        """Wait for all uploads."""
        waiting, self._waiting = self._waiting, []
        for upload in waiting:
            upload.result()

    def _do(self, work: Callable[[], None], path: Path, *, wait: bool) -> None:
        if not self.active:
            return
        self._waiting.append(self._worker.submit(self._quietly, work, path))  # one after the other, in order
        if wait:
            self.finish()

    def _quietly(self, work: Callable[[], None], path: Path) -> None:
        try:
            work()
        except Exception as error:
            self.failed.append(path)
            tqdm.write(f"{path} was not uploaded: {self._error_text(error)}; it stays where it is")

    def _upload_file(self, path: Path) -> None:
        repo, kind = self.options.huggingface_repo_id, self.options.huggingface_repo_type
        self._api().upload_file(path_or_fileobj=path, path_in_repo=self._path_in_repo(path), repo_id=repo, repo_type=kind)
        tqdm.write(f"uploaded {path} to {repo}")

    def _upload_folder(self, folder: Path) -> None:
        repo, kind = self.options.huggingface_repo_id, self.options.huggingface_repo_type
        self._api().upload_folder(folder_path=folder, path_in_repo=self._path_in_repo(folder), repo_id=repo, repo_type=kind)
        tqdm.write(f"uploaded {folder} to {repo}")

    def _path_in_repo(self, path: Path) -> str:
        folder = (self.options.huggingface_path_in_repo or "").strip("/")
        return f"{folder}/{path.name}" if folder else path.name

    def _api(self):
        return hub_api(self.options.huggingface_token)

    def _error_text(self, error: Exception) -> str:
        return error_text(error, self.options.huggingface_token)


def error_text(error: Exception, token: str | None) -> str:
    """An error in one line, without the token."""
    text = one_line(error)
    return text.replace(token, "***") if token else text


def hub_api(token: str | None):
    """The hub's client. HF_ENDPOINT names another server, as everywhere in huggingface_hub."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


@dataclass(frozen=True)
class HubPath:
    """Where a state lies on the hub: `user/repo/path/of/folder`, optionally followed by `:revision` or `:revision:type`."""

    repo: str
    folder: str
    revision: str | None
    kind: str | None

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Raises UserError for another form."""
        path, *suffixes = text.split(":")
        parts = path.strip("/").split("/")
        if len(parts) < 3 or len(suffixes) > 2 or not all(parts):
            raise UserError(
                f"--resume {text} with --resume_from_huggingface: expected user/repo/folder, optionally followed by :revision or "
                ":revision:type"
            )
        revision, kind = (*(suffix or None for suffix in suffixes), None, None)[:2]
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision, kind)


def fetch_state(text: str, token: str | None) -> Path:
    """The local copy of a state on the hub. Raises UserError, naming repository and folder, if it cannot be fetched."""
    source = HubPath.parse(text)
    try:
        fetched = hub_api(token).snapshot_download(
            source.repo, repo_type=source.kind, revision=source.revision, allow_patterns=[f"{source.folder}/*"]
        )
    except Exception as error:
        raise UserError(f"--resume {text}: it cannot be fetched ({error_text(error, token)})") from error
    folder = Path(fetched) / source.folder
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"--resume {text}: the repository {source.repo} has no folder {source.folder}; check path and revision")
    return folder
