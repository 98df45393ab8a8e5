"""What the key of a compiled kernel tells apart."""

from typing import Any

import pytest
import torch

from fusedlm.kernels import _launch


@pytest.fixture
def key_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The key that a launch with one scalar would be kept under; nothing runs."""
    keys: list[Any] = []
    monkeypatch.setattr(_launch, "_launch_slowly", lambda kernel, grid, full, *_: keys.append(full))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    tensor = torch.empty(64)

    def key_of(*scalars: float) -> Any:
        _launch.launch(None, (1, 1, 1), "key", (tensor,), scalars, {})
        return keys[-1]

    return key_of


def test_integers_that_compiled_code_may_depend_on(key_of: Any) -> None:
    assert key_of(48) == key_of(32) == key_of(-16)
    assert key_of(7) == key_of(9) == key_of(-100)
    assert len({key_of(i) for i in (16, 7, 1, 2**31, 2**31 + 1)}) == 5
    assert key_of(2**31 - 16) == key_of(16)
    assert key_of(-(2**31)) == key_of(16) != key_of(-(2**31) - 16)
    assert key_of(0.5) == key_of(2.5)  # numbers are passed, whatever they are


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tensor_that_is_not_aligned_has_code_that_is_not_kept(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Wherever it stands: what is kept takes all of them to be multiples of 16 bytes."""
    keys: list[Any] = []
    monkeypatch.setattr(_launch, "_launch_slowly", lambda kernel, grid, full, *_: keys.append(full))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    tensors: list[torch.Tensor | None] = [torch.empty(64), torch.empty(64), torch.empty(64), None]
    _launch.launch(None, (1, 1, 1), "key", tuple(tensors), (), {})
    tensors[place] = torch.empty(64)[1:]
    _launch.launch(None, (1, 1, 1), "key", tuple(tensors), (), {})
    assert keys[0] is not None
    assert keys[1] is None
