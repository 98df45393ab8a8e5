"""The dataset of a run: one that is prepared already, or one that is made in the run's folder from its sources."""

from collections.abc import Callable
from pathlib import Path

from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import Source, find_sources, unescaped
from fusedlm.data.format import DATASET_FILE
from fusedlm.data.prepare import prepare
from fusedlm.data.sets import NAMED_SETS, sources_of
from fusedlm.data.tokenizers import find_tokenizer
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.training.config import DataConfig

CHARACTERS = "characters"


def open_dataset(
    data: DataConfig,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """The dataset that `data` describes, made in `folder` where it is not prepared yet.

    tokenizer: in place of the one that `data` names. A preparation that was interrupted goes on.
    Raises ValueError for sources that there are not, DataError for what cannot be read.
    """
    if len(data.sources) == 1 and (Path(data.sources[0]).expanduser() / DATASET_FILE).exists():
        return Dataset(Path(data.sources[0]).expanduser())
    if (folder / DATASET_FILE).exists():
        return Dataset(folder)
    only = data.sources[0] if len(data.sources) == 1 else None
    named = NAMED_SETS.get(only) if only is not None and not Path(only).exists() else None
    name = data.tokenizer or (CHARACTERS if named is not None and named.characters else "gpt2")
    val_fraction = named.val_fraction if named is not None and data.val_fraction is None else data.val_fraction
    sources = [source for given in data.sources for source in _sources(given, data, offline, cache_dir)]
    chosen: Tokenizer | str | None = tokenizer
    if chosen is None:
        chosen = name if name == CHARACTERS else find_tokenizer(name, offline=offline, cache_dir=cache_dir)
    say(f"preparing {', '.join(data.sources)} in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    prepare(
        sources,
        folder,
        chosen,  # type: ignore[arg-type]
        kind="chat" if data.chat else "text",
        val_fraction=val_fraction,
    )
    return Dataset(folder)


def _sources(given: str, data: DataConfig, offline: bool, cache_dir: Path | None) -> list[Source]:
    path = Path(given).expanduser()
    if path.exists():
        key = "messages" if data.chat else "text"
        separator = None if data.separator is None else unescaped(data.separator)
        return find_sources([path], key=key, separator=separator, glob=data.glob)
    return sources_of(given, cache_dir=cache_dir, offline=offline)
