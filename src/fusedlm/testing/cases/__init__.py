"""One `OpCase` an op, a module a family."""

from fusedlm.testing.cases import (
    adamw,
    attention,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    linear,
    norm,
    rope,
    sample,
    softmax,
    sum_parts,
    swiglu,
)
from fusedlm.testing.contract import OpCase

_FAMILIES = (
    norm,
    gelu,
    swiglu,
    dropout,
    rope,
    softmax,
    embedding,
    cross_entropy,
    adamw,
    sample,
    sum_parts,
    attention,
    linear,
)

CASES: dict[str, OpCase] = {case.name: case for family in _FAMILIES for case in family.CASES}
