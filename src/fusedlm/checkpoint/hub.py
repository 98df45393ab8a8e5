"""Models of the Hugging Face Hub, by way of huggingface_hub and its own cache."""

import glob
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NoReturn

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from fusedlm.checkpoint.downloads import file_sha256, full_disk, is_full_disk, require_space
from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.huggingface import read_json

_ANSWER_SECONDS = 4.0  # for the Hub's first answer; with the import of its library an unreachable Hub costs under 5 s

_CONFIG = ("config.json", "generation_config.json")
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either will do
_BESIDES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or the same with .index.json and shards; the first there is

_LFS_BLOB = re.compile(r"[0-9a-f]{64}")  # named by the SHA-256 of its content; a small file by its git hash, of 40


def cached_snapshot(repo: str, *, hub_cache: Path | None = None) -> Path | None:
    """The folder of a repository's newest snapshot in the Hub's cache, or None where it is not there or not whole.

    Asks no network and reads no weights.
    """
    try:
        return _snapshot_and_files(repo, hub_cache)[0]
    except CheckpointError:  # an index that cannot be read
        return None


def fetch_snapshot(
    repo: str,
    *,
    offline: bool = False,
    progress: bool = True,
    endpoint: str | None = None,
    hub_cache: Path | None = None,
) -> Path:
    """The folder of a repository's files that a model and its tokenizer need: cached, or else downloaded.

    Files that the cache keeps under their SHA-256 (weights) are verified. endpoint: the Hub's address, where it is
    not huggingface_hub's default. hub_cache: likewise the cache's folder.
    Raises CheckpointError.
    """
    folder, files = _snapshot_and_files(repo, hub_cache)
    if folder is None:
        if offline:
            raise _not_cached(repo, hub_cache)
        info = _ask(repo, endpoint)
        names = _files_to_load(repo, info)
        with _downloading(repo, info, names, progress, hub_cache):
            patterns = [glob.escape(name) for name in names]
            snapshot_download(repo, allow_patterns=patterns, endpoint=endpoint, cache_dir=hub_cache)
        folder, files = _snapshot_and_files(repo, hub_cache)
        if folder is None:
            raise CheckpointError(f"the download of {repo} is not complete; run again to go on with it")
    for file in files:
        _verify(file)
    return folder


def fetch_file(
    repo: str,
    filename: str,
    *,
    offline: bool = False,
    progress: bool = True,
    endpoint: str | None = None,
    hub_cache: Path | None = None,
) -> Path:
    """One file of a repository: cached, or else downloaded; verified as in `fetch_snapshot`. Raises CheckpointError."""
    cached = try_to_load_from_cache(repo, filename, cache_dir=hub_cache)
    if isinstance(cached, str):
        path = Path(cached)
    else:
        if offline:
            raise _not_cached(f"{repo}/{filename}", hub_cache)
        info = _ask(repo, endpoint)
        names = [file.rfilename for file in info.siblings or []]
        if filename not in names:
            near = get_close_matches(filename, names, n=3) or [name for name in names if name.endswith(".gguf")][:8]
            raise CheckpointError(f"{repo} holds no {filename}" + (f"; there are {', '.join(near)}" if near else ""))
        with _downloading(repo, info, [filename], progress, hub_cache):
            path = Path(hf_hub_download(repo, filename, endpoint=endpoint, cache_dir=hub_cache))
    _verify(path)
    return path


def _snapshot_and_files(repo: str, hub_cache: Path | None) -> tuple[Path | None, list[Path]]:
    """The cached snapshot's folder and those of its files that loading reads, or None where one of them is missing."""
    config = try_to_load_from_cache(repo, "config.json", cache_dir=hub_cache)
    if not isinstance(config, str):
        return None, []
    folder = Path(config).parent
    names = {file.name for file in folder.iterdir() if file.is_file()}  # a link to a blob that is gone is no file
    weights = _weights(folder, names)
    tokenizer = _tokenizer(names)
    if not weights or not tokenizer or not names.issuperset(weights):
        return None, []
    return folder, [folder / name for name in (*_CONFIG, *weights, *tokenizer, *_BESIDES) if name in names]


def _tokenizer(names: Collection[str]) -> tuple[str, ...]:
    return next((files for files in _TOKENIZERS if all(name in names for name in files)), ())


def _weights(folder: Path, names: Collection[str]) -> list[str]:
    """The files that hold a snapshot's weights, by its index where it has one; empty where there are none at all."""
    for single in _WEIGHTS:
        index = f"{single}.index.json"
        if single in names:
            return [single]
        if index in names:
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{folder / index} has no weight_map; delete it and try again")
            return [index, *sorted({str(name) for name in weight_map.values()})]
    return []


def _files_to_load(repo: str, info: ModelInfo) -> list[str]:
    """Which of a repository's files to download. Raises CheckpointError where it holds no model that we could load."""
    names = [file.rfilename for file in info.siblings or []]
    weights: list[str] = []
    for single in _WEIGHTS:
        stem, suffix = os.path.splitext(single)
        index = f"{single}.index.json"
        if single in names:
            weights = [single]
        elif index in names:  # which shards, it alone knows; we need not wait for it
            weights = [index, *(n for n in names if n.startswith(f"{stem}-") and n.endswith(suffix))]
        if weights:
            break
    if not weights or "config.json" not in names:
        ggufs = [name for name in names if name.endswith(".gguf")]
        ask = f"; for one of its GGUF files ask for {repo}/{ggufs[0]}" if ggufs else ""
        more = f" (or {', '.join(ggufs[1:9])})" if ggufs[1:] else ""
        raise CheckpointError(
            f"{repo} holds no model in Hugging Face layout; expected config.json and model.safetensors, its shards, or "
            f"pytorch_model.bin{ask}{more}"
        )
    if not _tokenizer(names):
        raise CheckpointError(
            f"{repo} holds no tokenizer that can be read; expected tokenizer.json, or vocab.json and merges.txt"
        )
    wanted = {*_CONFIG, *_BESIDES, *weights, *(name for files in _TOKENIZERS for name in files)}
    return [name for name in names if name in wanted]


def _verify(file: Path) -> None:
    """Raises CheckpointError where a file in the cache has another SHA-256 than the name that the cache gave it."""
    if not file.is_symlink():  # a copy, on a system without links: nothing tells what it should be
        return
    # One step only: the blob may itself be a link, to a store where names are hashes of another kind.
    blob = Path(os.path.normpath(file.parent / os.readlink(file)))
    if blob.parent.name != "blobs" or not _LFS_BLOB.fullmatch(blob.name):
        return
    try:
        digest = file_sha256(blob)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if digest != blob.name:
        raise CheckpointError(
            f"{file.name} is damaged: its SHA-256 is {digest}; expected {blob.name}. Delete {blob} and run again to "
            "download it anew"
        )


def _ask(repo: str, endpoint: str | None) -> ModelInfo:
    """What the Hub says of a repository, or a CheckpointError within seconds.

    A thread that can be left behind: neither a name server that hangs nor a server that accepts and then says
    nothing is sure to end with the request's own timeout.
    """
    answers: SimpleQueue[ModelInfo | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            answers.put(HfApi(endpoint=endpoint).model_info(repo, timeout=_ANSWER_SECONDS, files_metadata=True))
        except Exception as error:  # whatever it is, the one who waits must hear of it
            answers.put(error)

    Thread(target=ask, daemon=True, name="ask the Hub").start()
    try:
        answer = answers.get(timeout=_ANSWER_SECONDS)
    except Empty:
        answer = TimeoutError(f"no answer within {_ANSWER_SECONDS:g} seconds")
    if isinstance(answer, HfHubHTTPError):
        _refused(repo, answer)
    if isinstance(answer, Exception):
        raise CheckpointError(
            f"no {repo} on this disk, and the Hugging Face Hub ({endpoint or constants.ENDPOINT}) cannot be reached: "
            f"{_first_line(answer)}. Check the network and try again"
        ) from answer
    return answer


@contextmanager
def _downloading(
    repo: str, info: ModelInfo, names: Collection[str], progress: bool, hub_cache: Path | None
) -> Iterator[None]:
    """Room made sure of, progress shown as fits, and every failure of a download explained."""
    folder = hub_cache or Path(constants.HF_HUB_CACHE)
    missing = [
        file.size or 0
        for file in info.siblings or []
        if file.rfilename in names
        and not isinstance(try_to_load_from_cache(repo, file.rfilename, cache_dir=hub_cache, revision=info.sha), str)
    ]
    require_space(folder, sum(missing), repo)
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    if progress and not on_terminal:
        print(f"downloading {repo} ({sum(missing) / 1e6:.1f} MB) to {folder}", file=sys.stderr, flush=True)
    try:
        with _progress_bars(progress and on_terminal):
            yield
    except Exception as error:  # the HTTP library under huggingface_hub changed twice, and has errors of its own
        if isinstance(error, OSError) and is_full_disk(error):
            raise full_disk(folder, sum(missing), repo) from error
        # The library's word for "not here, and the Hub did not give it"; the cause says why it did not.
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if isinstance(reason, HfHubHTTPError) and not isinstance(reason, LocalEntryNotFoundError):
            _refused(repo, reason)
        raise CheckpointError(
            f"the download of {repo} broke off: {_first_line(reason)}. Run again to go on with it"
        ) from error


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """The library's progress bars, or none; its setting is one for the process, so it is put back."""
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _refused(repo: str, error: HfHubHTTPError) -> NoReturn:
    """Raise a CheckpointError that says why the Hub refused and what to do."""
    page = f"https://huggingface.co/{repo}"
    status = error.response.status_code
    log_in = "then log in with `hf auth login`"
    said = error.response.headers.get("X-Error-Message", "")
    if isinstance(error, GatedRepoError) or (status == 403 and "disabled" not in said):
        text = f"{repo} is gated: accept its licence at {page}, {log_in} and try again"
    elif "credentials" in said:
        text = "the Hugging Face Hub does not accept your token: log in again with `hf auth login`, or `hf auth logout`"
    elif isinstance(error, RepositoryNotFoundError) or status == 401:
        text = (
            f"no {repo} on this disk, and the Hugging Face Hub has none or does not show it to you: check the name; if "
            f"it is gated or private, ask for access (accept the licence) at {page}, {log_in} and try again"
        )
    else:
        text = f"the Hugging Face Hub refused {repo}: {_first_line(error)}"
    raise CheckpointError(text) from error


def _not_cached(what: str, hub_cache: Path | None) -> CheckpointError:
    return CheckpointError(
        f"{what} is not (or not wholly) in {hub_cache or constants.HF_HUB_CACHE} and offline is set; run once without "
        "--offline to download it"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
