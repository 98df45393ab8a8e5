"""The one error of this package for what lies on a disk or comes from elsewhere."""


class DataError(ValueError):
    """A dataset, or what one is to be made of, cannot be used. The message names it, what was found and expected."""
