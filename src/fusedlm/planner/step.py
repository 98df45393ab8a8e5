"""A training step, walked through in the order in which torch allocates and frees.

It follows `models/` and `kernels/` op by op: what each keeps for the backward pass, what it allocates there, and when
the last reference goes. Sizes are in bytes; M = batch * context tokens, e bytes an element, else the usual letters.
"""

from fusedlm.hardware import GPU
from fusedlm.models import GPT2Config, ModelConfig
from fusedlm.planner.parameters import Layer, parameters
from fusedlm.planner.training import ACTIVATIONS, PARTS, Memory, Training, fixed_bytes

Held = tuple[str, int]  # a part, or a kind of activation, and bytes


class Ledger:
    """What is allocated, by part and kind of activation, and the most that ever was at once."""

    def __init__(self) -> None:
        self.now = dict.fromkeys((*(part for part in PARTS if part != "activations"), *ACTIVATIONS), 0)
        self.most = dict.fromkeys(PARTS, 0)
        self.total = self.peak = 0
        self.moment = self.peak_moment = ""
        self.at_peak = dict(self.now)

    def take(self, what: str, size: float) -> Held:
        """Allocate, in blocks of 512 bytes as torch does."""
        rounded = -(-int(size) // 512) * 512
        self.now[what] += rounded
        self.total += rounded
        part = "activations" if what in ACTIVATIONS else what
        amount = sum(map(self.now.__getitem__, ACTIVATIONS)) if what in ACTIVATIONS else self.now[what]
        self.most[part] = max(self.most[part], amount)
        if self.total > self.peak:
            self.peak, self.peak_moment, self.at_peak = self.total, self.moment, dict(self.now)
        return what, rounded

    def give(self, *held: Held | None) -> None:
        """Free; None is nothing."""
        for what, size in (one for one in held if one is not None):
            self.now[what] -= size
            self.total -= size
            assert self.now[what] >= 0, f"more {what} freed than there were"

    def memory(self) -> Memory:
        activations = {kind: self.at_peak[kind] for kind in ACTIVATIONS}
        parts = {part: self.at_peak.get(part, sum(activations.values())) for part in PARTS}
        return Memory(parts, activations, self.most, self.peak_moment)


def logits_rows(vocab_size: int, e: int, M: int) -> int:
    """Rows of logits at a time: what `linear_cross_entropy` takes."""
    return min(M, max(1024, min(2**30 // (vocab_size * e), 4096) // 1024 * 1024))


class _Step:
    """Methods are named after what they walk through. Tensors go by the names they have in the models."""

    def __init__(self, config: ModelConfig, training: Training, gpu: GPU) -> None:
        self.config, self.training, self.gpu = config, training, gpu
        self.ledger, self.layer, self.parameters = Ledger(), Layer.of(config), parameters(config)
        self.gpt2 = isinstance(config, GPT2Config)
        self.M, self.e, self.g = training.tokens, training.width, training.gradient_width
        self.fp8 = training.dtype == "fp8"
        self.sharded = training.gpus > 1
        # Whether attention's backward pass is one kernel: see `_hopper_config` of kernels/attention/launches.py.
        narrow = 32 < config.head_dim <= 64 and config.head_dim % 8 == 0
        self.in_one = not training.dropout and self.e == 2 and gpu.capability == (9, 0) and narrow
        self.whole: list[Held] = []  # gradients that are not divided yet

        element = self.M * self.e
        self.x = element * config.width  # (M, C)
        # Biases whose gradient a norm sums.
        self.by_norms = config.width if self.layer.biases and config.width <= 4096 else 0
        self.q = element * config.n_heads * config.head_dim  # (M, H * D)
        self.k = element * config.n_kv_heads * config.head_dim  # (M, G * D)
        self.qkv = element * config.qkv_width
        self.up = element * self.layer.up[0]  # (M, F), or (M, 2F) where it holds gate and up
        self.act = element * config.mlp_width  # (M, F)
        self.delta = self.M * 4 * config.n_heads
        self.lse = self.delta * (2 if self.e > 2 else 1)
        self.dq = self.M * 4 * config.n_heads * config.head_dim  # its sums in fp32
        self.stats = self.M * 4 * (2 if self.gpt2 else 1)  # rstd, and a mean

    def residual(self, size: float) -> Held:
        return self.ledger.take("residual", size)

    def attention(self, size: float) -> Held:
        return self.ledger.take("attention", size)

    def mlp(self, size: float) -> Held:
        return self.ledger.take("mlp", size)

    def input(self, kind: str, size: float) -> Held:
        """What one of a block's products keeps for its dw."""
        return self.ledger.take(kind, size / 2 if self.fp8 else size)

    # Forward

    def block_forward(self, x: Held, first: bool) -> tuple[dict[str, Held], Held]:
        """x: what the block before gave; the embedding, of the first one. Returns what ops keep, and the output."""
        kept = {"y1": self.input("residual", self.x)}
        kept["s1"] = x if first else self.residual(self.x)  # the residual stream is what the norm keeps
        kept["stats1"] = self.residual(self.stats)
        if not first and self.training.recompute != "blocks":
            self.ledger.give(x)
        kept["qkv"] = self.attention(self.qkv)
        if not self.gpt2:  # rotated, beside a copy of v
            rotated = self.attention(self.qkv)
            self.ledger.give(kept["qkv"])
            kept["qkv"] = rotated
        kept["o"], kept["lse"] = self.attention(self.q), self.attention(self.lse)
        if self.fp8:
            kept["o8"] = self.input("attention", self.q)
        a = self.residual(self.x)
        self.drop(kept, "y1")
        kept["y2"], kept["s2"] = self.input("residual", self.x), self.residual(self.x)
        kept["stats2"] = self.residual(self.stats)
        self.ledger.give(a)
        kept["up"] = self.mlp(self.up)
        act = self.input("mlp", self.act)
        y = self.residual(self.x)
        self.ledger.give(act)
        self.drop(kept, "y2")
        return kept, y

    def drop(self, kept: dict[str, Held], name: str) -> None:
        """What is cheap to compute again is not kept where so asked."""
        if self.training.recompute == "cheap":
            self.ledger.give(kept.pop(name))

    def loss(self, y: Held) -> tuple[Held, Held]:
        """linear_cross_entropy: the gradients of y, in y's memory, and of the head are computed with the loss.

        y: the last norm.
        """
        V, C = self.config.vocab_size, self.config.width
        take = self.ledger.take
        dw = take("logits", V * C * 4)  # a sum in fp32
        losses = take("logits", self.M * 4)
        chunk = take("logits", logits_rows(V, self.e, self.M) * V * self.e)
        self.ledger.give(chunk, losses)
        return y, dw

    # Backward

    def gradient(self, count: int) -> None:
        """Of `count` parameters of a block. Accumulated, it goes into the sum that is there."""
        if self.sharded:
            self.whole.append(self.ledger.take("workspace", count * self.e))
        elif self.training.accumulate:
            self.ledger.give(self.widened("workspace", count))
        else:
            self.widened("gradients", count)

    def widened(self, part: str, count: int, workspace: float = 0) -> Held:
        """The gradient of `count` parameters in the dtype that is kept, a copy where that is wider than theirs.

        workspace: bytes that computing it takes beside it.
        """
        narrow = self.ledger.take(part if self.g == self.e else "workspace", count * self.e)
        self.ledger.give(self.ledger.take("workspace", workspace))
        if self.g == self.e:
            return narrow
        wide = self.ledger.take(part, count * self.g)
        self.ledger.give(narrow)
        return wide

    def table_gradient(self, part: str, count: int, workspace: float = 0) -> Held:
        """Of the embedding or the head. FSDP divides it before it is widened."""
        if not self.sharded:
            return self.widened(part, count, workspace)
        held = self.ledger.take(part, count * self.e)
        self.ledger.give(self.ledger.take("workspace", workspace))
        return held

    def bias_sums(self, N: int) -> None:
        """Of N biases: partial sums over parts of the rows, in blocks of columns; see kernels/_columns.py."""
        if self.layer.biases:
            blocks = -(-N // min(1 << (N - 1).bit_length(), 256))
            parts = max(4 * self.gpu.sms // blocks, 1)
            self.ledger.give(self.ledger.take("workspace", min(parts, self.M / 8) * N * 4))

    def activation_sums(self) -> None:
        """Of the biases before GELU: partial sums of the product that makes their gradient; see kernels/linear."""
        if self.gpu.capability != (9, 0) or self.e != 2:
            self.bias_sums(self.layer.up[0])
        elif self.layer.biases:
            self.ledger.give(self.ledger.take("workspace", 8 * -(-self.M // 256) * self.layer.up[0] * 4))

    def divide(self) -> None:
        """FSDP: of gradients that are whole, and summed over GPUs, each keeps its part."""
        for held in self.whole:
            if not self.training.accumulate:
                self.ledger.take("gradients", held[1] / self.e * self.g / self.training.gpus)
            self.ledger.give(held)
        self.whole = []

    def norm_backward(self, dy: Held, ds: Held | None, s: Held, stats: Held, dropped: bool) -> tuple[Held, Held | None]:
        """The gradients of the residual and, where there is dropout, of what was added to it; else it is the same."""
        dr = self.residual(self.x)
        dx = self.residual(self.x) if dropped else None
        # Each program's sums of dw (and db, and of dx); as many programs as fill the GPU with rows of this width.
        block = 1 << (self.config.width - 1).bit_length()
        alone = (8, 24) if block <= 1024 else (16, 16)
        each, warps = (16, 12) if self.by_norms else (32, 8) if ds is not None else alone
        programs = self.gpu.sms * min(max(warps // min(max(block // (32 * each), 1), 32), 1), 16)
        count = self.layer.norm + self.by_norms
        partial = self.ledger.take("workspace", count * min(self.M, programs) * 4)
        self.gradient(count)
        self.ledger.give(partial, dy, ds, s, stats)
        return dr, dx

    def block_backward(self, kept: dict[str, Held], dr: Held, dx: Held | None, first: bool) -> tuple[Held, Held | None]:
        """dr: the gradient of the residual stream behind the block. dx: of the block's output, where it is another."""
        give, layer = self.ledger.give, self.layer
        if "y2" not in kept:
            kept["y2"] = self.input("residual", self.x)
        dup, act = self.mlp(self.up), self.input("mlp", self.act)  # or the gradient of act, where no kernel has both
        self.activation_sums()
        self.gradient(layer.size(layer.down) - self.by_norms)
        give(act)
        if not self.by_norms:
            self.bias_sums(layer.down[0])
        dy = self.residual(self.x)
        self.gradient(layer.size(layer.up))
        give(dx, dup, kept["up"], kept["y2"])
        dr, dx = self.norm_backward(dy, dr, kept["s2"], kept["stats2"], self.training.dropout)

        do = self.attention(self.q)
        self.gradient(layer.size(layer.out) - self.by_norms)
        if not self.by_norms:
            self.bias_sums(layer.out[0])
        give(dx, kept.get("o8"))
        delta = self.attention(self.delta)
        dqkv = self.attention(self.qkv)  # side by side
        sums = self.attention(self.dq) if self.in_one else None
        give(delta, sums, do, *(kept.get(name) for name in ("qkv", "o", "lse")))
        if not self.gpt2:  # rotated back
            rotated = self.attention(self.qkv)
            give(dqkv)
            dqkv = rotated
        if "y1" not in kept:
            kept["y1"] = self.input("residual", self.x)
        dy = self.residual(self.x)
        self.gradient(layer.size(layer.qkv))
        self.bias_sums(layer.qkv[0])
        give(dqkv, kept["y1"])
        return self.norm_backward(dy, dr, kept["s1"], kept["stats1"], self.training.dropout and not first)

    # The whole step

    def before(self) -> None:
        """What is there before it begins, and to its end."""
        training, take = self.training, self.ledger.take
        for part, size in fixed_bytes(self.config, training).items():
            take(part, size)
        if training.accumulate:
            take("gradients", self.parameters.total * self.g / training.gpus)
        take("workspace", 2 * blas_workspace(self.gpu))  # for the thread that goes forward and the one that goes back
        take("workspace", 2 * self.M * 8)  # ids and targets
        take("workspace", 16 * self.parameters.total / 1024 / training.gpus)  # the optimizer's table of chunks
        if self.sharded:  # whole: what is in no block, and all blocks or the one that is computed and the next
            blocks = self.config.n_layers * self.layer.total
            outside = self.parameters.total - blocks
            whole = min(2 * self.layer.total, blocks) if training.reshard else blocks
            take("workspace", (outside + whole) * self.e)
            if training.direct:  # what is gathered, two blocks at once; the gradients that are sent and received
                take("workspace", (3 * outside + 4 * self.layer.total) * self.e)

    def forward(self) -> tuple[dict[str, Held], list[dict[str, Held]], list[list[Held]]]:
        """What the last norm keeps and gives, what the blocks keep, and their inputs where those are all they keep."""
        again = self.training.recompute == "blocks"
        x = self.residual(self.x)  # the embedding
        residual: Held | None = None
        blocks, inputs = [], []
        for i in range(self.config.n_layers):
            kept, y = self.block_forward(x, first=i == 0)
            if again:
                inputs.append([x] if residual is None else [x, residual])
                residual = kept["s2"]
                self.ledger.give(*(held for held in kept.values() if held is not x and held is not residual))
            blocks.append(kept)
            x = y
        last = {"y": self.residual(self.x), "s": self.residual(self.x), "stats": self.residual(self.stats)}
        self.ledger.give(x, residual)
        return last, blocks, inputs

    def backward(
        self, last: dict[str, Held], blocks: list[dict[str, Held]], inputs: list[list[Held]], loss: tuple[Held, Held]
    ) -> None:
        config, training, ledger = self.config, self.training, self.ledger
        table, n = config.vocab_size * config.width, config.n_layers
        part = "workspace" if self.sharded or training.accumulate else "gradients"
        ledger.moment = "backward of the loss"
        dy = self.residual(self.x)
        # A tied one waits for the embedding's rows, see kernels/_tied.py, and is widened with them.
        waits = config.tied and not self.sharded and self.g != self.e
        head = ledger.take("workspace", table * self.e) if waits else self.table_gradient(part, table)
        ledger.give(*loss)
        at_once = training.accumulate and not self.sharded  # a gradient is summed as soon as it is whole
        if at_once and not config.tied:
            ledger.give(head)
        dr, dx = self.norm_backward(dy, None, last["s"], last["stats"], training.dropout)
        self.divide()
        for i in range(n - 1, -1, -1):
            ledger.moment = f"backward of block {i + 1} of {n}"
            kept = blocks.pop()
            if training.recompute == "blocks":
                kept, y = self.block_forward(inputs[i][0], first=i == 0)
                ledger.give(y)
            dr, dx = self.block_backward(kept, dr, dx, first=i == 0)
            self.divide()
            if training.recompute == "blocks" and i > 0:
                ledger.give(*inputs[i])
        ledger.moment = "backward of the embedding"
        positions = ledger.take("workspace", self.parameters.positions * self.e)  # of the same op as the table's
        # Sums of runs of ids that cross chunks; and the ids, sorted. See kernels/embedding.
        chunks = -(-self.M // (8 if self.M <= 16384 else 32))
        workspace, embedding = chunks * config.width * 4 * 2 + self.M * 24, None
        if config.tied:
            ledger.give(ledger.take("workspace", workspace))
            if waits:
                narrow, head = head, ledger.take(part, table * self.g)
                ledger.give(narrow)
        else:
            embedding = self.table_gradient(part, table, workspace)
        ledger.give(dr, positions)
        if self.parameters.positions:
            self.gradient(self.parameters.positions)
        if at_once:  # added to what there was
            ledger.give(embedding)
        if self.sharded:
            self.whole += [head] if embedding is None else [head, embedding]
            self.divide()
        elif at_once and config.tied:
            ledger.give(head)

    def walk(self) -> Memory:
        ledger, rotary = self.ledger, self.training.context * self.config.head_dim // 2 * 4
        ledger.moment = "forward"
        self.before()
        tables = [] if self.gpt2 else [ledger.take("workspace", rotary) for _ in range(2)]  # cosines and sines
        last, blocks, inputs = self.forward()
        ledger.moment = "the loss"
        loss = self.loss(last.pop("y"))
        self.backward(last, blocks, inputs, loss)
        ledger.give(*tables)
        ledger.moment = "the optimizer's step"
        ledger.take("workspace", 1)
        return ledger.memory()


def walk(config: ModelConfig, training: Training, gpu: GPU) -> Memory:
    """The memory of a step, see `fusedlm.planner.training_memory`."""
    return _Step(config, training, gpu).walk()


def blas_workspace(gpu: GPU) -> int:
    """Bytes that torch gives to cuBLAS, for each thread that calls it: 32 MiB from Hopper on, else 8.1 MiB.

    (":4096:2:16:8" in cuBLAS's own terms. On Blackwell older versions of torch give 8.1 MiB, too.)
    """
    return 2**25 if gpu.capability >= (9, 0) else 2 * 4096 * 1024 + 8 * 16 * 1024
