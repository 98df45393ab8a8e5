"""The ops the models are made of, each usable on its own: torch's names and argument order, any strides, any dtype.

Functions have lower-case names; modules of the same ops, torch's names for modules.
"""

from fusedlm.kernels._backend import backend
from fusedlm.kernels._index_errors import raise_index_errors
from fusedlm.kernels._philox import dropout_seed
from fusedlm.kernels._tied import TiedGradient
from fusedlm.kernels.adamw import (
    AdamW,
    Workspace,
    adamw,
    global_norm,
    join_master,
    new_master,
    set_master,
    split_master,
)
from fusedlm.kernels.attention import attention, split_heads
from fusedlm.kernels.cross_entropy import cross_entropy
from fusedlm.kernels.dropout import dropout
from fusedlm.kernels.embedding import embedding
from fusedlm.kernels.gelu import gelu
from fusedlm.kernels.linear import linear
from fusedlm.kernels.linear_cross_entropy import linear_cross_entropy
from fusedlm.kernels.mlp import mlp
from fusedlm.kernels.modules import (
    GELU,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    LayerNorm,
    LinearCrossEntropyLoss,
    RMSNorm,
    RotaryEmbedding,
    Softmax,
    SwiGLU,
)
from fusedlm.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fusedlm.kernels.rope import RopeScaling, rope, rotary_frequencies, rotary_tables
from fusedlm.kernels.sample import sample
from fusedlm.kernels.softmax import softmax
from fusedlm.kernels.sum_parts import sum_parts
from fusedlm.kernels.swiglu import swiglu

__all__ = [
    "GELU",
    "AdamW",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "Softmax",
    "SwiGLU",
    "TiedGradient",
    "Workspace",
    "adamw",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backend",
    "cross_entropy",
    "dropout",
    "dropout_seed",
    "embedding",
    "gelu",
    "global_norm",
    "join_master",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "new_master",
    "raise_index_errors",
    "rms_norm",
    "rope",
    "rotary_frequencies",
    "rotary_tables",
    "sample",
    "set_master",
    "softmax",
    "split_heads",
    "split_master",
    "sum_parts",
    "swiglu",
]
