"""What a model is: its architecture and sizes, as frozen dataclasses that refuse what makes no sense."""

from dataclasses import dataclass

from fusedlm.kernels.rope import RopeScaling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes that every architecture has.

    n_kv_heads: key/value heads; equal to n_heads for multi-head attention, 1 for multi-query, between for grouped.
    head_dim: the width of a head; n_heads * head_dim need not be width.
    tied: the output head is the token embedding's matrix.
    Raises ValueError for sizes that cannot be.
    """

    vocab_size: int
    context_length: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    width: int
    mlp_width: int
    norm_eps: float
    tied: bool

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "width"):
            self._require_positive(name)
        self._require_positive("mlp_width")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}; expected a positive number")

    def _require_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number, 1 or more")

    @property
    def qkv_width(self) -> int:
        """Columns of the fused query, key and value projection: (H + 2G) * D."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, tanh-GELU. bias: of products and norms; GPT-2 has
    them, and nanoGPT's models do not."""

    bias: bool = True


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama (Touvron et al. 2023; Dubey et al. 2024): rotary positions, RMSNorm, SwiGLU, no biases."""

    rope_theta: float
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta is {self.rope_theta}; expected a positive number")
