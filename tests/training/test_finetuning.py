"""From a checkpoint: all weights or LoRA, chats with the loss on answers, documents apart; then merged and exported."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fusedlm
from fusedlm.data.dataset import Dataset
from fusedlm.data.documents import find_sources
from fusedlm.data.loader import Loader
from fusedlm.data.prepare import prepare
from fusedlm.models import PRESETS, DecoderModel, build_model
from fusedlm.training.checkpoints import StateError
from fusedlm.training.config import LoRAConfig
from fusedlm.training.lora import LoRALinear, add_lora, merged
from fusedlm.training.publish import model_of
from fusedlm.training.saved import saved_model
from fusedlm.training.step import plain_loss


@pytest.fixture
def first(run: Callable[..., Any], tmp_path: Path) -> Path:
    """A run whose model others begin with."""
    run("first", "training.steps=10")
    return tmp_path / "first"


def test_training_goes_on_from_a_models_weights(run: Callable[..., Any], first: Path) -> None:
    model = fusedlm.load(first, device="cpu").model
    heard, _ = run("more", f"model.init={first}", "training.warmup=0")
    batch = heard.trainer.loader.batch(0)
    want = F.cross_entropy(model(batch.tokens).detach().double().flatten(0, 1), batch.targets.flatten())
    assert heard.losses[0] == pytest.approx(float(want), abs=1e-5)
    assert heard.trainer.model.config == model.config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_trains_its_additions_alone(run: Callable[..., Any], first: Path, tmp_path: Path, precision: str) -> None:
    before = {n: p.detach().clone() for n, p in fusedlm.load(first, device="cpu").model.named_parameters()}
    settings = [f"model.init={first}", "lora.rank=4", "lora.targets=['attention.qkv', 'mlp.down']"]
    settings += [f"training.precision={precision}", "training.warmup=0"]
    heard, _ = run("lora", *settings, "training.steps=16", "checkpoints.interval=8")
    model = heard.trainer.model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{i}.{target}.{leaf}" for i in (0, 1) for target in ("attention.qkv", "mlp.down") for leaf in "ab"
    }
    assert heard.losses[-1] < heard.losses[0]
    whole = fusedlm.load(tmp_path / "lora", dtype="float32", device="cpu").model
    after = dict(whole.named_parameters())
    assert after.keys() == before.keys()
    for name, p in before.items():
        same = torch.equal(after[name], p.to(model.embedding.weight.dtype).float())
        assert same == (not name.endswith(("attention.qkv.weight", "mlp.down.weight"))), name
    # Merged, the model computes what it did as it was trained.
    batch = heard.trainer.loader.batch(0)
    model.eval()
    close = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    assert plain_loss(whole, batch).item() == pytest.approx(plain_loss(model, batch).item(), abs=close)

    (tmp_path / "lora" / "checkpoints" / "step-00000016" / "manifest.json").unlink()
    parts, _ = run("lora", *settings, "training.steps=16", resume=True)
    assert parts.losses == heard.losses[8:]


def test_lora_beside_an_activation_that_adds_the_bias() -> None:
    model = build_model(PRESETS["tiny-gpt2"])
    model.init_weights(torch.Generator().manual_seed(1))
    torch.nn.init.normal_(model.blocks[0].mlp.up.bias)
    lora = LoRAConfig(rank=2, targets=("mlp.up", "mlp.down"))
    add_lora(model, lora, seed=1)
    torch.nn.init.normal_(model.blocks[0].mlp.up.b)
    whole = model_of(model.config, merged({n: p.detach() for n, p in model.named_parameters()}, lora))
    ids = torch.randint(0, 512, (2, 9))
    torch.testing.assert_close(whole(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_lora_is_the_sum_of_both_products() -> None:
    model = build_model(PRESETS["tiny-llama"])
    model.init_weights(torch.Generator().manual_seed(1))
    plain = {name: p.detach().double() for name, p in model.named_parameters()}
    lora = LoRAConfig(rank=3, alpha=7.0, targets=("mlp.gate_up", "attention.out"))
    add_lora(model, lora, seed=1)
    layer = model.blocks[1].attention.out
    assert isinstance(layer, LoRALinear)
    torch.nn.init.normal_(layer.b, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 5, 64)
    w = plain["blocks.1.attention.out.weight"] + 7 / 3 * (layer.b.double() @ layer.a.double())
    torch.testing.assert_close(layer(x).double(), x.double() @ w.T, rtol=1e-4, atol=1e-5)
    whole = model_of(model.config, merged({n: p.detach() for n, p in model.named_parameters()}, lora))
    ids = torch.randint(0, 512, (2, 9))
    torch.testing.assert_close(whole(ids), model(ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"targets has 'mlp\.up'; expected some of attention\.qkv, attention\.out"):
        add_lora(build_model(PRESETS["tiny-llama"]), LoRAConfig(rank=1, targets=("mlp.up",)), 0)


def test_lora_of_other_frozen_weights_is_refused(run: Callable[..., Any], first: Path, tmp_path: Path) -> None:
    settings = [f"model.init={first}", "lora.rank=2"]
    run("lora", *settings)
    run("other", "training.steps=3")
    (first / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    for read in (lambda: run("lora", *settings, resume=True), lambda: saved_model(tmp_path / "lora")):
        with pytest.raises(StateError, match="that are not trained are not those this run began with"):
            read()


def test_a_saved_model_has_the_tokenizer_that_it_was_trained_with(
    run: Callable[..., Any], dataset_folder: Path, tmp_path: Path
) -> None:
    """Whatever lies in its dataset's place by now."""
    shutil.copytree(dataset_folder, tmp_path / "data")
    run("run", f"data.sources=['{tmp_path}/data']")
    shutil.rmtree(tmp_path / "data")
    assert saved_model(tmp_path / "run").tokenizer.encode("cat") == Dataset(dataset_folder).tokenizer().encode("cat")
    (tmp_path / "other.txt").write_text("".join(map(chr, range(200, 300))) * 20)
    prepare(find_sources([tmp_path / "other.txt"]), tmp_path / "data", "characters")
    assert saved_model(tmp_path / "run").tokenizer.encode("cat") == Dataset(dataset_folder).tokenizer().encode("cat")
    # Nor is one beside the run taken that is not its own; where the dataset's is not either, there is none.
    shutil.copy(tmp_path / "data" / "tokenizer" / "characters.json", tmp_path / "run")
    with pytest.raises(StateError, match=r"the tokenizer of .*data is not the one this run began with"):
        saved_model(tmp_path / "run")


def documents(tmp_path: Path) -> Dataset:
    lines = ["the cat", "a", "sat on 42 mats and more", "rats", "x" * 40, "end"] * 30
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepare(find_sources([path]), tmp_path / "documents", "characters", val_fraction=0.2)
    return Dataset(tmp_path / "documents")


def alone_loss(model: DecoderModel, batch: Any) -> float:
    """Every sequence of a batch by itself, in float64."""
    total, count = 0.0, 0
    ends = batch.sequence_ends.tolist()
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    for begin, end in pairwise(ends):
        logits = model(tokens[None, begin:end])[0].detach()
        losses = F.cross_entropy(logits, targets[begin:end], reduction="sum")
        total, count = total + float(losses), count + int((targets[begin:end] != -100).sum())
    return total / count


@pytest.mark.parametrize("kind", ["separate", "packed"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_documents_do_not_see_each_other(
    run: Callable[..., Any], tmp_path: Path, name: str, kind: str, random_model: Callable[..., DecoderModel]
) -> None:
    dataset = documents(tmp_path)
    config = PRESETS[f"tiny-{name}"]
    model = random_model(config, dtype=torch.float64)
    batch = Loader(dataset, batch_size=4, context=32, seed=1, documents=kind).batch(0)  # type: ignore[arg-type]
    assert len(batch.sequence_ends) > 5  # type: ignore[arg-type]
    assert plain_loss(model, batch).item() == pytest.approx(alone_loss(model, batch), abs=1e-9)

    settings = [f"data.sources=['{dataset.folder}']", f"data.documents={kind}", f"model.architecture={name}"]
    settings += ["training.dropout=0.1", "training.steps=12", "evaluation.interval=12"]
    whole, result = run("whole", *settings, "training.recompute=cheap")
    assert whole.losses[-1] < whole.losses[0]
    assert result.val_loss is not None
    settings.remove("training.dropout=0.1")
    one, _ = run("one", *settings)
    four, _ = run("four", *settings, "training.micro_batches=4")  # of which each has another number of targets
    assert four.losses == pytest.approx(one.losses, abs=1e-5)


def test_chats_are_trained_on_their_answers(run: Callable[..., Any], tmp_path: Path, chat_model: Path) -> None:
    chats = [
        [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}] for word in ("yes", "no")
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats * 20))
    settings = [f"data.sources=['{path}']", "data.chat=true", "data.val_fraction=0", f"model.init={chat_model}"]
    heard, _ = run("chat", *settings, "training.context=32", "training.steps=60", "training.lr=3e-3")
    batch = heard.trainer.loader.batch(0)
    tokenizer = heard.trainer.tokenizer
    answers = {tokenizer.decode([t for t in batch.targets.flatten().tolist() if t != -100], skip_special=False)}
    assert set("".join(answers).replace("<|im_end|>", " ").split()) <= {"yes", "no"}
    assert heard.losses[-1] < 0.3
    model = fusedlm.load(tmp_path / "chat")
    question = "<|im_start|>user\nsay no<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(question, allow_special=True)
    assert model.generate(ids, max_new_tokens=3).text in ("yes", "no")
