"""Compiled steps: the numbers of float64 for every format, odd widths and any number of threads; nothing outside what
they are given is read or written."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("numba", reason="compiled steps need numba (the extra cpu)")

from fusedlm.inference.compiled import CompiledDecoder
from fusedlm.inference.compiled.step import TOKENS
from fusedlm.inference.decoder import EagerDecoder, make_decoder
from fusedlm.inference.language_model import LanguageModel
from fusedlm.kernels import backend
from fusedlm.models import PRESETS, DecoderModel
from fusedlm.models.quantized import Int8Weight

Build = Callable[..., DecoderModel]

GPT2, LLAMA = (replace(PRESETS[name], context_length=600) for name in ("tiny-gpt2", "tiny-llama"))
CONFIGS = {
    "gpt2-no-biases": replace(GPT2, bias=False),
    "gpt2": GPT2,
    "gpt2-odd": replace(GPT2, width=123, head_dim=25, n_kv_heads=2, mlp_width=333, vocab_size=517),
    "gpt2-multi-query": replace(GPT2, n_kv_heads=1, head_dim=24),
    "llama": LLAMA,
    "llama-odd": replace(LLAMA, width=77, head_dim=22, mlp_width=131, vocab_size=517, tied=False),
    "llama-wide-heads": replace(LLAMA, width=200, n_heads=2, n_kv_heads=1, head_dim=144, mlp_width=7, vocab_size=35),
}


def prompt(n: int, V: int = 512) -> list[int]:
    return torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).abs().max() / truth.abs().max())


def quantized(model: DecoderModel) -> DecoderModel:
    for name, parameter in list(model.named_parameters()):
        if parameter.ndim == 2 and name != "positions.weight":
            owner, _, leaf = name.rpartition(".")
            weight = Int8Weight.quantize(parameter.detach())
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    return model


def as_float64(model: DecoderModel, build: Build) -> DecoderModel:
    """The same weights, quantisation and all, in a model of float64."""
    truth = build(model.config, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
            theirs.copy_(ours.widen() if isinstance(ours, Int8Weight) else ours)
    return truth


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def model_of(request: pytest.FixtureRequest, random_model: Build) -> Build:
    def build(config: object) -> DecoderModel:
        dtype = {"bfloat16": torch.bfloat16}.get(request.param, torch.float32)
        model = random_model(config, dtype=dtype)
        return quantized(model) if request.param == "int8" else model

    return build


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_prompts_and_steps_give_the_logits_of_one_pass(
    config: str, threads: int, model_of: Build, random_model: Build
) -> None:
    model = model_of(CONFIGS[config])
    n, steps = TOKENS + 3, 9  # more than one pass, and not a multiple of four
    ids = prompt(n + steps, model.config.vocab_size)
    with torch.no_grad():
        truth = as_float64(model, random_model)(torch.tensor([ids]))[0]
    decoder = CompiledDecoder(model, n + steps, threads=threads)
    # bfloat16 weights are computed with in float32, and keys and values are kept in bfloat16.
    limit = 0.01 if decoder.cache.keys.dtype == torch.bfloat16 else 2e-6
    assert error(decoder.prefill([ids[:n]])[0], truth[n - 1]) < limit
    for i in range(n, n + steps):
        assert error(decoder.step([ids[i]], [True])[0], truth[i]) < limit


@pytest.mark.parametrize("n", [1, 2, 3, 4, 17, TOKENS - 1, TOKENS, TOKENS + 1])
def test_prompts_of_any_length(n: int, random_model: Build) -> None:
    model = random_model(LLAMA)
    with torch.no_grad():
        truth = random_model(LLAMA, dtype=torch.float64)(torch.tensor([prompt(n)]))[0, -1]
    assert error(CompiledDecoder(model, n).prefill([prompt(n)])[0], truth) < 2e-6


@pytest.mark.parametrize("config", CONFIGS)
def test_steps_are_those_of_the_eager_decoder(config: str, random_model: Build) -> None:
    model = random_model(CONFIGS[config])
    ids = prompt(30, model.config.vocab_size)
    ours, theirs = CompiledDecoder(model, 30), EagerDecoder(model, 1, 30)
    ours.prefill([ids[:9]])
    theirs.prefill([ids[:9]])
    for token in ids[9:]:
        assert error(ours.step([token], [True]), theirs.step([token], [True]).double()) < 1e-5


def test_attention_over_several_segments_of_the_cache(random_model: Build) -> None:
    config = replace(LLAMA, context_length=6000)
    model, ids = random_model(config), prompt(700)
    with torch.no_grad():
        truth = random_model(config, dtype=torch.float64)(torch.tensor([ids]))[0]
    decoder = CompiledDecoder(model, 5000)  # segments of 320
    assert error(decoder.prefill([ids[:639]])[0], truth[638]) < 5e-6
    for i in range(639, 645):
        assert error(decoder.step([ids[i]], [True])[0], truth[i]) < 5e-6


def test_nothing_behind_the_end_is_read_or_written(random_model: Build) -> None:
    """Weights and cache lie between NaNs that would show in the logits, and must be NaNs still."""
    config = CONFIGS["llama-odd"]
    model = random_model(config)
    guarded = []
    for name, parameter in list(model.named_parameters()):
        whole = torch.full((parameter.numel() + 64,), torch.nan)
        inside = whole[32:-32].view(parameter.shape)
        inside.copy_(parameter.detach())
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(inside, requires_grad=False))
        guarded.append(whole)
    decoder = CompiledDecoder(model, 40)
    for kind in ("keys", "values"):
        cache = getattr(decoder.cache, kind)
        whole = torch.full((cache.numel() + 64,), torch.nan)
        setattr(decoder.cache, kind, whole[32:-32].view(cache.shape))
        guarded.append(whole)
    decoder = _again(decoder)
    ids = prompt(40)
    with torch.no_grad():
        truth = random_model(config, dtype=torch.float64)(torch.tensor([ids]))[0]
    assert error(decoder.prefill([ids[:37]])[0], truth[36]) < 2e-6
    for i in range(37, 40):
        assert error(decoder.step([ids[i]], [True])[0], truth[i]) < 2e-6
    for whole in guarded:
        assert whole[:32].isnan().all()
        assert whole[-32:].isnan().all()


def _again(decoder: CompiledDecoder) -> CompiledDecoder:
    """The decoder over the cache that it has been given since."""
    from fusedlm.inference.compiled.program import Program

    decoder._program = Program(decoder.model, decoder.cache, decoder.threads)
    return decoder


def test_threads_that_come_late_or_never_change_nothing(random_model: Build) -> None:
    """Helpers that sleep before they take part find the pass under way, over, or a later one begun."""
    model, ids = random_model(LLAMA), prompt(60)
    with torch.no_grad():
        truth = random_model(LLAMA, dtype=torch.float64)(torch.tensor([ids]))[0]
    decoder = CompiledDecoder(model, 60, threads=4)
    submits = [helper.submit for helper, _ in decoder._helpers]
    for i, (helper, _) in enumerate(decoder._helpers):

        def late(work: Callable[..., None], own: Tensor, i: int = i) -> object:
            return submits[i](lambda: (time.sleep(0.002 * i), work(own)))

        helper.submit = late  # type: ignore[assignment, method-assign]
    assert error(decoder.prefill([ids[:20]])[0], truth[19]) < 2e-6
    for i in range(20, 60):
        assert error(decoder.step([ids[i]], [True])[0], truth[i]) < 2e-6


def test_decoders_side_by_side_do_not_mix(random_model: Build) -> None:
    model, ids = random_model(GPT2), [prompt(40 + i) for i in range(3)]
    with torch.no_grad():
        expected = [random_model(GPT2, dtype=torch.float64)(torch.tensor([x[:40]]))[0] for x in ids]
    errors: list[float] = []

    def work(i: int) -> None:
        decoder = CompiledDecoder(model, 40, threads=2)
        decoder.prefill([ids[i][:10]])
        errors.extend(error(decoder.step([ids[i][t]], [True])[0], expected[i][t]) for t in range(10, 40))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 90
    assert max(errors) < 2e-6


@pytest.mark.parametrize("changed", [0, 5, 11, 12])
def test_a_prompt_that_begins_as_the_last_one_is_read_from_where_it_differs(changed: int, random_model: Build) -> None:
    decoder = CompiledDecoder(random_model(LLAMA), 60)
    first = prompt(12)
    decoder.prefill([first])
    decoder.step([3], [True])
    second = [*first, 3, *prompt(9)]
    if changed < 12:
        second[changed] = (second[changed] + 1) % 512
    read: list[int] = []
    original = decoder._pass
    decoder._pass = lambda tokens, *rest, **more: (read.append(len(tokens)), original(tokens, *rest, **more))[1]  # type: ignore
    logits = decoder.prefill([second])
    assert sum(read) == len(second) - (changed if changed < 12 else 13)
    with torch.no_grad():
        truth = random_model(LLAMA, dtype=torch.float64)(torch.tensor([second]))[0, -1]
    assert error(logits[0], truth) < 2e-6


def test_a_cache_that_is_full_says_so(random_model: Build) -> None:
    decoder = CompiledDecoder(random_model(LLAMA), 10)
    with pytest.raises(ValueError, match="11 tokens do not fit a cache of 10"):
        decoder.prefill([prompt(11)])
    decoder.prefill([prompt(10)])
    with pytest.raises(ValueError, match="11 tokens do not fit a cache of 10"):
        decoder.step([1], [True])


@pytest.mark.parametrize("token", [-1, 512])
def test_a_token_that_does_not_exist_is_refused(token: int, random_model: Build) -> None:
    decoder = CompiledDecoder(random_model(PRESETS["tiny-gpt2"]), 200)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 512\)"):
        decoder.prefill([[1, token]])
    with pytest.raises(ValueError, match="129 tokens do not fit the model's context of 128"):
        decoder.prefill([prompt(129)])


def test_which_decoder_is_made(random_model: Build) -> None:
    model = random_model(LLAMA)
    assert isinstance(make_decoder(model, 1, 8), CompiledDecoder)
    assert type(make_decoder(model, 2, 8)) is EagerDecoder
    assert type(make_decoder(random_model(LLAMA, dtype=torch.float64), 1, 8)) is EagerDecoder
    with backend("torch"):
        assert type(make_decoder(model, 1, 8)) is EagerDecoder


def test_generation_is_the_same_with_and_without(random_model: Build) -> None:
    model = LanguageModel(random_model(LLAMA))
    ours = model.generate(prompt(20), max_new_tokens=30)
    with backend("torch"):
        theirs = model.generate(prompt(20), max_new_tokens=30)
    assert ours.token_ids == theirs.token_ids  # type: ignore[union-attr]


def test_a_process_ends_while_its_helpers_sleep_or_work() -> None:
    code = """
import torch
from fusedlm.inference.compiled import CompiledDecoder
from fusedlm.inference.compiled.step import TOKENS
from fusedlm.models import PRESETS, build_model
model = build_model(PRESETS["tiny-llama"])
model.init_weights()
decoder = CompiledDecoder(model.eval(), 20, threads=4)
decoder.prefill([[1, 2, 3]])
decoder.step([1], [True])
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
