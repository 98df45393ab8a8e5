"""The tokenizer to prepare with, by path or by name: only its files are fetched, never a model's weights."""

from pathlib import Path

from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.sources import NAMED, HubRepository, resolve
from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.tokenizer.load import load_tokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def find_tokenizer(
    name: str, *, offline: bool = False, cache_dir: Path | None = None, endpoint: str | None = None
) -> Tokenizer:
    """A tokenizer by a folder or a .gguf file, by a model's name, or by owner/name on the Hugging Face Hub.

    offline: never touch the network. cache_dir: see `checkpoint.sources.resolve`. endpoint: the Hub's address, where it
    is not the default. Raises ValueError where there is none, or it cannot be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return load_tokenizer(path)
    named = NAMED.get(name)
    repository = named.source.name if named is not None and isinstance(named.source, HubRepository) else name
    if not path.exists() and (named is None or repository != name) and repository.count("/") == 1:
        return _of_repository(repository, offline, endpoint)
    path = resolve(name, offline=offline, cache_dir=cache_dir)
    if path.is_dir():
        return load_tokenizer(path)
    from fusedlm.checkpoint.gguf import GGUFFile
    from fusedlm.tokenizer.gguf import bpe_from_gguf

    return bpe_from_gguf(GGUFFile(path).metadata)


def _of_repository(repository: str, offline: bool, endpoint: str | None) -> BPETokenizer:
    from fusedlm.checkpoint.hub import fetch_file

    path = fetch_file(repository, _FILES[0], offline=offline, progress=False, endpoint=endpoint)
    for file in _FILES[1:]:
        try:
            fetch_file(repository, file, offline=offline, progress=False, endpoint=endpoint)
        except CheckpointError as error:
            if "holds no" not in str(error) and not offline:
                raise
    return BPETokenizer.from_directory(path.parent)
