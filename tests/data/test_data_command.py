import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from fusedlm.cli.data import data
from fusedlm.data.dataset import Dataset
from fusedlm.data.errors import DataError
from fusedlm.tokenizer.bpe import BPETokenizer


def run(*arguments: str | Path, error: type[Exception] | None = None) -> Result:
    app = typer.Typer()
    app.add_typer(data, name="data")
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if error is None:
        assert result.exit_code == 0, result.output + repr(result.exception)
    else:
        assert isinstance(result.exception, error), result.output
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "my.text.txt"
    path.write_text("the cat sat on the mat\n" * 100)
    return path


def test_prepare_info_and_verify(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = run("prepare", text, "-t", "characters").stdout
    dataset = Dataset(tmp_path / "data" / "my")
    assert "train   2,070          1       1  0.0" in output
    assert "val       230          1       1  0.0" in output
    assert f"fingerprint {dataset.fingerprint}" in output
    assert run("info", "data/my").stdout == output
    known = json.loads(run("info", "data/my", "--json").stdout)
    assert (known["fingerprint"], known["vocab_size"], known["kind"]) == (dataset.fingerprint, 11, "text")
    assert known["splits"]["train"][0]["tokens"] == 2070
    assert run("verify", "data/my").stdout == f"data/my is whole: fingerprint {dataset.fingerprint}\n"
    shard = tmp_path / "data" / "my" / "val_00000.bin"
    shard.write_bytes(b"\0" * 460)
    assert "val_00000.bin has SHA-256" in str(run("verify", "data/my", error=DataError).exception)


def test_all_the_options(text: Path, tmp_path: Path, small: BPETokenizer, gpt2_files: Path) -> None:
    small.save(tmp_path / "small")
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.py").write_text("one\n--\ntwo\n--\nthree")
    shutil.copy(text, folder)
    output = tmp_path / "out"
    arguments = ["prepare", folder, "-o", output, "-t", tmp_path / "small", "--val", text, "--separator", "\\n--\\n"]
    arguments += ["--glob", "*.py", "--shard-tokens", "5", "--workers", "1"]
    run(*arguments)
    dataset = Dataset(output)
    assert (dataset.split("train").n_documents, dataset.split("val").n_documents) == (3, 1)
    expected = [id for word in ("one", "two", "three") for id in [*small.encode(word), 264]]
    assert dataset.split("train").tokens(0, len(expected)).tolist() == expected
    assert len(dataset.manifest.splits["train"]) == -(-len(expected) // 5)
    run(*arguments)  # it is there
    error = run("prepare", folder, text, "-o", output, "-t", tmp_path / "small", error=DataError)
    assert "start again with --overwrite" in str(error.exception)
    run("prepare", text, "-o", output, "-t", gpt2_files, "--overwrite", "--val-fraction", "0")
    shown = run("info", output).stdout
    assert "50,257 ids as uint16" in shown
    assert "There is no split val: a larger --val-fraction or --val makes one." in shown


def test_chats(tmp_path: Path, chat_tokenizer: Callable[[], BPETokenizer]) -> None:
    chat_tokenizer().save(tmp_path / "tokenizer")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (chat, chat[:1])))
    result = run("prepare", path, "-o", tmp_path / "out", "-t", tmp_path / "tokenizer", "--chat", "--val-fraction", "0")
    assert "1 chats without an answer were left out." in result.stdout
    assert Dataset(tmp_path / "out").split("train").has_mask


def test_what_cannot_be(text: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["nowhere"], "there is no file, folder or named set 'nowhere'"),
        ([text, text], "there are 2 sources and no --output"),
        (["hf:owner/name", "--offline"], "hf:owner/name is streamed from the Hugging Face Hub, and --offline is set"),
        ([text, "-o", tmp_path / "out", "-t", "charakters"], "'charakters' is no model that is known"),
        ([text, "-o", tmp_path / "out", "-t", "gpt2", "--offline"], "is not (or not wholly) in"),
    ):
        assert message in str(run("prepare", *arguments, error=ValueError).exception)
    assert not (tmp_path / "out").exists()
