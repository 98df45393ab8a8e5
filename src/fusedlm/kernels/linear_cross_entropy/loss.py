"""For every GPU: losses of rows of logits, which become their own gradient in place."""

from fusedlm.kernels._index_errors import flag_index
from fusedlm.kernels._triton import tl, triton
from fusedlm.kernels.cross_entropy import gradient_factors, probabilities, row_loss, row_statistics, target_logit


@triton.jit
def loss_kernel(
    x_ptr,
    t_ptr,
    loss_ptr,
    flag_ptr,
    M,
    V,
    ignore,
    smoothing,
    z,
    SUM: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Losses of rows; their logits become their own gradient. The second reading of a row finds it in the L2 cache,
    which is why only so many programs run at once."""
    for i in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        t = tl.load(t_ptr + row)
        row_ptr = x_ptr + row * V
        lse, plain = row_statistics(row_ptr, V, SUM, BLOCK_K, BLOCK_V)
        valid = t != ignore
        inside = (t >= 0) & (t < V)
        flag_index(flag_ptr, valid & (inside == 0), t, V)
        x_t = target_logit(row_ptr, t, V)
        tl.store(loss_ptr + row, row_loss(x_t, t, lse, plain, valid, V, smoothing, z))
        if GRADIENT:
            g = tl.where(valid, tl.where(inside, 1.0, float("nan")), 0.0)
            a, b, c = gradient_factors(t, lse, g, V, smoothing, z)
            at_target = a * probabilities(x_t, lse) - b - c
            tl.debug_barrier()  # every thread has read the target's logit before it is overwritten
            cols = tl.arange(0, BLOCK_K * BLOCK_V)
            whole = V // (BLOCK_K * BLOCK_V) * (BLOCK_K * BLOCK_V)
            for start in range(0, whole, BLOCK_K * BLOCK_V):
                x = tl.load(row_ptr + start + cols).to(tl.float32)
                dx = a * probabilities(x, lse) - b
                tl.store(row_ptr + start + cols, dx.to(x_ptr.dtype.element_ty))
            if whole < V:
                mask = whole + cols < V
                x = tl.load(row_ptr + whole + cols, mask=mask, other=0.0).to(tl.float32)
                dx = a * probabilities(x, lse) - b
                tl.store(row_ptr + whole + cols, dx.to(x_ptr.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # the target's own store comes last
            tl.store(row_ptr + t, at_target.to(x_ptr.dtype.element_ty), mask=valid & inside)
