"""What torch.compile need not look into: a function that launches kernels becomes one operator of a graph.

The function itself runs in eager mode, where an operator's dispatch would cost more than the launch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fusedlm", "DEF")


def operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Under torch.compile, call the decorated function as the operator `torch.ops.fusedlm.<name>`.

    fake: the same function for tensors without data. The function takes and returns tensors (new ones, that share no
    memory with each other or with what came in), numbers and strings, with annotations; it must not be differentiated
    through. Its name, less leading underscores, is the operator's.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.lstrip("_")
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedlm::{name}", fake, lib=_library)
        op = getattr(torch.ops.fusedlm, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return op(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return decorate
