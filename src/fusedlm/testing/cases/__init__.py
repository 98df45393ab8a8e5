"""One `OpCase` an op, a module a family."""

from fusedlm.testing.cases import gelu, norm
from fusedlm.testing.contract import OpCase

CASES: dict[str, OpCase] = {case.name: case for module in (norm, gelu) for case in module.CASES}
