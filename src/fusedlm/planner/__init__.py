"""Pure arithmetic about models: parameters, operations, memory, tokens, time. No GPU and no weights are touched."""

from fusedlm.planner.flops import Flops, compute_mfu, flops_per_token
from fusedlm.planner.memory import largest_batch, training_memory
from fusedlm.planner.parameters import Parameters, count_parameters, decode_bytes, parameters
from fusedlm.planner.plan import Plan, make_plan
from fusedlm.planner.step import blas_workspace
from fusedlm.planner.tokens import fitted_tokens, optimal_tokens
from fusedlm.planner.training import ACTIVATIONS, PARTS, Memory, Training, fixed_bytes

__all__ = [
    "ACTIVATIONS",
    "PARTS",
    "Flops",
    "Memory",
    "Parameters",
    "Plan",
    "Training",
    "blas_workspace",
    "compute_mfu",
    "count_parameters",
    "decode_bytes",
    "fitted_tokens",
    "fixed_bytes",
    "flops_per_token",
    "largest_batch",
    "make_plan",
    "optimal_tokens",
    "parameters",
    "training_memory",
]
