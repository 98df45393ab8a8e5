"""Steps on a CPU as one compiled function that threads run together. The only folder that imports numba."""

from fusedlm.inference.compiled.decoder import CompiledDecoder, supports
from fusedlm.inference.compiled.step import is_on_disk

__all__ = ["CompiledDecoder", "is_on_disk", "supports"]
