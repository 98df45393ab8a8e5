"""Linear layer: y = x @ weight^T + bias. A matrix product, so on every device it goes to the vendor's library.

Traffic: M*K + N*K + M*N elements; at one token (M = 1) it is the weights' N*K.
"""

import torch.nn.functional as F
from torch import Tensor


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias. x: (..., K), weight: (N, K), bias: (N,). Returns (..., N).

    Plain products are the vendor library's on every backend (cuBLAS, oneDNN), `backend("triton")` included.
    """
    return linear_ref(x, weight, bias)
