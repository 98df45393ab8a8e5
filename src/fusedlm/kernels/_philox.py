"""The random bits of dropout: Philox4x32 with seven rounds (Salmon et al. 2011), 16 bits an element.

Counter-based: the bits of an element are a function of a seed, a stream and the element's row and column alone. So a
backward pass computes a mask anew instead of reading a stored one, and every device makes the same mask.
One evaluation gives 128 bits, for the 8 elements of columns 8g to 8g + 7: counter (g, row mod 2^32, row div 2^32,
stream), key (low and high half of the seed), and the words in order, each its low half first.
"""

import torch
from torch import Tensor

from fusedlm.kernels._triton import tl, triton

ROUNDS = 7  # the fewest that pass every test of BigCrush; 10 is the usual margin, and masks need none
_ROUNDS = tl.constexpr(ROUNDS)
_WORD = 0xFFFFFFFF


@triton.jit
def keep_mask(seed, stream, row, first_group, threshold, BLOCK: tl.constexpr):
    """(BLOCK,) bool: which elements stay, of columns from 8 * first_group on. threshold: of 65,536, how many go."""
    groups = (first_group + tl.arange(0, BLOCK // 8)).to(tl.uint32)
    low = row.to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, groups, low, high, stream.to(tl.uint32), _ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK // 2,))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))
    return halves.to(tl.int32) >= threshold


@triton.jit
def keep_mask_2d(seed, stream, rows, first_group, threshold, BLOCK: tl.constexpr):
    """(M, BLOCK) bool: keep_mask of each of M rows, (M,) int64."""
    groups = (first_group + tl.arange(0, BLOCK // 8))[None, :].to(tl.uint32)
    low = rows[:, None].to(tl.uint32)
    groups, low = tl.broadcast(groups, low)
    high = (rows[:, None] >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, groups, low, high, stream.to(tl.uint32), _ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (rows.shape[0], BLOCK // 2))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (rows.shape[0], BLOCK))
    return halves.to(tl.int32) >= threshold


def philox_ref(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Four words of random bits from a counter of four words and a key of two. Words: int64, 0 to 2^32 - 1."""
    c, (k0, k1) = counter, key
    for _ in range(ROUNDS):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # 64-bit products; they wrap, and bits are all that counts
        c = [((q >> 32) & _WORD) ^ c[1] ^ k0, q & _WORD, ((p >> 32) & _WORD) ^ c[3] ^ k1, p & _WORD]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c


def keep_mask_ref(seed: Tensor, stream: int, M: int, N: int, threshold: int) -> Tensor:
    """The mask for M rows of N columns, (M, N) bool, in torch. seed: (1,) int64."""
    groups = -(-N // 8)
    row = torch.arange(M, device=seed.device).view(M, 1)
    group = torch.arange(groups, device=seed.device).expand(M, groups)
    counter = [group, row & _WORD, row >> 32, torch.tensor(stream, device=seed.device)]
    words = torch.stack(philox_ref(counter, (seed & _WORD, (seed >> 32) & _WORD)), -1)  # (M, groups, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # (M, groups, 4, 2)
    return (halves >= threshold).view(M, groups * 8)[:, :N]


def drop_threshold(p: float) -> tuple[int, float]:
    """(how many of 65,536 to drop, what the others are multiplied by) for a probability of p.

    Raises ValueError unless 0 <= p <= 1.
    """
    if not p:
        return 0, 1.0
    if not 0 <= p <= 1:
        raise ValueError(f"dropout's probability is {p}; expected 0 to 1")
    threshold = round(p * 65536)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def dropout_seed(seed: Tensor | None, p: float, training: bool, device: torch.device) -> Tensor | None:
    """The seed of a dropout, (1,) int64; None where nothing is dropped.

    Where none is given, one from torch's own generator of the device: so torch.manual_seed repeats it, activation
    checkpointing restores it, and a CUDA graph draws anew at each replay. Raises ValueError for another p or seed.
    """
    drop_threshold(p)
    if not training or p == 0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed has shape {tuple(seed.shape)}, {seed.dtype}, on {seed.device}; expected one int64 on {device}"
        )
    return seed
