"""Text as its tokens arrive, never half a character."""

import codecs

from fusedlm.tokenizer.interface import Tokenizer


class IncrementalDecoder:
    """Decodes one id at a time: all that push and finish return is, joined, what Tokenizer.decode gives for the ids.

    A character whose bytes are spread over several tokens comes with the last of them; bytes that can no longer become
    UTF-8 come as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that are whole with this id. Raises ValueError for an id without a token."""
        if self._skip_special and self._tokenizer.is_special(id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left: U+FFFD for a character cut short, else nothing. A new text can then begin."""
        return self._decoder.decode(b"", final=True)
