"""The contract that every op passes on every device: values, gradients, strides, memory, repeatability.

`cases.CASES` has one `OpCase` an op; tests and benchmarks read it. An op of your own can be held to the same contract.
"""

from fusedlm.testing.contract import OpCase, Shape, check, checks

__all__ = ["OpCase", "Shape", "check", "checks"]
