"""`fusedlm chat`: history, commands, and Ctrl-C that stops the answer and not the program."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedlm import ChatSession, load

Run = Callable[..., Any]


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What is typed at the prompt: lines, exceptions, then the end of input."""

    def type_lines(*lines: str | type[BaseException]) -> None:
        waiting = iter(lines)

        def read(_: str = "") -> str:
            line = next(waiting, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return type_lines


def test_a_conversation_is_remembered_saved_and_forgotten(
    run: Run, type_lines: Callable[..., None], tiny_model: Path, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    type_lines("hello", "and more", f"/save {a}", "/reset", "again", f"/save {b}", "/quit", "never read")
    result = run("chat", "--model", tiny_model, "--system", "be brief", "-n", "5")
    assert result.code == 0
    first, second = json.loads(a.read_text()), json.loads(b.read_text())
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["role"] for m in second] == ["system", "user", "assistant"]
    assert first[1]["content"] == "hello"
    assert first[2]["content"] in result.out
    assert result.err.count("tokens/s") == 3


def test_commands_and_mistakes_do_not_end_it(
    run: Run, type_lines: Callable[..., None], tiny_model: Path, tmp_path: Path
) -> None:
    type_lines("/help", "/nonsense", "/save", "/save /no/such/folder/x", KeyboardInterrupt, "", "word " * 200, "hello")
    result = run("chat", "--model", tiny_model, "-n", "3")
    assert result.code == 0
    assert "/reset" in result.out
    for message in ("unknown command /nonsense", "expected /save FILE", "/no/such/folder", "context is 96"):
        assert message in result.err
    assert "3 new tokens" in result.err


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(
    run: Run, type_lines: Callable[..., None], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedlm.inference.chat import ChatStream

    original = ChatStream.__iter__

    def interrupted(self: ChatStream) -> Iterator[str]:
        yield next(original(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatStream, "__iter__", interrupted)
    file = tmp_path / "chat.json"
    type_lines("hello", "more", f"/save {file}")
    result = run("chat", "--model", tiny_model)
    assert result.code == 0
    assert result.out.count("[stopped]") == 2
    messages = json.loads(file.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"]


def test_a_model_without_a_template_is_refused(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    load(tiny_model, device="cpu").save(tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").unlink(missing_ok=True)
    config = tmp_path / "plain/tokenizer_config.json"
    values = json.loads(config.read_text())
    values.pop("chat_template", None)
    config.write_text(json.dumps(values))
    result = run("chat", "--model", tmp_path / "plain")
    assert result.code == 1
    assert "no chat template" in result.err


def test_a_conversation_takes_no_more_than_its_context(
    run: Run, type_lines: Callable[..., None], tiny_model: Path
) -> None:
    type_lines("hello")
    result = run("chat", "--model", tiny_model, "--context-length", "10")
    assert "7 prompt tokens" in result.err
    assert "3 new tokens" in result.err
    type_lines("hello there, how are you")
    assert "the context is 10" in run("chat", "--model", tiny_model, "--context-length", "10").err
    assert "context_length is 0" in run("chat", "--model", tiny_model, "--context-length", "0").err


def test_turns_are_read_once_and_give_what_a_fresh_reading_gives(tiny_model: Path) -> None:
    """The second answer over the kept cache is the one that the whole conversation read anew gets."""
    session = ChatSession(load(tiny_model, device="cpu"))
    for text in ("hello", "tell me more"):
        for _ in (stream := session.send(text, max_new_tokens=6)):
            pass
    fresh = ChatSession(load(tiny_model, device="cpu"))
    fresh.messages = session.messages[:2]
    for _ in (again := fresh.send("tell me more", max_new_tokens=6)):
        pass
    assert again.result.token_ids == stream.result.token_ids
