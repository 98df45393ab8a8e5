"""Random numbers of a run: those of a step are a function of the seed, the step and the rank, whatever came before."""

import torch

from fusedlm.training.ranks import Ranks

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def seed_step(seed: int, step: int, ranks: Ranks) -> None:
    """Seed torch's generator of the ranks' device for a step. A CUDA graph that is replayed reads the new seed."""
    mixed = mix(mix(mix(seed) + step) + ranks.rank) >> 1
    if ranks.device.type == "cuda":
        torch.cuda.manual_seed(mixed)
    else:
        torch.default_generator.manual_seed(mixed)


def mix(x: int) -> int:
    """64 bits that look random, of any 64: splitmix64's step (Steele et al. 2014)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
