"""What each step from the plainest generation to the fastest is worth on this machine, on GPT-2's shape.

The first steps are those of a C++ effort: attention that keeps keys and values; only the current token through linear
layers, GELU and residual; a table of 65,536 half-precision GELU values. Ours are the compiled step and narrow weights.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedlm.inference.bench.decode import GPT2_SHAPE, Setting, bench_model, in_precision
from fusedlm.inference.bench.runners import DecoderRunner, Runner, random_prompt
from fusedlm.inference.cache import KVCache
from fusedlm.inference.decoder import EagerDecoder, make_decoder
from fusedlm.kernels import gelu
from fusedlm.models import DecoderModel
from fusedlm.models.gpt2 import MLP


class NoCache:
    """The whole sequence through the whole model at every token."""

    name = "no cache"

    def __init__(self, model: DecoderModel) -> None:
        self.model = model
        self.tokens: list[int] = []

    def read(self, prompt: Sequence[int]) -> int:
        self.tokens = list(prompt)
        return self._next()

    def step(self, token: int) -> int:
        self.tokens.append(token)
        return self._next()

    @torch.inference_mode()
    def _next(self) -> int:
        return int(self.model.logits(self._hidden(torch.tensor([self.tokens]))[:, -1])[0].argmax())

    def _hidden(self, ids: Tensor) -> Tensor:
        return self.model.hidden_states(ids)


class _LastQuery:
    """A cache for a model that is given the whole sequence: keeps the last token's keys, attends its query alone."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def positions(self, T: int) -> Tensor:
        return torch.arange(T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.zeros_like(q)
        y[:, :, -1:] = self.cache.attend(layer, q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])
        return y


class CachedAttention(NoCache):
    """Keys and values are kept and attention is the current token's; all tokens still go through everything else."""

    name = "keys and values cached"

    def __init__(self, model: DecoderModel, capacity: int) -> None:
        super().__init__(model)
        self.cache = KVCache(model.config, 1, capacity, dtype=torch.float32, device=torch.device("cpu"))

    def read(self, prompt: Sequence[int]) -> int:
        self.cache.truncate(0)
        with torch.inference_mode():
            self.model.hidden_states(torch.tensor([list(prompt[:-1])]), self.cache)
        self.cache.advance([len(prompt) - 1], len(prompt) - 1)
        return super().read(prompt)

    def _hidden(self, ids: Tensor) -> Tensor:
        hidden = self.model.hidden_states(ids, _LastQuery(self.cache))
        self.cache.advance([1], 1)
        return hidden


def gelu_table() -> Tensor:
    """tanh-GELU of every float16, by its bits: 65,536 values, 128 KB."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return torch.roll(F.gelu(every.float(), approximate="tanh").half(), 2**15)  # index: the bits without a sign


class _TableMLP(MLP):
    """GPT-2's, with GELU looked up."""

    table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        bits = self.up(x).half().view(torch.int16).int() & 0xFFFF
        return self.down(self.table[bits].to(x.dtype))


def _with_table(model: DecoderModel) -> DecoderModel:
    copy: Any = in_precision(model, "float32")
    table = gelu_table()
    for block in copy.blocks:
        block.mlp.__class__ = _TableMLP
        block.mlp.table = table
    return copy


def ablate(setting: Setting) -> list[dict[str, Any]]:
    """Rows {"step", "token_seconds"}; and {"gelu", "token_seconds"} for the GELUs of a token alone."""
    model, _ = bench_model(GPT2_SHAPE)
    capacity = setting.prompt + setting.new_tokens + 1

    def compiled(name: str, precision: str) -> Runner:
        return DecoderRunner(name, make_decoder(in_precision(model, precision), 1, capacity, threads=setting.threads))

    found: list[Runner] = [
        NoCache(model),
        CachedAttention(model, capacity),
        DecoderRunner("only the current token", EagerDecoder(model, 1, capacity)),
        DecoderRunner("GELU from a table", EagerDecoder(_with_table(model), 1, capacity)),
        compiled("compiled step", "float32"),
        compiled("compiled step, bfloat16", "bfloat16"),
        compiled("compiled step, int8", "int8"),
    ]
    prompt = random_prompt(setting.prompt, model.config.vocab_size)
    times: dict[str, list[float]] = {r.name: [] for r in found}
    tokens: dict[str, list[int]] = {}
    for _ in range(setting.rounds):
        for r in found:
            n = 16 if isinstance(r, NoCache) else setting.new_tokens
            if r.name not in tokens:
                r.step(r.read(prompt))  # compiles and allocates
            token, each, chosen = r.read(prompt), [], []
            for _ in range(n):
                start = time.perf_counter()
                token = r.step(token)
                each.append(time.perf_counter() - start)
                chosen.append(token)
            times[r.name].append(statistics.median(each))
            tokens[r.name] = chosen
    rows: list[dict[str, Any]] = [
        {
            "step": name,
            "token_seconds": statistics.median(seconds),
            "first_16_tokens_as_without_cache": tokens[name][:16] == tokens["no cache"],
        }
        for name, seconds in times.items()
    ]
    return rows + _gelu_alone(model.config.n_layers, model.config.mlp_width)


def _gelu_alone(layers: int, width: int) -> list[dict[str, Any]]:
    """Seconds that a token spends in GELU, by several ways to compute it."""
    x = torch.randn(width, generator=torch.Generator().manual_seed(0))
    table = gelu_table()
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: gelu(x, approximate="tanh"),
        "torch, from a table": lambda: table[x.half().view(torch.int16).int() & 0xFFFF].float(),
    }
    try:
        from fusedlm.inference.compiled.lessons import gelu_by_table, gelu_by_tanh, gelu_by_vectors
    except ImportError:
        pass
    else:
        y = torch.empty_like(x)
        ways["compiled, tanh one by one"] = lambda: gelu_by_tanh(x.data_ptr(), y.data_ptr(), width)
        ways["compiled, from a table"] = lambda: gelu_by_table(x.data_ptr(), y.data_ptr(), table.data_ptr(), width)
        ways["compiled, vectors"] = lambda: gelu_by_vectors(x.data_ptr(), y.data_ptr(), width)
    rows = []
    for name, work in ways.items():
        work()
        each = []
        for _ in range(200):
            start = time.perf_counter()
            work()
            each.append(time.perf_counter() - start)
        rows.append({"gelu": name, "token_seconds": layers * statistics.median(each)})
    return rows
