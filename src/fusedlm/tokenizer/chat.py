"""Chats laid out by a tokenizer's own template, in which what people write can never act as a control token.

Templates are Jinja, as Hugging Face defined them for transformers.apply_chat_template. They come with a model, from
anywhere, so they run in Jinja's sandbox. What people write may contain a control token's text, `<|im_end|>` say, which
must stay text: before the template runs, each such text is replaced by a private-use character that stands in for it,
and put back once the control tokens that the template itself wrote have been found.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusedlm.tokenizer.interface import Tokenizer, check_text

# Far above what a template of a long chat needs, and reached in a few seconds.
_MAX_STEPS = 250_000
_MAX_CHARACTERS = 1 << 26
_MAX_BITS = 4096

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """The ids of a chat. To render many, keep a ChatTemplate, whose method `ids` this is: it compiles only once."""
    return ChatTemplate(tokenizer).ids(messages, add_generation_prompt=add_generation_prompt, **variables)


def render_chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a chat; see ChatTemplate.text."""
    return ChatTemplate(tokenizer).text(messages, add_generation_prompt=add_generation_prompt, **variables)


class ChatTemplate:
    """A tokenizer's chat template, compiled. Threads may share one.

    Raises ValueError where the tokenizer has none, or it is no Jinja.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("this tokenizer has no chat template; a model that is not made for chats has none")
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template
        environment = _Environment()
        try:
            tree = environment.parse(self._source)
            for loop in tree.find_all(nodes.For):
                counted = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
                loop.iter = counted.set_environment(environment)
            self._code = environment.compile(tree)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from None
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise ValueError(f"the chat template is no Jinja: {error}") from None

    def ids(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a chat, as transformers' apply_chat_template gives them for messages without control tokens.

        messages: objects with a "role" and a "content", and whatever else the template knows; keys with None count as
        absent. add_generation_prompt: end where the assistant's answer begins. variables: of the template, such as
        tools or documents, made of text, numbers, None, lists and objects.

        A special token's text within a string of these is text. A template can still join pieces of strings into one,
        as '<|' + role + '|>' does, so let nobody choose a role freely.
        Raises ValueError for messages and variables that are not so made, where the template refuses them, and where
        it fails, tries to leave its sandbox, or does not come to an end. Memory is not limited.
        """
        rendered, texts = self._render(messages, add_generation_prompt, variables)
        ids: list[int] = []
        for piece in self._tokenizer.split_special(rendered):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._tokenizer.encode(piece.translate(texts), allow_special=False, add_bos=False)
        return ids

    def text(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a chat; see ids. It no longer tells control tokens from what people wrote, so never encode it."""
        rendered, texts = self._render(messages, add_generation_prompt, variables)
        return rendered.translate(texts)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[str, dict[int, str]]:
        """The text with characters that stand in for special tokens, and by code point what those stand in for."""
        strings: list[str] = []
        try:
            given = _plain({"messages": _checked(messages), **variables}, "", strings)
        except RecursionError:
            raise ValueError("the messages nest too deep") from None
        special = [token for token in self._tokenizer.special_tokens if any(token in text for text in strings)]
        stand_ins = _stand_ins(special, [*strings, self._source, *self._tokenizer.special_tokens])
        if stand_ins:
            pattern = re.compile("|".join(map(re.escape, special)))
            given = _map_strings(given, lambda text: pattern.sub(lambda match: stand_ins[match[0]], text))
        rendered = self._run(
            {
                "tools": None,
                "documents": None,
                **self._tokenizer.named_tokens,
                **given,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        for stand_in in stand_ins.values():
            rendered = rendered.replace(_escape(stand_in), stand_in)
        return rendered, {ord(stand_in): token for token, stand_in in stand_ins.items()}

    def _run(self, variables: Mapping[str, Any]) -> str:
        environment = _Environment()
        template = Template.from_code(environment, self._code, environment.make_globals(None))
        pieces: list[str] = []
        length = 0
        try:
            for piece in template.generate(variables):
                length += len(piece)
                if length > _MAX_CHARACTERS:
                    raise _Endless(f"it writes more than {_MAX_CHARACTERS} characters")
                pieces.append(piece)
        except _Refusal as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        except Exception as error:  # whatever a template can run into
            raise ValueError(f"the chat template failed: {type(error).__name__.strip('_')}: {error}") from None
        return "".join(pieces)


class _Refusal(TemplateError):
    """The template called raise_exception."""


class _Endless(TemplateError):
    """The template does more than any chat needs."""


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks for training what the assistant said: a block like any other here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of one rendering, with what Hugging Face's templates expect, and a bound on what it does.

    Calls, rounds of loops and numbers in ranges are counted; products and powers that are very big are refused.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
        self._steps = 0
        self.filters["tojson"] = _tojson
        self.filters["counted"] = self._counted
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["range"] = self._range
        # Makes any amount of text in one call.
        del self.globals["lipsum"]

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja's would only fail where something is done with it, and print as nothing.
        raise SecurityError(f"it may not use {attribute!r} of a {type(obj).__name__}")

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._count(1)
        return super().call(context, callee, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise _Endless(f"it computes a number of {bits} bits")
        elif operator == "*":
            for many, n in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(n, int) and len(many) * n > _MAX_CHARACTERS:
                    raise _Endless(f"it repeats something of length {len(many)} {n} times")
        return super().call_binop(context, operator, left, right)

    @pass_context
    def _counted(self, context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self._count(1)
            yield item

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        self._count(len(numbers))
        return numbers

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise _Endless(f"it takes more than {_MAX_STEPS} steps")


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _checked(messages: object) -> list[dict[object, Any]]:
    """The messages without keys that have None: transformers leaves those out, and templates count on it."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages is {messages!r}; expected a list of one or more")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}] is a {type(message).__name__}; expected an object with role and content")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _plain(value: Any, where: str, strings: list[str]) -> Any:
    """A copy made of str, numbers, None, list, tuple and dict only; all its strings are added to `strings`."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        check_text(value, where)
        strings.append(str.__str__(value))
        return strings[-1]
    if isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; expected text")
            copy[_plain(key, f"a key of {where}", strings)] = _plain(item, f"{where}.{key}".lstrip("."), strings)
        return copy
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{i}]", strings) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise ValueError(f"{where} is a {type(value).__name__}; expected text, a number, None, a list or an object")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_map_strings(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _escape(character: str) -> str:
    """How JSON in ASCII, and Python's repr, write a private-use character."""
    return json.dumps(character)[1:-1]


def _stand_ins(tokens: Sequence[str], strings: Sequence[str]) -> dict[str, str]:
    """For each token a private-use character that occurs in none of the strings, and whose escape does not either."""
    if not tokens:
        return {}
    text = "\0".join(strings)
    used = set(text)
    free = (
        character
        for block in _PRIVATE_USE
        for character in map(chr, block)
        if character not in used and _escape(character)[1:] not in text
    )
    stand_ins = dict(zip(tokens, free, strict=False))
    if len(stand_ins) < len(tokens):
        raise ValueError("the messages use up the private-use characters, and have special tokens in them")
    return stand_ins
