"""The same bytes, whatever happens on the way: interruptions, processes that are killed, any number of workers."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preparations import Stopped, contents, make, stopping_after

from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import Source, find_sources
from fusedlm.data.errors import DataError
from fusedlm.data.files import TextFile
from fusedlm.data.prepare import Progress, prepare
from fusedlm.data.tables import JsonLines, Parquet
from fusedlm.tokenizer.bpe import BPETokenizer


@pytest.fixture(params=["jsonl", "text", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path, jsonl: Path, stories: list[str]) -> Source:
    if request.param == "jsonl":
        return JsonLines(jsonl)
    if request.param == "text":
        (tmp_path / "a.txt").write_text("|".join(stories))
        return TextFile(tmp_path / "a.txt", separator="|")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": stories}), tmp_path / "a.parquet", row_group_size=70)
    return Parquet(tmp_path / "a.parquet")


def test_stopped_anywhere_it_goes_on_with_the_same_bytes(
    tmp_path: Path, small: BPETokenizer, source: Source, many_chunks: None
) -> None:
    make(source, tmp_path / "whole", small)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 12
    stops = 0
    for commits in range(1, 30, 3):
        for then in (0, 7):
            folder = tmp_path / f"{commits}-{then}"
            with pytest.MonkeyPatch.context() as patch:
                stopping_after(commits, patch, then)
                try:
                    make(source, folder, small, commit_seconds=0)
                except Stopped:
                    stops += 1
            if not (folder / "dataset.json").exists():
                assert (folder / ".prepare" / "recipe.json").exists()
                with pytest.raises(DataError, match=r"holds no dataset\.json"):
                    Dataset(folder)
            make(source, folder, small)
            assert contents(folder) == expected
            shutil.rmtree(folder)
    assert stops > 8


def test_stopped_again_and_again(tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None) -> None:
    lines = jsonl.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in (("a", lines[:200]), ("b", lines[200:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    sources = find_sources([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    make(sources, tmp_path / "whole", small)
    for _ in range(100):
        with pytest.MonkeyPatch.context() as patch:
            stopping_after(1, patch)
            try:
                make(sources, tmp_path / "out", small, commit_seconds=0)
                break
            except Stopped:
                continue
    make(sources, tmp_path / "out", small)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_number_of_processes_changes_no_byte(
    tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None
) -> None:
    seen: list[Progress] = []
    for workers in (0, 1, 3):
        make(JsonLines(jsonl), tmp_path / str(workers), small, workers=workers, progress=seen.append)
        size = jsonl.stat().st_size
        assert (seen[-1].done, seen[-1].total) == (size, size)
    assert contents(tmp_path / "1") == contents(tmp_path / "0")
    assert contents(tmp_path / "3") == contents(tmp_path / "0")


KILLED = """
import multiprocessing, os, sys
from pathlib import Path
from fusedlm.data import chunks
from fusedlm.data import prepare as module
from fusedlm.data.tables import JsonLines
from fusedlm.tokenizer.load import load_tokenizer

if __name__ == "__main__":
    chunks._CHUNK = 2000
    real = module.write_json

    def write_json(path, value):
        real(path, value)
        if path.name == "progress.json":
            print(*[p.pid for p in multiprocessing.active_children()], flush=True)

    module.write_json = write_json
    source, folder, tokenizer = sys.argv[1:]
    module.prepare([JsonLines(Path(source))], folder, load_tokenizer(tokenizer), val_fraction=0.1, shard_tokens=1000,
                   workers=2, commit_seconds=0)
"""


def test_killed_in_the_middle(tmp_path: Path, small: BPETokenizer, jsonl: Path) -> None:
    make(JsonLines(jsonl), tmp_path / "whole", small)
    (tmp_path / "killed.py").write_text(KILLED)
    small.save(tmp_path / "small")
    command = [sys.executable, tmp_path / "killed.py", jsonl, tmp_path / "out", tmp_path / "small"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    assert not (tmp_path / "out" / "dataset.json").exists()
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):  # none is left behind
        assert time.monotonic() < end
        time.sleep(0.02)
    make(JsonLines(jsonl), tmp_path / "out", small)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_is_killed(tmp_path: Path, small: BPETokenizer, jsonl: Path, many_chunks: None) -> None:
    import multiprocessing

    def kill(progress: Progress) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(DataError, match="a worker process has ended unexpectedly"):
        make(JsonLines(jsonl), tmp_path / "out", small, workers=1, progress=kill)
    make(JsonLines(jsonl), tmp_path / "out", small)
    Dataset(tmp_path / "out").verify()


def test_an_error_in_a_worker_is_ours(tmp_path: Path, small: BPETokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: text has a lone surrogate"):
        prepare(find_sources([tmp_path / "a.jsonl"]), tmp_path / "out", small, workers=1)
