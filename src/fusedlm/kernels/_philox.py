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
_AT_ONCE = 65536  # groups that are computed together on a CPU: few enough for its cache, enough to be worth the calls


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
def keep_rows(seed, stream, row, first_group, threshold, BLOCK: tl.constexpr):
    """(R, BLOCK) bool: keep_mask of R rows. row: (R,) int64."""
    groups = (first_group + tl.arange(0, BLOCK // 8)).to(tl.uint32)[None, :]
    low = row.to(tl.uint32)[:, None]
    high = (row >> 32).to(tl.uint32)[:, None]
    a, b, c, d = tl.philox(seed, groups, low, high, stream.to(tl.uint32), _ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (row.shape[0], BLOCK)).to(tl.int32) >= threshold


@triton.jit
def keep_groups(seed, stream, group, threshold):
    """(M, 8N) bool: which elements stay, of (M, N) groups of 8. group: (M, N) int64, index // 8 of their first ones.

    `dropout`'s mask, by the index into the whole tensor.
    """
    zero = (group * 0).to(tl.uint32)
    a, b, c, d = tl.philox(seed, group.to(tl.uint32), zero, zero, zero + stream.to(tl.uint32), _ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return halves.reshape([group.shape[0], 8 * group.shape[1]]).to(tl.int32) >= threshold


@triton.jit
def tile_key(seed, stream, head):
    """The key of `keep_tile` for one head of one sequence: a word of Philox4x32."""
    zero = tl.zeros((1,), tl.uint32)
    low = (head + tl.zeros((1,), tl.int64)).to(tl.uint32)
    a, _, _, _ = tl.philox(seed, low, zero, zero, stream.to(tl.uint32), _ROUNDS)
    return tl.max(a, 0)


@triton.jit
def keep_tile(key, row, column, threshold, M: tl.constexpr, N: tl.constexpr):
    """(M, N) bool: which elements stay, of rows from row on and columns from column on, multiples of 16.

    Philox2x32 of counter (pair of columns, pair of rows): 64 bits for the 4 elements of rows r, r + 8 and columns c,
    c + 8. A thread that holds a piece of a product's result holds such elements together, whether the tile stands or
    lies on its side; so no bits move between threads.
    """
    b = (row // 2 + tl.arange(0, M // 2))[:, None].to(tl.uint32)
    a = (column // 2 + tl.arange(0, N // 2))[None, :].to(tl.uint32)
    a, b = tl.broadcast(a, b)
    for _ in tl.static_range(_ROUNDS):
        high, low = tl.umulhi(a, 0xD256D193), a * 0xD256D193
        a, b = high ^ key ^ b, low
        key += 0x9E3779B9
    words = tl.join(a, b)  # (M / 2, N / 2, upper row or lower)
    halves = tl.join(words & 0xFFFF, words >> 16)  # and left column or right
    halves = tl.reshape(halves, (M // 16, 8, N // 16, 8, 2, 2)).permute(0, 4, 1, 2, 5, 3)
    return tl.reshape(halves, (M, N)).to(tl.int32) >= threshold


def philox_ref(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Four words of random bits from a counter of four words and a key of two. Words: int64, 0 to 2^32 - 1."""
    shape = torch.broadcast_shapes(*(word.shape for word in counter))
    # Six tensors, used again in every round: a CPU takes longer to find new memory than to compute.
    a, b, c, d = (word.expand(shape).clone(memory_format=torch.contiguous_format) for word in counter)
    p, q = torch.empty_like(a), torch.empty_like(a)
    k0, k1 = (half.reshape(()) for half in key)
    for _ in range(ROUNDS):
        torch.mul(a, 0xD2511F53, out=p)  # 64-bit products of 32-bit words; they wrap, and bits are all that counts
        torch.mul(c, 0xCD9E8D57, out=q)
        torch.bitwise_right_shift(q, 32, out=a).bitwise_xor_(b).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(p, 32, out=c).bitwise_xor_(d).bitwise_xor_(k1).bitwise_and_(_WORD)
        b, d, p, q = q, p, d, b
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [a, b.bitwise_and_(_WORD), c, d.bitwise_and_(_WORD)]


def keep_mask_ref(seed: Tensor, stream: int, M: int, N: int, threshold: int) -> Tensor:
    """The mask for M rows of N columns, (M, N) bool, in torch. seed: (1,) int64."""
    groups = -(-N // 8)
    step = max(_AT_ONCE // max(groups, 1), 1) if seed.device.type == "cpu" else max(M, 1)
    keep = torch.empty((M, N), dtype=torch.bool, device=seed.device)
    for begin in range(0, M, step):
        row = torch.arange(begin, min(begin + step, M), device=seed.device).view(-1, 1)
        group = torch.arange(groups, device=seed.device).expand(len(row), groups)
        counter = [group, row & _WORD, row >> 32, torch.tensor(stream, device=seed.device)]
        words = torch.empty((len(row), groups, 4), dtype=torch.int32, device=seed.device)
        for i, word in enumerate(philox_ref(counter, (seed & _WORD, (seed >> 32) & _WORD))):
            words[..., i] = word
        # The low half of a word lies first. With the highest bit flipped a signed comparison is the unsigned one.
        halves = words.view(torch.int16).bitwise_xor_(-32768)
        keep[begin : begin + step] = (halves >= threshold - 32768).view(len(row), groups * 8)[:, :N]
    return keep


def dropped_ref(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * scale where it is kept, 0 elsewhere, rounded once. By a product: torch's `where` takes ten times as long on a
    CPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x * keep.to(wide).mul_(scale)).to(x.dtype)


def keep_tile_ref(seed: Tensor, stream: int, heads: int, T: int, S: int, threshold: int) -> Tensor:
    """The masks of keep_tile for all heads, (heads, T, S) bool, in torch. seed: (1,) int64."""
    head = torch.arange(heads, device=seed.device)
    zero = torch.zeros_like(head)
    counter = [head, zero, zero, torch.tensor(stream, device=seed.device)]
    key = philox_ref(counter, (seed & _WORD, (seed >> 32) & _WORD))[0].view(heads, 1, 1)
    rows, columns = -(-T // 16) * 8, -(-S // 16) * 8  # pairs
    b = torch.arange(rows, device=seed.device).view(1, rows, 1)
    a = torch.arange(columns, device=seed.device).view(1, 1, columns)
    for _ in range(ROUNDS):
        product = a * 0xD256D193
        a, b = ((product >> 32) & _WORD) ^ key ^ b, product & _WORD
        key = (key + 0x9E3779B9) & _WORD
    words = torch.stack((a, b), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)  # (heads, rows, columns, 2, 2)
    halves = halves.view(heads, rows // 8, 8, columns // 8, 8, 2, 2).permute(0, 1, 5, 2, 3, 6, 4)
    return (halves >= threshold).reshape(heads, rows * 2, columns * 2)[:, :T, :S]


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
