"""The one error of this package's readers."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is. The message names the file, what was found and what is expected."""
