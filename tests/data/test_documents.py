import gzip
import importlib
import inspect
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from fusedlm.data.documents import Source, find_sources, unescaped
from fusedlm.data.errors import DataError
from fusedlm.data.files import TextFile, place_after
from fusedlm.data.hub import HubDataset
from fusedlm.data.pieces import Piece
from fusedlm.data.tables import JsonLines, Parquet
from fusedlm.tokenizer.bpe import BPETokenizer


def joined(pieces: list[Piece]) -> list[Any]:
    """The documents that pieces are of; fails where their marks contradict each other."""
    made: list[Any] = []
    is_open = False
    for piece in pieces:
        assert piece.first != is_open
        if piece.first:
            made.append(piece.content)
        else:
            made[-1] += piece.content
        is_open = not piece.last
    assert not is_open
    return made


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pieces", "files"):
        monkeypatch.setattr(f"fusedlm.data.{name}.PIECE", 64)
    monkeypatch.setattr("fusedlm.data.files._BLOCK", 50)  # bytes, so that blocks end within characters and separators


def text_of(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = ["a", "ä", "word", "日本", "Ω!", "I'm", "2024", "\n", " ", "\n\n", "\t", "x\ny", ".\n", "  "]
    return "".join(rng.choice(words) + rng.choice(["", " ", "\n"]) for _ in range(n))


@pytest.fixture(params=["text", "gz", "separator", "jsonl", "jsonl.gz", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path, small_pieces: None) -> tuple[Source, list[str]]:
    """A source of each kind, and the documents in it."""
    texts = [text_of(40, seed) for seed in range(24)] + ["short", "x" * 300]
    if request.param in ("text", "gz"):
        content, texts = "".join(texts).encode(), ["".join(texts)]
        path = tmp_path / ("a.txt.gz" if request.param == "gz" else "a.txt")
        path.write_bytes(gzip.compress(content) if request.param == "gz" else content)
        return TextFile(path), texts
    if request.param == "separator":
        path = tmp_path / "a.txt"
        path.write_bytes("\n<|end of text|>\n".join(["", *texts, ""]).encode())
        return TextFile(path, separator="\n<|end of text|>\n"), texts
    if request.param == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=3)
        return Parquet(path), texts
    path = tmp_path / f"a.{request.param}"
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if request.param.endswith("gz") else content)
    return JsonLines(path), texts


def test_pieces_make_the_documents(source: tuple[Source, list[str]]) -> None:
    reader, texts = source
    pieces = list(reader.read())
    assert joined(pieces) == texts
    assert len(pieces) > len(texts)
    assert all(len(piece.content) <= 64 for piece in pieces)


def test_reading_goes_on_behind_any_place(source: tuple[Source, list[str]]) -> None:
    reader, _ = source
    pieces = list(reader.read())
    places = [(i, json.loads(json.dumps(piece.place))) for i, piece in enumerate(pieces) if piece.place is not None]
    assert len(places) >= 9
    for i, place in places:
        rest = list(reader.read(place))
        assert [(p.content, p.first, p.last, p.place, p.where) for p in rest] == [
            (p.content, p.first, p.last, p.place, p.where) for p in pieces[i + 1 :]
        ]


# transformers keeps Llama 3's as the default of its converter.
LLAMA3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("newlines", [True, False])
def test_cuts_are_where_the_tokenizers_split_anyway(
    split: str, newlines: bool, small_pieces: None, tmp_path: Path
) -> None:
    pre_tokenizer, cuts = SPLITS[split], 0
    for seed in range(30):
        text = text_of(120, seed)
        if not newlines:
            text = text.replace("\n", " ")
        (tmp_path / "a.txt").write_bytes(text.encode())
        parts = [str(piece.content) for piece in TextFile(tmp_path / "a.txt").read()]
        ends = [part for part in parts if len(part) < 64]  # cut at a mark and not for want of one
        cuts += len(ends)
        whole = [token for token, _ in pre_tokenizer.pre_tokenize_str(text)]
        if len(ends) == len(parts):
            assert [token for part in parts for token, _ in pre_tokenizer.pre_tokenize_str(part)] == whole
    assert cuts > 100


def test_a_long_text_has_the_tokens_of_the_whole(gpt2: BPETokenizer, small_pieces: None, tmp_path: Path) -> None:
    text = "It's a line of 2024, and\nanother one!\n\n    indented  twice\n" * 20
    (tmp_path / "a.txt").write_text(text)
    pieces = list(TextFile(tmp_path / "a.txt").read())
    assert len(pieces) > 15
    assert [id for piece in pieces for id in gpt2.encode(str(piece.content))] == gpt2.encode(text)


def test_a_folder_is_read_by_name_at_any_depth(tmp_path: Path) -> None:
    names = ["b/z.txt", "b/a.md", "a.jsonl", "c.txt.gz", "b.txt", "B.TXT", ".git/x.txt", ".hidden.txt", "d.py", "e.bin"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(source.path.relative_to(tmp_path)) for source in find_sources([tmp_path]) if source.path]
    assert found == ["B.TXT", "a.jsonl", "b/a.md", "b/z.txt", "b.txt", "c.txt.gz"]
    assert [s.path for s in find_sources([tmp_path / "d.py", tmp_path], glob="*.py")] == [tmp_path / "d.py"] * 2
    with pytest.raises(DataError, match=r"b holds no file to read; looked for \*\.rst"):
        find_sources([tmp_path / "b"], glob="*.rst")
    with pytest.raises(DataError, match=r"there is no file or folder .*nowhere"):
        find_sources([tmp_path / "nowhere"])


def test_bytes_that_are_no_utf8(tmp_path: Path, small_pieces: None) -> None:
    path = tmp_path / "a.txt"
    for place in (0, 49, 50, 51, 130):
        content = bytearray("ä" * 100, "utf-8")
        content[place] = 0xFF
        path.write_bytes(content)
        before = place - place % 2  # a first byte whose second is wrong is the one that is reported
        with pytest.raises(DataError, match=rf"a\.txt is not UTF-8: byte {before} is 0x"):
            list(TextFile(path).read())
    path.write_bytes("ä".encode()[:1])
    with pytest.raises(DataError, match=r"is not UTF-8: byte 0 is 0xC3"):
        list(TextFile(path).read())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "b"', r"a\.jsonl, line 3, is not JSON"),
        (b'{"content": "b"}', r"line 3, has the keys \['content'\]; expected an object with 'text'"),
        (b'["b"]', r"line 3, has a list; expected an object with 'text'"),
        (b'{"text": 5}', r"line 3: text is 5; expected text, or a list of messages"),
        (b'{"text": "\xff"}', r"line 3, is not JSON"),
    ],
)
def test_a_broken_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(JsonLines(tmp_path / "a.jsonl").read())


def test_a_damaged_archive(tmp_path: Path) -> None:
    whole = gzip.compress(text_of(1000).encode())
    for content in (whole[:-20], b"no archive"):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read"):
            list(TextFile(tmp_path / "a.txt.gz").read())


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def refuse(name: str) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"package pyarrow is needed to read parquet .*pip install 'fusedlm\[data\]'"):
        list(find_sources([tmp_path])[0].read())


def test_a_damaged_parquet_file_and_a_wrong_column(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a", "b"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'; there are \['body'\]"):
        list(Parquet(path).read())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        list(Parquet(path, "body").read())


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_place_after(fraction: float, tmp_path: Path, small_pieces: None) -> None:
    text = text_of(300)
    (tmp_path / "a.txt").write_bytes(text.encode())
    n = int(len(text) * fraction)
    assert place_after(tmp_path / "a.txt", fraction) == (len(text[:n].encode()), n)


def test_a_hub_dataset_goes_on_behind_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    load: Callable[..., Any] = datasets.load_dataset
    texts = [f"row {i}" for i in range(1000)]
    for name, some in (("a", texts[:300]), ("b", texts[300:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    asked: list[tuple[Any, ...]] = []

    def local(repository: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((repository, config, split, revision, streaming))
        return load("json", data_files={split: files}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr("fusedlm.data.hub._STATES", 90)
    source = HubDataset("owner/name", "sample", "train", revision="0" * 40)
    pieces = list(source.read())
    assert [piece.content for piece in pieces] == texts
    assert set(asked) == {("owner/name", "sample", "train", "0" * 40, True)}
    places = [(i, json.loads(json.dumps(p.place))) for i, p in enumerate(pieces) if p.place is not None]
    assert len(places) == 11
    for i, place in places:
        assert [piece.content for piece in source.read(place)] == texts[i + 1 :]


def test_separators_as_people_type_them() -> None:
    assert unescaped(r"\n--\t") == "\n--\t"
    assert unescaped("\n\u00e9\u2014") == "\n\u00e9\u2014"
    with pytest.raises(ValueError, match=r"the separator is '\\\\x': truncated .*; expected escapes such as"):
        unescaped("\\x")
