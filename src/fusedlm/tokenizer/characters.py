"""One id a character: the tokenizer of small experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fusedlm.tokenizer.files import read_json, write_json
from fusedlm.tokenizer.interface import check_text

CHARACTERS_FILE = "characters.json"


class CharacterTokenizer:
    """A character's id is its place among `characters`. There are no special tokens, and nothing ends a generation.

    Implements fusedlm.tokenizer.interface.Tokenizer.
    Raises ValueError for no characters, for one that is there twice, and for a lone surrogate.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    add_bos = False
    chat_template: str | None = None
    special_tokens: Mapping[str, int] = MappingProxyType({})
    named_tokens: Mapping[str, str] = MappingProxyType({})

    def __init__(self, characters: str) -> None:
        check_text(characters, "characters")
        self._ids = {character: id for id, character in enumerate(characters)}
        if not characters:
            raise ValueError("there are no characters; expected one or more")
        if len(self._ids) < len(characters):
            twice = next(character for i, character in enumerate(characters) if self._ids[character] != i)
            raise ValueError(f"character {_name(twice)} is there twice; expected each once")
        self.characters = characters
        self.vocab_size = len(characters)

    @classmethod
    def from_text(cls, text: str) -> "CharacterTokenizer":
        """The tokenizer of a text's characters, sorted. Raises ValueError for an empty text."""
        check_text(text)
        return cls("".join(sorted(set(text))))

    @classmethod
    def from_directory(cls, directory: Path | str) -> "CharacterTokenizer":
        """The tokenizer that save wrote into a directory. Raises ValueError where the file is missing or broken."""
        path = Path(directory) / CHARACTERS_FILE
        contents = read_json(path)
        if contents.keys() != {"characters"}:
            raise ValueError(f"{path} has the keys {sorted(contents)}; expected characters")
        try:
            return cls(contents["characters"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """The ids of a text; see Tokenizer.encode. Raises ValueError, which names it, for a character without an id."""
        check_text(text)
        if add_bos:
            raise ValueError("add_bos is True, but a character tokenizer has no bos token")
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            place = next(i for i, character in enumerate(text) if character not in self._ids)
        raise ValueError(
            f"character {_name(text[place])} at position {place} is not among the {self.vocab_size} that are known"
        )

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; see Tokenizer.decode."""
        return "".join(self._character(id) for id in ids)

    def token_bytes(self, id: int) -> bytes:
        """The character in UTF-8; see Tokenizer.token_bytes."""
        return self._character(id).encode("utf-8")

    def is_special(self, id: int) -> bool:
        """False: there are no special tokens."""
        return False

    def split_special(self, text: str) -> list[int | str]:
        """The text as one piece: there are no special tokens to cut it at."""
        check_text(text)
        return [text] if text else []

    def save(self, directory: Path) -> None:
        """Write characters.json."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / CHARACTERS_FILE, {"characters": self.characters})

    def _character(self, id: int) -> str:
        # Python would take a negative one from the end.
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"id {id} has no character; ids go from 0 to {self.vocab_size - 1}")
        return self.characters[id]


def _name(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"
