"""As much of the Hugging Face Hub, on this machine, as downloading a model takes."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fake_server import FakeHandler

CONFIG = {"config.json": b'{"model_type": "llama"}'}
TOKENIZER = {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b'{"model_max_length": 9}'}
WEIGHTS = bytes(range(256)) * 1000
WHOLE = {**CONFIG, **TOKENIZER, "model.safetensors": WEIGHTS}
LARGE = (".safetensors", ".bin", ".gguf")  # what the Hub keeps apart and names by its SHA-256


@dataclass
class Repository:
    """refuse: (status, headers) for the files. refuse_info: likewise for what is asked of the repository itself.
    cut: send half of a large file, then nothing more."""

    files: dict[str, bytes]
    refuse: tuple[int, dict[str, str]] | None = None
    refuse_info: tuple[int, dict[str, str]] | None = None
    cut: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class FakeHub:
    """As much of the Hub's HTTP interface as huggingface_hub asks for a model."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def files_sent(self) -> set[str]:
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for path in self.requests
            if "GET" in path and "/resolve/" in path
        }


def etag(name: str, content: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubHandler(FakeHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            self.answer(404, {"X-Error-Code": "RepoNotFound"})
        elif is_api:
            self.info("/".join(parts[:2]), repository, tree="tree" in parts)
        else:
            self.file(repository, "/".join(parts[4:]))

    def info(self, name: str, repository: Repository, *, tree: bool) -> None:
        if repository.refuse_info is not None:
            self.answer(*repository.refuse_info)
            return
        entries = []
        for path, content in repository.files.items():
            tag, size = etag(path, content), len(content)
            lfs = {"lfs": {"sha256": tag, "oid": tag, "size": size, "pointerSize": 130}} if len(tag) == 64 else {}
            what = {"type": "file", "path": path, "oid": "0" * 40} if tree else {"rfilename": path, "blobId": "0" * 40}
            entries.append({**what, "size": size, **lfs})
        about = {"id": name, "modelId": name, "sha": repository.commit, "siblings": entries, "private": False}
        body = json.dumps(entries if tree else {**about, "tags": [], "downloads": 0, "likes": 0}).encode()
        self.answer(200, {"Content-Type": "application/json"}, body)

    def file(self, repository: Repository, path: str) -> None:
        content = repository.files.get(path)
        if content is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
            return
        if repository.refuse is not None:
            self.answer(*repository.refuse)
            return
        headers = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stop = len(content) // 2 if repository.cut and path.endswith(LARGE) else len(content)
        self.answer(206 if start else 200, headers, content[start:stop], length=len(content) - start)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
