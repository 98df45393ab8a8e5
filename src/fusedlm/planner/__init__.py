"""Pure arithmetic about models: parameters and bytes. No GPU and no weights are touched."""

from fusedlm.models import GPT2Config, ModelConfig, build_model

__all__ = ["count_parameters", "decode_bytes"]


def count_parameters(config: ModelConfig) -> int:
    """Parameters of a model, positions included and a tied head counted once."""
    return sum(p.numel() for p in build_model(config, device="meta").parameters())


def decode_bytes(config: ModelConfig, *, bytes_per_element: float, context: float, batch: int = 1) -> float:
    """Bytes that must be read to decode one token for each of `batch` sequences.

    Every matrix once, the head included (the embedding's own where tied); of the other tables only these tokens' rows;
    keys and values of `context` earlier tokens a sequence, in the same width as the weights.
    """
    C = config.width
    positions = config.context_length * C if isinstance(config, GPT2Config) else 0
    tables = positions + (0 if config.tied else config.vocab_size * C)
    rows = batch * C * (2 if positions else 1)
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * context * batch
    return bytes_per_element * (count_parameters(config) - tables + rows + cache)
