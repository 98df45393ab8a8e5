"""Whether what is there now is what a checkpoint's run began with: the tokenizer, the weights that are not trained."""

from fusedlm.data.format import tokenizer_fingerprint
from fusedlm.tokenizer.interface import Tokenizer
from fusedlm.training.checkpoints import SavedCheckpoint, StateError
from fusedlm.training.config import RunConfig


def check_tokenizer(tokenizer: Tokenizer, found: SavedCheckpoint, what: str) -> None:
    """Raises StateError, which calls it `what`, for another tokenizer than the run's."""
    before, now = found.manifest.run["tokenizer"], tokenizer_fingerprint(tokenizer)
    if before != now:
        raise StateError(
            f"{what} is not the one this run began with: its fingerprint is {now[:12]}..., expected {before[:12]}..."
        )


def check_frozen(fingerprint: str | None, found: SavedCheckpoint, config: RunConfig) -> None:
    """Raises StateError for another fingerprint of the weights that are not trained than the run's."""
    if found.manifest.run.get("frozen") != fingerprint:
        raise StateError(
            f"the weights of {config.model.init} that are not trained are not those this run began with, whose "
            f"checkpoint is {found.folder}"
        )
