"""Hugging Face directories: old layouts, and everything that can be wrong with one. Nothing of a bad one is used."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedlm.checkpoint.config import config_from_huggingface
from fusedlm.checkpoint.errors import CheckpointError
from fusedlm.checkpoint.huggingface import load_huggingface, new_directory, save_huggingface
from fusedlm.models import DecoderModel

CPU = torch.device("cpu")
Build = Callable[..., DecoderModel]


@pytest.fixture(params=["tiny-gpt2", "tiny-llama"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, random_model: Build) -> tuple[DecoderModel, Path]:
    model = random_model(request.param)
    with new_directory(tmp_path / "model") as folder:
        save_huggingface(model, folder)
    return model, tmp_path / "model"


def load(path: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    return load_huggingface(path, dtype=dtype, device=CPU)


def same(a: DecoderModel, b: DecoderModel) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(s, t) for (x, s), (y, t) in pairs)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads((path / "config.json").read_text())
    values.update(changes)
    (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the tensors, without checksums."""
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors")


def test_what_is_written_comes_back(saved: tuple[DecoderModel, Path]) -> None:
    model, path = saved
    assert same(load(path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, saved: tuple[DecoderModel, Path]) -> None:
    model, path = saved
    assert same(load(path, dtype), model.to(dtype))


def test_files_without_the_models_prefix_and_with_old_buffers(random_model: Build, tmp_path: Path) -> None:
    """gpt2 on the Hub is the model without its head, with the causal masks in it."""
    model = random_model("tiny-gpt2")
    with new_directory(tmp_path / "model") as folder:
        save_huggingface(model, folder)

    def strip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        return old | {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}

    rewrite(tmp_path / "model", strip)
    assert same(load(tmp_path / "model"), model)


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_pytorch_files(old_format: bool, sharded: bool, saved: tuple[DecoderModel, Path]) -> None:
    model, path = saved
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    files = [f"pytorch_model-{i}.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for part, file in zip(parts, files, strict=True):
        chosen = {n: tensors[n] for n in part}
        torch.save(chosen, path / file, _use_new_zipfile_serialization=not old_format)
    if sharded:
        weight_map = {n: file for part, file in zip(parts, files, strict=True) for n in part}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load(path), model)


def test_a_pickle_that_would_run_code_is_refused(saved: tuple[DecoderModel, Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    _, path = saved
    (path / "model.safetensors").unlink()
    for write in (lambda o, f: pickle.dump(o, f.open("wb")), torch.save):
        write({"transformer.wte.weight": Evil()}, path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"refused|truncated"):
            load(path)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, saved: tuple[DecoderModel, Path]) -> None:
    file = saved[1] / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(saved[1])


@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_header_is_refused_or_harmless(checksums: bool, saved: tuple[DecoderModel, Path]) -> None:
    """Every bit of the header's first 3,000 bytes, and no other outcome than an error or the very same model."""
    model, path = saved
    if not checksums:
        rewrite(path, lambda tensors: tensors)
    file = path / "model.safetensors"
    original = file.read_bytes()
    end = min(8 + int.from_bytes(original[:8], "little"), 3000)
    refused = 0
    for at in range(0, end, 29):
        data = bytearray(original)
        data[at] ^= 1 << (at % 8)
        file.write_bytes(data)
        try:
            assert same(load(path), model), at
        except CheckpointError:
            refused += 1
    assert refused > 0.5 * end / 29


def test_flipped_data_is_refused_in_files_we_wrote(saved: tuple[DecoderModel, Path]) -> None:
    _, path = saved
    file = path / "model.safetensors"
    original = file.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    for at in (start, (start + len(original)) // 2, len(original) - 1):
        data = bytearray(original)
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="differs from its checksum"):
            load(path)


def test_a_missing_shard_is_named(random_model: Build, tmp_path: Path) -> None:
    with new_directory(tmp_path / "model") as folder:
        save_huggingface(random_model("tiny-llama"), folder, max_shard_bytes=100_000)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"shards are missing: {shards[1].name}"):
        load(tmp_path / "model")


def test_a_shard_without_its_tensor_is_refused(random_model: Build, tmp_path: Path) -> None:
    with new_directory(tmp_path / "model") as folder:
        save_huggingface(random_model("tiny-llama"), folder, max_shard_bytes=100_000)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(tmp_path / "model")


def test_an_index_that_points_elsewhere_is_refused(saved: tuple[DecoderModel, Path]) -> None:
    _, path = saved
    (path / "model.safetensors").rename(path.parent / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(path)


def test_shapes_must_fit_the_config(saved: tuple[DecoderModel, Path]) -> None:
    edit(saved[1], vocab_size=513)
    with pytest.raises(CheckpointError, match=r"has shape \(512, 64\); the config asks for \(513, 64\)"):
        load(saved[1])


def test_a_layer_too_many_and_one_too_few(saved: tuple[DecoderModel, Path]) -> None:
    edit(saved[1], n_layer=3, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="missing; the config asks for"):
        load(saved[1])
    edit(saved[1], n_layer=1, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="not known for this architecture"):
        load(saved[1])


def test_quantized_tensors_are_refused(saved: tuple[DecoderModel, Path]) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = max(tensors)
        return tensors | {name: tensors[name].to(torch.int8)}

    rewrite(saved[1], quantize)
    with pytest.raises(CheckpointError, match=r"int8, a quantization that is not supported"):
        load(saved[1])


def test_files_that_are_not_there(saved: tuple[DecoderModel, Path], tmp_path: Path) -> None:
    _, path = saved
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights; expected model\.safetensors"):
        load(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", '{"a":' * 100_000])
def test_a_broken_config_is_refused(text: str, saved: tuple[DecoderModel, Path]) -> None:
    (saved[1] / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(saved[1])


LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "max_position_embeddings": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'.*expected 'gpt2' or 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is None"),
        ({"rope_scaling": 3}, "expected an object"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; expected a whole number"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"hidden_size": 15}, "15 is not a multiple of num_attention_heads 2"),
        ({"num_key_value_heads": 3}, "n_heads 2 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even one"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_configs_that_are_not_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: .*{message}"):
        config_from_huggingface({**LLAMA, **changes}, where="here")


MEASURE = """
import sys, threading, torch
from pathlib import Path
from fusedlm.checkpoint.huggingface import load_huggingface

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.ones(4, 4) @ torch.ones(4, 4)
path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
base, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load_huggingface(path, dtype=dtype, device=torch.device("cpu"))
done = True
thread.join()
size = sum(p.nbytes for p in model.parameters())
print(max(peak, anonymous()) - base, size, max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_memory_than_the_model(
    kind: str, dtype: str, random_model: Build, tmp_path: Path
) -> None:
    from dataclasses import replace

    from fusedlm.models import PRESETS

    model = random_model(replace(PRESETS["tiny-gpt2"], width=512, mlp_width=2048, head_dim=128, n_layers=6))
    with new_directory(tmp_path / "model") as folder:
        save_huggingface(model, folder, max_shard_bytes=2 * 10**7 if kind == "sharded" else 10**9)
    if kind == "bin":
        torch.save(load_file(tmp_path / "model/model.safetensors"), tmp_path / "model/pytorch_model.bin")
        (tmp_path / "model/model.safetensors").unlink()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, size, largest = map(int, out.split())
    assert size > 30e6
    assert used < 1.2 * size + largest
