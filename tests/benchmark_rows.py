"""A machine that tests of the benchmarks make up, and rows of what was measured on it."""

from typing import Any

MACHINE = {"gpu": "G", "driver": "1", "torch": "2", "triton": "3", "python": "3.12", "commit": None, "date": "today"}


def measured(variant: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A row: of an op's forward pass at one shape, unless `more` says otherwise."""
    made = {"op": "op", "shape": {"M": 4, "N": 8}, "direction": "forward", "variant": variant, "dtype": "bfloat16"}
    return {**made, "seconds": seconds, "bytes_per_second": 1e12, "share_of_copy": 0.5, **more}
