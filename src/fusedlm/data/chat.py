"""Chats as tokens, and which of them are the assistant's: those alone become targets."""

from collections.abc import Mapping, Sequence
from typing import Any

from fusedlm.tokenizer.chat import ChatTemplate
from fusedlm.tokenizer.interface import Tokenizer

# Llama 3's templates write today's date unless told one; the same chats must give the same tokens on every day.
_VARIABLES = {"date_string": "26 Jul 2024"}


class ChatEncoder:
    """Lays out chats by a tokenizer's template. Raises ValueError where it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """The ids of a chat, and for each whether it is part of an answer.

        An answer is what the assistant writes: from where the template puts the answer to the messages before it, up to
        and with the token that ends it. What the template writes after that (a line end, say) is nobody's answer.
        Raises ValueError for messages that the template refuses, and for a template that lays out the beginning of a
        chat in another way once more messages follow (some drop earlier reasoning): there, what the model would be
        asked and what it would be taught differ.
        """
        ids = self._template.ids(messages, add_generation_prompt=False, **_VARIABLES)
        mask = [False] * len(ids)
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            # A template takes one message or more: where nothing was asked, all of it counts as the answer.
            begin = self._common(ids, messages[:i], i, prompt=True) if i else 0
            end = len(ids) if i + 1 == len(messages) else self._common(ids, messages[: i + 1], i, prompt=False)
            ending = [j for j in range(begin, end) if ids[j] in self._tokenizer.eos_ids]
            for j in range(begin, ending[-1] + 1 if ending else end):
                mask[j] = True
        return ids, mask

    def _common(self, ids: list[int], messages: Sequence[Mapping[str, Any]], i: int, *, prompt: bool) -> int:
        """How many of a chat's ids the layout of its first messages shares.

        The last few may differ, where the tokenizer makes one token of the end of the one and the beginning of the
        next; the bytes must not.
        """
        part = self._template.ids(messages, add_generation_prompt=prompt, **_VARIABLES)
        n = next((j for j, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b), min(len(part), len(ids)))
        rest = b"".join(map(self._tokenizer.token_bytes, part[n:]))
        there = b""
        for id in ids[n:]:
            if len(there) >= len(rest):
                break
            there += self._tokenizer.token_bytes(id)
        if not there.startswith(rest):
            raise ValueError(
                f"the chat template lays out the chat up to message {i} in another way when more follows: "
                f"{rest[:60].decode(errors='replace')!r} becomes {there[:60].decode(errors='replace')!r}. Expected a "
                "template that only adds; shorten the chats to one answer, or give the tokenizer another template"
            )
        return n
