"""What the rest of fusedlm asks of a tokenizer, and what every tokenizer asks of a text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back. Immutable, so that threads may share one."""

    @property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, where there is one."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, where there is one; among eos_ids."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end a generation."""
        ...

    @property
    def add_bos(self) -> bool:
        """Whether a plain prompt begins with bos_id."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that lays out a chat, where there is one."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens that no plain text encodes to: their text and their id."""
        ...

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """The tokens that have a part to play, as chat templates name them: "bos_token", "eos_token" and so on."""
        ...

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """The ids of a text.

        allow_special: read a special token's text as that token; otherwise it is text like any other.
        add_bos: begin with bos_id; None does as the tokenizer's own add_bos says.
        Raises ValueError for anything but a str, for a lone surrogate (with its position), for a text that the
        vocabulary cannot spell, and for add_bos=True without a bos_id.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id without a token."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for; of a special token, its text. Raises ValueError where there is none."""
        ...

    def is_special(self, id: int) -> bool:
        """Whether the id is one of special_tokens."""
        ...

    def split_special(self, text: str) -> list[int | str]:
        """The text cut at the special tokens in it: their ids, and the text between them (no empty strings)."""
        ...

    def save(self, directory: Path) -> None:
        """Write files that load_tokenizer reads back. Each is written whole or not at all."""
        ...


def check_text(text: object, what: str = "text") -> None:
    """Raise ValueError, which calls the text `what`, unless it is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {type(text).__name__}; expected str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has a lone surrogate, U+{ord(text[error.start]):04X}, at position {error.start}; "
            "expected text that UTF-8 can hold"
        ) from None
