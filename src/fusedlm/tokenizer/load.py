"""Load whichever tokenizer a directory holds."""

from pathlib import Path

from fusedlm.tokenizer.bpe import BPETokenizer
from fusedlm.tokenizer.characters import CHARACTERS_FILE, CharacterTokenizer
from fusedlm.tokenizer.huggingface import has_bpe_files, looked_for
from fusedlm.tokenizer.interface import Tokenizer


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds the files of any tokenizer."""
    return (directory / CHARACTERS_FILE).exists() or has_bpe_files(directory)


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer in a directory: of Hugging Face files, of GPT-2's two, or of characters.

    Raises ValueError where there is none (it lists what was looked for), more than one, or a broken one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    characters, bpe = (directory / CHARACTERS_FILE).exists(), has_bpe_files(directory)
    if characters and bpe:
        raise ValueError(f"{directory} has both {CHARACTERS_FILE} and a BPE tokenizer's files; expected one tokenizer")
    if characters:
        return CharacterTokenizer.from_directory(directory)
    if bpe:
        return BPETokenizer.from_directory(directory)
    raise ValueError(f"{directory} holds no tokenizer: looked for {looked_for()}, or {CHARACTERS_FILE}")
