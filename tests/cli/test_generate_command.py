"""`fusedlm generate` as people run it, and what it says to bad input: one line, no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fusedlm

Run = Callable[..., Any]


def test_it_streams_the_text_and_says_how_fast_it_was(run: Run, tiny_model: Path) -> None:
    result = run("generate", "hello world", "--model", tiny_model, "-n", "20")
    assert result.code == 0
    assert result.out.startswith("hello world")
    assert len(result.out) > 30
    for part in (r"2 prompt tokens", r"first token \d+ ms", r"20 new tokens", r"median [\d.]+ ms/token"):
        assert re.search(part, result.err), part
    assert re.search(r"[\d.]+ tokens/s, \d+% of \d+ GB/s memory bandwidth", result.err)
    assert "ended by: max new tokens" in result.err


def test_json(run: Run, tiny_model: Path) -> None:
    options = ("--temperature", "1.2", "--seed", "4", "--num-samples", "3", "--logprobs", "2", "-n", "5")
    result = run("generate", "hello", "--model", tiny_model, "--json", *options)
    values = json.loads(result.out)
    assert values["prompt"] == "hello"
    assert len(values["samples"]) == 3
    assert len({tuple(s["token_ids"]) for s in values["samples"]}) == 3
    sample = values["samples"][0]
    assert sample["seed"] == 4
    assert sample["finish_reason"] == "max_new_tokens"
    assert len(sample["logprobs"]) == 5
    assert len(sample["logprobs"][0]["top"]) == 2
    assert sample["stats"]["tokens_per_second"] > 0
    again = run("generate", "hello", "--model", tiny_model, "--json", *options)
    assert [s["text"] for s in json.loads(again.out)["samples"]] == [s["text"] for s in values["samples"]]


def test_prompt_file_and_stop(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello world", encoding="utf-8")
    plain = run("generate", "--prompt-file", tmp_path / "prompt.txt", "--model", tiny_model, "--json")
    text = json.loads(plain.out)["samples"][0]["text"]
    stop = text[20:23]
    stopped = run("generate", "hello world", "--model", tiny_model, "--stop", stop)
    assert stopped.out == "hello world" + text[: text.index(stop)] + "\n"
    assert f"ended by: stop string {stop!r}" in stopped.err


def test_several_samples(run: Run, tiny_model: Path) -> None:
    result = run("generate", "hello", "--model", tiny_model, "--num-samples", "2", "--temperature", "1", "-n", "8")
    assert result.out.count("hello") >= 2
    assert "--- 2 of 2" in result.out


BAD: list[tuple[list[str], str]] = [
    ([], "neither of PROMPT and --prompt-file"),
    (["hello", "--prompt-file", "x"], "both of PROMPT and --prompt-file"),
    (["--prompt-file", "/no/such/file"], "/no/such/file"),
    ([""], "the prompt is empty"),
    (["hello \udcff there"], "the prompt is not valid UTF-8: byte 0xff at 6"),
    (["hello " * 200], r"the prompt has \d+ tokens, and the context is 96"),
    (["hello", "--top-p", "3"], "top_p is 3.0; expected"),
    (["hello", "--temperature", "nan"], "temperature is nan; expected"),
    (["hello", "--min-p", "-1"], "min_p is -1.0; expected"),
    (["hello", "--repetition-penalty", "0"], "repetition_penalty is 0.0; expected"),
    (["hello", "--seed", "-4"], "seed is -4; expected"),
    (["hello", "-n", "0"], "max_new_tokens is 0; expected"),
    (["hello", "--num-samples", "0"], "num_samples is 0; expected"),
    (["hello", "--stop", ""], "stop is"),
    (["hello", "--logprobs", "2"], "--logprobs is given without --json"),
    (["hello", "--device", "abacus"], "device 'abacus' cannot be used here; expected"),
    (["hello", "--dtype", "float13"], "unknown dtype 'float13'; expected"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_line(arguments: list[str], message: str, run: Run, tiny_model: Path) -> None:
    result = run("generate", *arguments, "--model", tiny_model)
    assert result.code == 1
    assert re.search(message, result.err)
    assert result.err.startswith("fusedlm: error: ")
    assert result.err.count("\n") == 1
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--kernels", "cuda"], "auto"), (["--nonsense"], "No such option")]
)
def test_bad_options_are_explained(arguments: list[str], message: str, run: Run, tiny_model: Path) -> None:
    result = run("generate", "hello", *arguments, "--model", tiny_model)
    assert result.code == 2
    assert message in result.err


def test_an_unknown_model_is_an_error_with_near_names(run: Run, tmp_path: Path) -> None:
    result = run("generate", "hello", "--model", "smolm2-135m", "--offline", "--cache-dir", tmp_path)
    assert result.code == 1
    assert "smollm2-135m" in result.err
    assert "Traceback" not in result.err


def test_a_prompt_file_that_is_not_utf8(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc\xfe")
    result = run("generate", "--prompt-file", tmp_path / "bad.txt", "--model", tiny_model)
    assert "bad.txt is not valid UTF-8: byte 0xfe at 3" in result.err


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fusedlm.cli import main; main()", *arguments]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("delay", [0.7, 1.5, 2.5, 4.0])
def test_ctrl_c_leaves_quietly(delay: float, tiny_model: Path) -> None:
    """At whatever moment: while it imports, loads or writes."""
    arguments = ["generate", "hello", "--model", str(tiny_model), "--num-samples", "100", "-n", "90"]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130), err  # 0 where it was done already
    assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("action", "by", "status", "said"),
    [
        ("import slow", "cli/generate.py", 130, ""),  # whatever sets itself up there may be C++
        ("import slow", "training/run.py", 0, "raised"),  # who imports in the middle of its work has to clean up
        ("exec(open('slow.py').read())", "cli/generate.py", 0, "raised"),
    ],
)
def test_ctrl_c_while_a_command_imports_is_no_exception(
    action: str, by: str, status: int, said: str, tmp_path: Path
) -> None:
    lines = ("import os, signal", "try:", "    os.kill(os.getpid(), signal.SIGINT)", "except KeyboardInterrupt:")
    (tmp_path / "slow.py").write_text("\n".join((*lines, "    print('raised')", "")))
    file = Path(fusedlm.__file__).parent / by
    handled = "import signal; from fusedlm.cli import interrupt; signal.signal(signal.SIGINT, interrupt)"
    code = f"{handled}; exec(compile({action!r}, {str(file)!r}, 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (status, said)
    assert done.stderr.strip() == ""


def test_ctrl_c_in_a_stream_says_how_far_it_came(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlm.inference.generation import TextStream

    pieces, original = [], TextStream.__next__

    def interrupt(self: TextStream) -> str:
        if len(pieces) == 3:
            pieces.clear()
            raise KeyboardInterrupt
        pieces.append(original(self))
        return pieces[-1]

    monkeypatch.setattr(TextStream, "__next__", interrupt)
    result = run("generate", "hello", "--model", tiny_model)
    assert result.code == 130
    assert "ended by: interrupted" in result.err
    assert "Traceback" not in result.err


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = "import sys; from fusedlm.cli import main\ntry: main()\nexcept SystemExit: print('torch' in sys.modules)"
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        out = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        ).stdout
        assert out.splitlines()[-1] == "False"
