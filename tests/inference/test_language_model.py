"""Text in, text out: streams, stop strings, seeds, limits, batches, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedlm import Generation, LanguageModel, TextStream, load
from fusedlm.inference.engine import FinishReason
from fusedlm.models import PRESETS, DecoderModel
from fusedlm.tokenizer.bpe import BPETokenizer

CONFIG = replace(PRESETS["tiny-gpt2"], vocab_size=50257, width=32, mlp_width=64, head_dim=8, context_length=64)


@pytest.fixture(scope="module")
def tokenizer(gpt2_files: Path) -> BPETokenizer:
    return BPETokenizer.from_directory(gpt2_files)


@pytest.fixture
def model(random_model: Callable[..., DecoderModel], tokenizer: BPETokenizer) -> LanguageModel:
    return LanguageModel(random_model(CONFIG), tokenizer, name="tiny")


def one(result: Any) -> Generation:
    assert isinstance(result, Generation)
    return result


def test_text_is_what_the_tokens_say(model: LanguageModel, tokenizer: BPETokenizer) -> None:
    result = one(model.generate("hello world", max_new_tokens=20))
    assert result.text == tokenizer.decode(result.token_ids) == str(result)
    assert len(result.token_ids) == 20
    assert result.finish_reason is FinishReason.MAX_NEW_TOKENS
    assert result.stats.prompt_tokens == 2
    assert result.stats.new_tokens == 20
    assert len(result.stats.token_seconds) == 19
    assert result.stats.time_to_first_token > 0


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 5}])
def test_a_stream_is_the_same_text_in_pieces(options: dict[str, Any], model: LanguageModel) -> None:
    whole = one(model.generate("hello world", max_new_tokens=30, **options))
    stream = model.generate("hello world", max_new_tokens=30, stream=True, **options)
    assert isinstance(stream, TextStream)
    pieces = list(stream)
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == whole.text == stream.result.text
    assert stream.result.token_ids == whole.token_ids


def test_a_stream_has_no_result_before_its_end(model: LanguageModel) -> None:
    stream = model.generate("hello", max_new_tokens=9, stream=True)
    next(stream)
    with pytest.raises(RuntimeError, match="still running"):
        _ = stream.result


def test_a_stopped_stream_keeps_what_it_has(model: LanguageModel) -> None:
    whole = one(model.generate("hello", max_new_tokens=30)).text
    stream = model.generate("hello", max_new_tokens=30, stream=True)
    shown = next(stream) + next(stream)
    result = stream.stop()
    assert result.finish_reason is FinishReason.INTERRUPTED
    assert result.text.startswith(shown)
    assert whole.startswith(shown)
    assert list(stream) == []


def test_it_ends_before_a_stop_string_and_says_which(model: LanguageModel) -> None:
    text = one(model.generate("hello", max_new_tokens=30)).text
    stop = text[11:15]
    cut = text[: text.index(stop)]
    result = one(model.generate("hello", max_new_tokens=30, stop=[stop, "never in there"]))
    assert (result.text, result.finish_reason, result.stop) == (cut, FinishReason.STOP_STRING, stop)
    assert "".join(model.generate("hello", max_new_tokens=30, stop=stop, stream=True)) == cut
    both = model.generate(["hello", "hello"], max_new_tokens=30, stop=stop)
    assert [r.text for r in both] == [cut, cut]  # type: ignore[union-attr]


def test_it_ends_at_the_end_of_text_token(model: LanguageModel) -> None:
    free = one(model.generate("hello", max_new_tokens=10)).token_ids
    end = free[4]
    first = free.index(end)
    model.generation_config["eos_token_id"] = [end]
    result = one(model.generate("hello", max_new_tokens=10))
    assert result.token_ids == free[:first]
    assert result.finish_reason is FinishReason.END_OF_TEXT


def test_it_ends_at_the_context_limit(model: LanguageModel) -> None:
    ids = list(range(60))
    assert len(one(model.generate(ids, max_new_tokens=4)).token_ids) == 4
    assert one(model.generate(ids, max_new_tokens=4)).finish_reason is FinishReason.MAX_NEW_TOKENS
    for n in (5, None):
        result = one(model.generate(ids, max_new_tokens=n))
        assert len(result.token_ids) == 4
        assert result.finish_reason is FinishReason.CONTEXT_LIMIT


@pytest.mark.parametrize("n", [64, 65, 200])
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(n: int, model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=rf"{n} tokens.* 64"):
        model.generate([1] * n)


def test_a_seed_repeats_and_is_told(model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.5, "top_k": 40}
    first = one(model.generate("hello", **options))
    assert first.seed is not None
    assert one(model.generate("hello", seed=first.seed, **options)).token_ids == first.token_ids
    others = {tuple(one(model.generate("hello", seed=s, **options)).token_ids) for s in range(5)}
    assert len(others) == 5
    assert one(model.generate("hello", max_new_tokens=2)).seed is None


def test_samples_of_a_prompt_differ_and_the_first_is_the_one_alone(model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.5, "seed": 3}
    samples = model.generate("hello", num_samples=4, **options)
    assert isinstance(samples, list)
    assert len({tuple(s.token_ids) for s in samples}) == 4
    assert samples[0].token_ids == one(model.generate("hello", **options)).token_ids


def test_logprobs_are_those_of_the_model(model: LanguageModel, random_model: Callable[..., DecoderModel]) -> None:
    result = one(model.generate([5, 6, 7], max_new_tokens=6, logprobs=3, temperature=2.0, top_k=4, seed=0))
    assert result.logprobs is not None
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, *result.token_ids]])
        truth = random_model(CONFIG, dtype=torch.float64)(ids)[0, 2:-1].log_softmax(-1)
    for i, entry in enumerate(result.logprobs):
        assert entry.token == result.token_ids[i]
        assert math.isclose(entry.logprob, truth[i, entry.token], abs_tol=1e-4)
        assert [t for t, _ in entry.top] == truth[i].topk(3).indices.tolist()
        assert all(math.isclose(p, truth[i, t], abs_tol=1e-4) for t, p in entry.top)


def test_the_generation_config_is_the_default_and_what_is_given_wins(model: LanguageModel) -> None:
    model.generation_config.update(do_sample=True, temperature=1.4, top_k=30)
    given: dict[str, Any] = {"max_new_tokens": 20, "seed": 1}
    default = one(model.generate("hello", **given)).token_ids
    assert default == one(model.generate("hello", temperature=1.4, top_k=30, **given)).token_ids
    greedy = one(model.generate("hello", temperature=0, **given)).token_ids
    model.generation_config["do_sample"] = False
    assert greedy == one(model.generate("hello", **given)).token_ids != default


def test_logits_of_ids(model: LanguageModel) -> None:
    ids = torch.randint(0, 50257, (3, 7))
    assert model(ids).shape == (3, 7, 50257)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": []}, "no prompts|no tokens"),
    ({"prompt": [[]]}, "no tokens"),
    ({"prompt": [50257]}, r"\[0, 50257\); got 50257"),
    ({"prompt": [-1]}, "got -1"),
    ({"prompt": "\udce4"}, "surrogate"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; expected 1"),
    ({"num_samples": 0}, "num_samples is 0"),
    ({"temperature": -1.0}, "temperature is -1.0; expected"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_k": -2}, "top_k is -2"),
    ({"min_p": 2.0}, "min_p is 2.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"seed": -1}, "seed is -1"),
    ({"stop": [""]}, "stop is"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"stream": True, "num_samples": 2}, "one prompt and one sample"),
    ({"prompt": ["a", "b"], "stream": True}, "one prompt and one sample"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_nonsense_is_refused(options: dict[str, Any], message: str, model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**{"prompt": "hello", **options})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[50257]]), r"\[0, 50257\); got 50257"),
        (torch.tensor([[-3]]), "got -3"),
        (torch.tensor([1, 2]), r"shape \(2,\)"),
        (torch.tensor([[1.0]]), "float32"),
        (torch.zeros(1, 65, dtype=torch.int64), "65 tokens do not fit the model's context of 64"),
        (torch.zeros(1, 0, dtype=torch.int64), "not empty"),
    ],
)
def test_bad_ids_are_refused(ids: torch.Tensor, message: str, model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=message):
        model(ids)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    random_model: Callable[..., DecoderModel], tokenizer: BPETokenizer
) -> None:
    with pytest.raises(ValueError, match="50257 tokens and the model's embedding 512"):
        LanguageModel(random_model("tiny-gpt2"), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "unknown quantization 'int3'"),
        ({"device": "tpu9"}, "device 'tpu9'"),
        ({"device": "meta"}, "meta"),
        ({"dtype": "float13"}, "unknown dtype 'float13'.*float32"),
        ({"dtype": torch.int64}, "unknown dtype"),
    ],
)
def test_load_refuses_what_is_not_there(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load("smollm2-135m-instruct", offline=True, cache_dir=tmp_path, **options)


def test_save_and_load_give_the_same_text(model: LanguageModel, tmp_path: Path) -> None:
    model.generation_config.update(do_sample=True, temperature=0.7)
    model.save(tmp_path / "saved")
    back = load(tmp_path / "saved", device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 2}
    assert one(back.generate("hello world", **options)).text == one(model.generate("hello world", **options)).text
    assert back.generation_config.items() >= model.generation_config.items()
    with pytest.raises(ValueError, match="exists already"):
        model.save(tmp_path / "saved")
    assert load(tmp_path / "saved", device="cpu").model.config == CONFIG


def test_a_save_that_fails_leaves_nothing(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusedlm.checkpoint.huggingface.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_tokens_behind_the_vocabulary_are_no_text(
    random_model: Callable[..., DecoderModel], tokenizer: BPETokenizer
) -> None:
    padded = random_model(replace(CONFIG, vocab_size=50304, tied=False))
    with torch.no_grad():
        padded.head_weight[50260] += 100 * padded.hidden_states(torch.tensor([[5]]))[0, 0]
    result = one(LanguageModel(padded, tokenizer).generate([5], max_new_tokens=3))
    assert result.token_ids[0] == 50260
    assert len(result.token_ids) == 3
