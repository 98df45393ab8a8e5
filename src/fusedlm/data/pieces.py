"""The pieces that documents are read in, so that memory stays small and every core has work.

A long text is cut at a line end between two characters that are no white space. GPT-2's, Llama 3's and SmolLM2's splits
end a piece of text there anyway, so tokens are those of the whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PIECE = 1 << 19  # characters

Content = str | list[Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document or a part of one.

    content: text, or the messages of a chat. where: how errors name it. place: JSON from which a source's `read` goes
    on behind this piece; None where that is not possible. done: bytes of the source read so far.
    """

    content: Content
    where: str
    first: bool = True
    last: bool = True
    place: Any = None
    done: int = 0


def place_to_cut(text: str) -> int:
    """How much of a text longer than PIECE the first piece takes: see the module's docstring.

    Where the second half of the piece has no such line end, before a space between two characters that are none
    (which those splits allow too), and where it has none either, at PIECE characters.
    """
    for mark, behind in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, PIECE // 2, PIECE)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + behind
            at = text.rfind(mark, PIECE // 2, at)
    return PIECE


def pieces_of(content: Content, where: str, place: Any, done: int) -> Iterator[Piece]:
    """The pieces of one document that is in memory; only behind the last can reading go on, at `place`."""
    first = True
    if isinstance(content, str):
        while len(content) > PIECE:
            cut = place_to_cut(content)
            yield Piece(content[:cut], where, first, False, None, done)
            content, first = content[cut:], False
    yield Piece(content, where, first, True, place, done)
