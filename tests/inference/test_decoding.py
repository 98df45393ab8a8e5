"""With a cache, without one, in chunks, batched: the same tokens, and logits within 1e-5 (float32)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusedlm.inference.decoder import EagerDecoder
from fusedlm.inference.generation import Generation
from fusedlm.inference.language_model import LanguageModel
from fusedlm.models import PRESETS, DecoderModel

Build = Callable[..., DecoderModel]

CONFIGS = {
    "gpt2": PRESETS["tiny-gpt2"],
    "gpt2-grouped": replace(PRESETS["tiny-gpt2"], n_kv_heads=2),
    "gpt2-multi-query": replace(PRESETS["tiny-gpt2"], n_kv_heads=1, head_dim=24),
    "llama-grouped": PRESETS["tiny-llama"],
    "llama-multi-query": replace(PRESETS["tiny-llama"], n_kv_heads=1),
    "llama-multi-head": replace(PRESETS["tiny-llama"], n_kv_heads=4, head_dim=20, tied=False),
}


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).abs().max() / truth.abs().max())


def truth(build: Build, config: str, ids: Sequence[int]) -> Tensor:
    """Logits of every position in one pass, float64, no cache: (T, V)."""
    with torch.no_grad():
        return build(CONFIGS[config], dtype=torch.float64)(torch.tensor([list(ids)]))[0]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
def test_prefill_and_steps_give_the_logits_of_one_pass(config: str, chunk: int, random_model: Build) -> None:
    ids = prompt(40)
    expected = truth(random_model, config, ids)
    decoder = EagerDecoder(random_model(CONFIGS[config]), 1, 40, chunk=chunk)
    assert error(decoder.prefill([ids[:23]])[0], expected[22]) < 1e-5
    for i in range(23, 40):
        assert error(decoder.step([ids[i]], [True])[0], expected[i]) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("chunk", [4, 512])
def test_a_batch_of_different_lengths_gives_each_what_it_gets_alone(
    config: str, chunk: int, random_model: Build
) -> None:
    lengths, steps = [5, 1, 17, 9], 12
    sequences = [prompt(n + steps, seed=n) for n in lengths]
    decoder = EagerDecoder(random_model(CONFIGS[config]), len(lengths), max(lengths) + steps, chunk=chunk)
    decoder.cache.keys.fill_(torch.nan)  # memory that nobody wrote must not be read
    decoder.cache.values.fill_(torch.nan)
    logits = [decoder.prefill([s[:n] for s, n in zip(sequences, lengths, strict=True)])]
    logits += [
        decoder.step([s[n + i] for s, n in zip(sequences, lengths, strict=True)], [True] * 4) for i in range(steps - 1)
    ]
    for b, (s, n) in enumerate(zip(sequences, lengths, strict=True)):
        expected = truth(random_model, config, s)
        for i, step in enumerate(logits):
            assert error(step[b], expected[n - 1 + i]) < 1e-5, (b, i)


def test_a_sequence_that_has_ended_leaves_the_others_alone(random_model: Build) -> None:
    decoder = EagerDecoder(random_model("tiny-llama"), 2, 30)
    a, b = prompt(20, 1), prompt(20, 2)
    decoder.prefill([a[:10], b[:4]])
    for i in range(6):
        logits = decoder.step([a[10], b[4 + i]], [False, True])
    with torch.no_grad():
        assert error(logits[1], random_model("tiny-llama", dtype=torch.float64)(torch.tensor([b[:10]]))[0, -1]) < 1e-5


@pytest.mark.parametrize("changed", [0, 5, 11, 12])
def test_a_prompt_that_begins_as_the_last_one_is_read_from_where_it_differs(changed: int, random_model: Build) -> None:
    model = random_model("tiny-llama")
    decoder = EagerDecoder(model, 1, 60)
    first = prompt(12)
    decoder.prefill([first])
    generated = prompt(3, seed=9)
    for token in generated:
        decoder.step([token], [True])
    second = [*first, *generated, *prompt(9, seed=5)]
    if changed < 12:
        second[changed] = (second[changed] + 1) % 512
    read: list[int] = []
    original = model.hidden_states
    model.hidden_states = lambda ids, cache=None: (read.append(ids.shape[1]), original(ids, cache))[1]  # type: ignore
    logits = decoder.prefill([second])
    assert sum(read) == len(second) - (changed if changed < 12 else 15)
    with torch.no_grad():
        expected = random_model("tiny-llama", dtype=torch.float64)(torch.tensor([second]))[0, -1]
    assert error(logits[0], expected) < 1e-5


def test_the_same_prompt_again_gives_the_same_logits(random_model: Build) -> None:
    decoder = EagerDecoder(random_model("tiny-llama"), 1, 60)
    first = decoder.prefill([prompt(12)])
    assert error(decoder.prefill([prompt(12)]), first.double()) < 1e-6


def test_an_interrupted_prefill_does_not_spoil_the_next_one(random_model: Build) -> None:
    model = random_model("tiny-llama")
    decoder = EagerDecoder(model, 1, 60, chunk=4)
    first = prompt(20)
    decoder.prefill([first])
    original, passes = model.hidden_states, []

    def interrupted(ids: Tensor, cache: object = None) -> Tensor:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return original(ids, cache)  # type: ignore[arg-type]

    model.hidden_states = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        decoder.prefill([prompt(20, seed=3)])
    model.hidden_states = original  # type: ignore[method-assign]
    with torch.no_grad():
        expected = random_model("tiny-llama", dtype=torch.float64)(torch.tensor([first]))[0, -1]
    assert error(decoder.prefill([first])[0], expected) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
def test_greedy_tokens_are_those_of_the_model_without_a_cache(config: str, random_model: Build) -> None:
    model = random_model(CONFIGS[config])
    ids = prompt(6)
    result = LanguageModel(model).generate(ids, max_new_tokens=20, temperature=0)
    assert isinstance(result, Generation)
    with torch.no_grad():
        for _ in range(20):
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    assert result.token_ids == ids[6:]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 50, "seed": 3}])
def test_generated_text_is_the_same_alone_and_in_a_batch(options: dict[str, float], random_model: Build) -> None:
    model = LanguageModel(random_model("tiny-llama"))
    prompts = [prompt(n, seed=n) for n in (3, 30, 11)]
    together = model.generate(prompts, max_new_tokens=15, **options)
    assert isinstance(together, list)
    for ids, result in zip(prompts, together, strict=True):
        alone = model.generate(ids, max_new_tokens=15, **options)
        assert isinstance(alone, Generation)
        assert alone.token_ids == result.token_ids


def test_a_cache_that_is_full_says_so(random_model: Build) -> None:
    decoder = EagerDecoder(random_model("tiny-llama"), 1, 10)
    with pytest.raises(ValueError, match="11 tokens do not fit a cache of 10"):
        decoder.prefill([prompt(11)])
