"""Settings: presets, TOML, overrides, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusedlm.models import PRESETS as MODELS
from fusedlm.models import GPT2Config, LlamaConfig
from fusedlm.training import config
from fusedlm.training.config import (
    ModelSettings,
    RunConfig,
    make_config,
    model_config,
    override_config,
    read_toml,
    validate,
)
from fusedlm.training.presets import PRESETS


@pytest.mark.parametrize("name", [*PRESETS, *MODELS])
def test_every_preset_is_a_configuration_that_toml_keeps(name: str, tmp_path: Path) -> None:
    config = make_config(name)
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert validate(read_toml(path), "the file") == config
    if name in MODELS:
        described = model_config(config.model, MODELS[name].vocab_size)
        assert described.n_layers == MODELS[name].n_layers
        assert described.vocab_size % config.model.vocab_multiple == 0


def test_later_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "shakespeare-char"\n[training]\nlr = 0.5\nsteps = 7\n', encoding="utf-8")
    config = make_config(None, file, ["training.lr=3e-4", "training.max_norm=none", "data.sources=['a', 'b']"])
    assert (config.training.lr, config.training.steps, config.training.dropout) == (3e-4, 7, 0.2)
    assert config.training.max_norm is None
    assert config.data.sources == ("a", "b")
    assert make_config("gpt2", file).model.preset == "gpt2"
    assert make_config(None, None, ["data.tokenizer=characters"]).data.tokenizer == "characters"
    assert make_config("python-char", None, [], data={"sources": ["x"]}).data.sources == ("x",)
    assert override_config(config, ["training.steps=9"]).training.steps == 9


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lrr=1", r"unknown key training\.lrr; did you mean training\.lr\?"),
        ("training.learning_rate=1", r"unknown key training\.learning_rate; did you mean training\.lr\?"),
        ("grad_clip=1", r"unknown key grad_clip; did you mean training\.max_norm\?"),
        ("lr=1", r"unknown key lr; did you mean training\.lr\?"),
        ("data.steps=1", r"unknown key data\.steps; did you mean training\.steps\?"),
        ("trainig.lr=1", r"unknown key trainig; did you mean training\?"),
        ("training.qqqq=1", r"unknown key training\.qqqq; expected one of steps, batch_size"),
        (
            "training.min_lr=0.5",
            r"training\.min_lr is 0\.5; expected a number up to training\.lr, 0\.003",
        ),
        ("training.lr=-1", r"training\.lr is -1; expected greater than 0"),
        ("training.schedule=cosin", r"training\.schedule is 'cosin'; expected 'cosine', 'linear', 'wsd' or 'constant'"),
        ("training.steps=many", r"training\.steps is 'many'; expected a valid integer"),
        ("training.betas=[0.9]", r"training\.betas is \[0\.9\]; expected more values"),
        ("data.sources=text.txt", r"data\.sources is 'text\.txt'; expected a list"),
        ("data=3", r"data is 3; expected a table of settings"),
        ("lora.alpha=8", r"lora\.alpha is 8; expected lora\.rank beside it, without which all weights are trained"),
        ("lora.targets=['mlp.up']", r"lora\.targets is \['mlp\.up'\]; expected lora\.rank beside it"),
        ("training.lr", r"--set 'training\.lr'; expected section\.key=value"),
        ("=3", r"--set '=3'; expected section\.key=value"),
    ],
)
def test_what_is_refused(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_config("python-char", None, [override])


@pytest.mark.parametrize("targets", ["['mlp.up', 'mlp.up']", "[]"])
def test_targets_of_lora_that_are_refused(targets: str) -> None:
    with pytest.raises(ValueError, match=r"lora\.targets is \[.*; expected names, each once"):
        make_config("python-char", None, ["lora.rank=2", f"lora.targets={targets}"])


def test_files_and_names_that_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[training\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.toml is not TOML"):
        make_config(None, broken)
    with pytest.raises(ValueError, match=r"none\.toml cannot be read: No such file"):
        make_config(None, tmp_path / "none.toml")
    with pytest.raises(ValueError, match="unknown preset 'shakespear'; did you mean shakespeare-char"):
        make_config("shakespear")
    one = tmp_path / "one.toml"
    one.write_text("[training]\nlrr = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"one\.toml: unknown key training\.lrr"):
        make_config(None, str(one))
    one.write_text("[training]\nlr = 1e-3\nsteps = 9\n", encoding="utf-8")
    for override in ("training.lrr=1", "training.steps=many"):  # which the file has no part in
        with pytest.raises(ValueError, match=r"the configuration: .*training\."):
            make_config(None, one, [override])


def test_models_from_sizes() -> None:
    gpt2 = model_config(make_config("shakespeare-char").model, 65)
    assert isinstance(gpt2, GPT2Config)
    assert (gpt2.vocab_size, gpt2.head_dim, gpt2.mlp_width, gpt2.n_kv_heads, gpt2.bias) == (65, 64, 1536, 6, False)
    with_biases = model_config(make_config("shakespeare-char", overrides=["model.bias=true"]).model, 65)
    assert with_biases == replace(gpt2, bias=True)
    sizes = {"n_layers": 2, "n_heads": 4, "width": 96, "context_length": 32}
    llama = model_config(ModelSettings(architecture="llama", n_kv_heads=2, **sizes), 100)
    assert isinstance(llama, LlamaConfig)
    assert (llama.mlp_width, llama.n_kv_heads, llama.rope_theta) == (256, 2, 10000.0)
    wider = model_config(ModelSettings(preset="gpt2", width=1536, n_layers=3, vocab_multiple=64), 50257)
    assert (wider.head_dim, wider.n_layers, wider.vocab_size) == (128, 3, 50304)
    with pytest.raises(ValueError, match="model has no preset and no n_layers, n_heads, width"):
        model_config(ModelSettings(context_length=8), 10)
    with pytest.raises(ValueError, match=r"model\.preset is 'gpt22'; did you mean gpt2\?"):
        model_config(ModelSettings(preset="gpt22"), 10)
    with pytest.raises(ValueError, match="rope_theta is given for GPT-2"):
        model_config(ModelSettings(preset="gpt2", rope_theta=1.0), 10)
    with pytest.raises(ValueError, match=r"model\.bias is true for Llama, which has no biases"):
        model_config(ModelSettings(preset="tiny-llama", bias=True), 10)


def test_defaults_are_a_configuration() -> None:
    assert validate({}, "nothing") == RunConfig()


def test_names_of_other_trainers_lead_to_settings_there_are() -> None:
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for theirs, ours in config._ELSEWHERE.items():
        section, key = ours.split(".")
        known: Any = sections[section]
        assert key in known.model_fields
        assert theirs not in known.model_fields


def test_additions_take_a_higher_learning_rate() -> None:
    plain, lora = make_config("finetune"), make_config("finetune-lora", None, ["lora.rank=4"])
    assert (plain.lora.rank, lora.lora.rank) == (0, 4)
    assert lora.training.lr == 10 * plain.training.lr
    assert lora.training.model_copy(update={"lr": plain.training.lr}) == plain.training
