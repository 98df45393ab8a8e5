"""How many numbers a model has, and how many must be read to decode a token."""

from dataclasses import dataclass

from fusedlm.models import GPT2Config, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters by part, all layers together. head is 0 where it is the embedding's own matrix."""

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.attention + self.mlp + self.norms + self.head


@dataclass(frozen=True)
class Layer:
    """The matrices of one block, as (outputs, inputs), and its other parameters.

    up: GPT-2's up, or Llama's gate and up in one.
    """

    qkv: tuple[int, int]
    out: tuple[int, int]
    up: tuple[int, int]
    down: tuple[int, int]
    biases: bool
    norm: int  # parameters of one of the two norms

    @classmethod
    def of(cls, config: ModelConfig) -> "Layer":
        C, F, heads = config.width, config.mlp_width, config.n_heads * config.head_dim
        up = F if isinstance(config, GPT2Config) else 2 * F
        biases = isinstance(config, GPT2Config) and config.bias
        return cls((config.qkv_width, C), (C, heads), (up, C), (C, F), biases=biases, norm=2 * C if biases else C)

    def size(self, *matrices: tuple[int, int]) -> int:
        """Parameters of some of the matrices, with their biases."""
        return sum(N * K + (N if self.biases else 0) for N, K in matrices)

    @property
    def total(self) -> int:
        return self.size(self.qkv, self.out, self.up, self.down) + 2 * self.norm


def parameters(config: ModelConfig) -> Parameters:
    """The parameters of a model, positions included and a tied head counted once."""
    layer, table = Layer.of(config), config.vocab_size * config.width
    return Parameters(
        embedding=table,
        positions=config.context_length * config.width if isinstance(config, GPT2Config) else 0,
        attention=config.n_layers * layer.size(layer.qkv, layer.out),
        mlp=config.n_layers * layer.size(layer.up, layer.down),
        norms=(2 * config.n_layers + 1) * layer.norm,
        head=0 if config.tied else table,
    )


def count_parameters(config: ModelConfig) -> int:
    """Parameters of a model, positions included and a tied head counted once."""
    return parameters(config).total


def decode_bytes(config: ModelConfig, *, bytes_per_element: float, context: float, batch: int = 1) -> float:
    """Bytes that must be read to decode one token for each of `batch` sequences.

    Every matrix once, the head included (the embedding's own where tied); of the other tables only these tokens' rows;
    keys and values of `context` earlier tokens a sequence, in the same width as the weights.
    """
    found = parameters(config)
    tables = found.positions + (0 if config.tied else found.embedding)
    rows = batch * config.width * (2 if found.positions else 1)
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * context * batch
    return bytes_per_element * (found.total - tables + rows + cache)
