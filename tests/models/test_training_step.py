"""Models as they train: the loss and its gradients, dropout, torch.compile, a CUDA graph, and shapes that change.

The truth is torch in float64, written out here where the model has fused it. On a GPU the models run on the kernels.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedlm.kernels import AdamW, backend
from fusedlm.models import DecoderModel, GPT2Config, LlamaConfig, RopeScaling, build_model

SIZES: dict[str, Any] = {"context_length": 96, "n_layers": 2, "n_heads": 4, "head_dim": 16, "width": 64}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=211, n_kv_heads=4, mlp_width=256, norm_eps=1e-5, tied=True, **SIZES),
    "gpt2, no biases": GPT2Config(
        vocab_size=211, n_kv_heads=4, mlp_width=256, norm_eps=1e-5, tied=True, bias=False, **SIZES
    ),
    "llama": LlamaConfig(
        vocab_size=211,
        n_kv_heads=2,
        mlp_width=176,
        norm_eps=1e-6,
        tied=False,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=32),
        **SIZES,
    ),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
both = pytest.mark.parametrize("name", CONFIGS)


def model_of(
    name: str,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    tied: bool | None = None,
) -> DecoderModel:
    config = CONFIGS[name]
    model = build_model(config if tied is None else replace(config, tied=tied), dropout=dropout)
    model.init_weights(torch.Generator().manual_seed(7))
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.to(device, dtype)


def tokens(B: int, T: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 211, (B, T + 1), generator=torch.Generator().manual_seed(B * T))
    targets = ids[:, 1:].clone()
    targets[0, :3] = -100
    return ids[:, :-1].to(device), targets.to(device)


def plain_loss(model: DecoderModel, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    counted = (targets != -100).flatten()
    return loss + 1e-3 * logits.flatten(0, 1).logsumexp(-1).square()[counted].mean()


OPTIONS: Any = {"label_smoothing": 0.1, "z_loss": 1e-3}


@both
def test_the_loss_is_that_of_the_logits_and_so_are_its_gradients(name: str) -> None:
    truth, ours = model_of(name), model_of(name, dtype=torch.float32, device=DEVICE)
    want = plain_loss(truth, *tokens(3, 17))
    want.backward()
    loss = ours.loss(*tokens(3, 17, DEVICE), **OPTIONS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - want.item()) < 2e-6 * want.item()
    for (path, p), q in zip(ours.named_parameters(), truth.parameters(), strict=True):
        assert p.grad is not None
        far = (p.grad.cpu().double() - q.grad).norm() / q.grad.norm()
        assert far < 1e-5, f"{path}: gradient is {far:.2g} off"


@pytest.mark.parametrize(
    ("name", "tied"), [("gpt2", True), ("gpt2, no biases", True), ("llama", False), ("llama", True)]
)
def test_the_kernels_gradients(name: str, tied: bool) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    ids, targets = tokens(2, 16)
    truth = model_of(name, tied=tied)
    loss = truth.loss(ids, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    model = model_of(name, dtype=torch.float32, device=DEVICE, tied=tied)
    with backend("triton"):
        found = model.loss(ids.to(DEVICE), targets.to(DEVICE))
        found.backward()  # type: ignore[no-untyped-call]
    assert abs(found.item() - loss.item()) < 1e-5
    for (path, ours), theirs in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        far = (ours.grad.cpu().double() - theirs.grad).norm() / theirs.grad.norm()
        assert far < 1e-5, f"{path}: gradient is {far:.2g} off"


@both
def test_dropout_is_of_training_alone_and_repeats_from_torchs_seed(name: str) -> None:
    model = model_of(name, dropout=0.2, dtype=torch.float32, device=DEVICE)
    plain = model_of(name, dtype=torch.float32, device=DEVICE)
    ids, _ = tokens(2, 32, DEVICE)
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = model(ids), model(ids)
        torch.manual_seed(1)
        assert torch.equal(model(ids), first)
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(ids), plain(ids))
    assert model.state_dict().keys() == plain.state_dict().keys()


@both
def test_every_place_that_drops_has_a_mask_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlm.kernels import modules

    met: list[tuple[int, int]] = []

    def noted(function: Any) -> Any:
        def call(*args: Any, seed: Tensor, stream: int, **kwargs: Any) -> Any:
            if args[1] is None:  # the first norm, where nothing is added yet
                return function(*args, seed=seed, stream=stream, **kwargs)
            assert [a for a in args if isinstance(a, float)][-1] == 0.2
            met.append((int(seed), stream))
            return function(*args, seed=seed, stream=stream, **kwargs)

        return call

    for function in ("embedding", "add_layer_norm", "add_rms_norm"):
        monkeypatch.setattr(modules, function, noted(getattr(modules, function)))
    weights: list[float] = []
    package = sys.modules["fusedlm.kernels.attention"]
    attend = package.attention_ref  # type: ignore[attr-defined]

    def attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, **options: Any) -> Tensor:
        weights.append(dropout_p)
        return attend(q, k, v, dropout_p=dropout_p, **options)

    monkeypatch.setattr(package, "attention_ref", attention)
    model_of(name, dropout=0.2, dtype=torch.float32)(tokens(1, 8)[0])
    layers = SIZES["n_layers"]
    assert len(met) == 2 * layers + 1, "the embedding, and what each attention and MLP adds to the residual"
    assert len({stream for _, stream in met}) == len(met)
    assert len({seed for seed, _ in met}) == 1
    assert weights == [0.2] * layers


def test_dropout_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout is 1\.0; expected 0 or more, and less than 1"):
        build_model(CONFIGS["gpt2"], dropout=1.0)


@both
def test_compiled_whole(name: str) -> None:
    """fullgraph: nothing of the model makes the compiler give up; and one graph does for every length."""
    torch._dynamo.reset()
    model = model_of(name, dtype=torch.float32, device=DEVICE)
    compiled_models = []

    def backend(module: Any, inputs: Any) -> Any:
        compiled_models.append(module)
        return torch._dynamo.lookup_backend("inductor" if DEVICE == "cuda" else "aot_eager")(module, inputs)

    compiled = torch.compile(lambda m, x, t: m.loss(x, t, **OPTIONS), fullgraph=True, dynamic=True, backend=backend)
    for turn, (B, T) in enumerate(((2, 16), (3, 24), (5, 41))):
        ids, targets = tokens(B, T, DEVICE)
        before = len(compiled_models)
        want = model.loss(ids, targets, **OPTIONS)
        gradients = torch.autograd.grad(want, list(model.parameters()))
        loss = compiled(model, ids, targets)
        assert abs(loss.item() - want.item()) < 1e-5
        for g, h in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
            assert (g - h).norm() <= 1e-4 * h.norm()
        assert turn == 0 or len(compiled_models) == before, "compiled anew for another length"
    torch._dynamo.reset()


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the Triton kernels that are compiled inside."""
    import triton

    names: list[str] = []
    before = triton.knobs.runtime.jit_cache_hook

    def note(*, fn: Any, **_: Any) -> None:
        names.append(fn.name)

    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_cache_hook = before


@pytest.mark.parametrize("preset", ["tiny-gpt2", "tiny-llama"])
def test_new_shapes_have_no_code_of_their_own(preset: str) -> None:
    """Without a GPU, from what is launched: of our attention too, whose tiles are of 32 and 64 tokens."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    script = Path(__file__).with_name("code_on_meta.py")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def new_code(known: list[tuple[int, int]], later: list[tuple[int, int]]) -> Any:
        command = [sys.executable, str(script), preset, json.dumps(known), json.dumps(later)]
        done = subprocess.run(command, capture_output=True, text=True, env=plain)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    known = [(4, 32), (3, 31), (4, 48), (4, 64)]
    assert new_code(known, [(8, 64), (5, 33), (7, 80), (6, 57), (2, 3)]) == []
    assert new_code([(4, 32)], [(3, 31)]) != [], "numbers that 16 divides have code of their own"


@needs_gpu
@both
def test_new_shapes_compile_nothing(name: str) -> None:
    model = model_of(name, dropout=0.1, dtype=torch.bfloat16, device=DEVICE)
    for B, T in ((4, 32), (3, 31), (4, 48)):  # numbers that 16 divides and others have code of their own
        model.loss(*tokens(B, T, DEVICE)).backward()
    with compilations() as names:
        for B, T in ((8, 64), (5, 33), (7, 80), (6, 57)):
            model.loss(*tokens(B, T, DEVICE)).backward()
    assert names == []


@needs_gpu
@both
def test_a_captured_training_step_trains(name: str) -> None:
    """Losses of replays equal those of eager steps; with dropout each replay has masks of its own."""
    eager, captured = (model_of(name, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    ids, targets = tokens(4, 64, DEVICE)

    def stepper(model: DecoderModel) -> Any:
        optimizer = AdamW(model.parameters(), lr=1e-2, max_norm=1.0)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(ids, targets)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    step = stepper(eager)
    want = [step().item() for _ in range(6)]
    step = stepper(captured)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = [step().item() for _ in range(2)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = step()
        for _ in range(4):
            graph.replay()
            got.append(loss.item())
    assert got == pytest.approx(want, abs=0.02)
    assert want[5] < want[0] - 0.5

    dropping = copy.deepcopy(model_of(name, dropout=0.3, dtype=torch.float32, device=DEVICE))
    with torch.cuda.stream(stream), torch.no_grad():
        dropping.hidden_states(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            hidden = dropping.hidden_states(ids)
        results = []
        for _ in range(3):
            graph.replay()
            results.append(hidden.clone())
    assert not any(torch.equal(a, b) for a, b in ((results[0], results[1]), (results[1], results[2])))
