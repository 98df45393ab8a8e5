"""A conversation: messages in the model's chat template, over one cache that is read only once."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedlm.inference.decoder import make_decoder
from fusedlm.inference.generation import TextStream
from fusedlm.inference.language_model import LanguageModel
from fusedlm.tokenizer.chat import render_chat


class ChatSession:
    """A conversation with a model that has a chat template.

    Each `send` reads only what is new since the last: the cache keeps the conversation so far.
    """

    def __init__(self, model: LanguageModel, *, system: str | None = None, context_length: int = 8192) -> None:
        """system: a system message to begin with. context_length: tokens the conversation may take, at most what the
        model can; memory for all of them is set aside.

        Raises ValueError for a model without a chat template, and for a context_length below 1.
        """
        if context_length < 1:
            raise ValueError(f"context_length is {context_length}; expected 1 or more")
        if model.tokenizer is None or model.tokenizer.chat_template is None:
            raise ValueError(f"{model.name or 'this model'} has no chat template; expected an instruct model")
        self.model = model
        self._system = system
        capacity = min(context_length, model.context_length)
        self._decoder = make_decoder(model.model, 1, capacity, threads=model.threads)
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but not the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def send(self, text: str, **options: Any) -> "ChatStream":
        """Say something; returns a stream of the answer's text.

        options: those of `LanguageModel.generate`; max_new_tokens is what the context holds where not given. The
        message and the answer join the conversation when the answer has ended or was stopped.
        Raises ValueError for an empty message, and for a conversation that no longer fits the context.
        """
        if not text.strip():
            raise ValueError("the message is empty; expected some text")
        assert self.model.tokenizer is not None
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = render_chat(self.model.tokenizer, messages)
        options = {"max_new_tokens": None, **options}
        stream = self.model.generate(ids, stream=True, decoder=self._decoder, **options)
        return ChatStream(self, messages, stream)

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON: a list of objects with role and content. Replaces it whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


class ChatStream(TextStream):
    """The stream of an answer; puts it into the conversation when it ends."""

    def __init__(self, session: ChatSession, messages: Sequence[dict[str, str]], stream: TextStream) -> None:
        super().__init__(stream._pieces, stream._batch)
        self._session, self._messages = session, list(messages)

    def __next__(self) -> str:
        try:
            return super().__next__()
        except StopIteration:
            self._remember(self.result.text)
            raise

    def stop(self) -> Any:
        """End the answer here and keep what there is."""
        result = super().stop()
        self._remember(result.text)
        return result

    def _remember(self, text: str) -> None:
        self._session.messages = [*self._messages, {"role": "assistant", "content": text}]
