"""A model as the list of stages that `step.run` goes through, and the memory they work in."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedlm.inference.cache import KVCache
from fusedlm.inference.compiled import products, step
from fusedlm.kernels import LayerNorm
from fusedlm.models import GPT2, DecoderModel, Llama
from fusedlm.models.quantized import Int8Weight

_FORMATS = {torch.float32: products.F32, torch.bfloat16: products.BF16}


class Program:
    """Stages of one model over one cache of a single sequence. Holds whatever they point to.

    threads: how many will run it. Matrices are read where the model keeps them; gains, shifts and biases are copied.
    """

    def __init__(self, model: DecoderModel, cache: KVCache, threads: int) -> None:
        c = model.config
        self._model, self._cache, self._threads = model, cache, threads
        self._held: list[Any] = []
        self._stages: list[dict[str, Any]] = []
        self._bounds: list[int] = []
        D, T = c.head_dim, step.TOKENS
        padded = _up(D, 16)
        segment = max(256, _up(-(-cache.capacity // 16), 16))  # at most 16 of them
        segments = -(-cache.capacity // segment)
        self._x, self._x_stride = self._rows(c.width)
        self._hidden, self._hidden_stride = self._rows(c.mlp_width)
        self.shape = np.zeros(1, step.SHAPE)
        shape = self.shape[0]
        shape["heads"], shape["groups"], shape["head_dim"] = c.n_heads, c.n_kv_heads, D
        shape["capacity"], shape["cache_format"] = cache.capacity, _FORMATS[cache.keys.dtype]
        shape["x"], shape["x_stride"] = self._x, self._x_stride
        shape["queries"] = self._vector(T * c.n_heads * D)
        shape["segment"], shape["segments"], shape["part_size"] = segment, segments, padded + 16
        shape["parts"] = self._vector(T * c.n_heads * segments * (padded + 16))
        results = 4 * max(T * _up(max(c.width, c.n_heads * D), 64), step.QUERIES * (segment + 64))
        wide = results + 2 * 4 * (T + 3) * _up(max(step.PANEL, D), 16)
        shape["own_results"], shape["own_wide"] = results, wide
        self._own_size = wide + 4 * 8 * 1024
        self._embed(model)
        for i, block in enumerate(model.blocks):
            self._block(i, block)
        self._product(model.head_weight, source=self._x, source_stride=self._x_stride, norm=model.norm)
        self.stages = np.zeros(len(self._stages), step.STAGE)
        for i, stage in enumerate(self._stages):
            for name, value in stage.items():
                self.stages[i][name] = value
        self.bounds = np.array(self._bounds, dtype=np.int64)

    def scratch(self) -> Tensor:
        """What one thread needs for itself."""
        return torch.zeros(self._own_size // 4)

    def counters(self) -> Tensor:
        """What the threads of one step share: see `step.run`."""
        return torch.zeros(len(self.stages), 2, 8, dtype=torch.int64)

    def _embed(self, model: DecoderModel) -> None:
        self._stages.append({"kind": step.EMBED, **self._matrix(model.embedding.weight)})
        if isinstance(model, GPT2):
            table = self._matrix(model.positions.weight)
            shape = self.shape[0]
            shape["positions"], shape["positions_bytes"] = table["weight"], table["row_bytes"]
            shape["positions_format"] = table["format"]
        elif isinstance(model, Llama):
            frequencies = model.rotary.frequencies
            self._held.append(frequencies)
            self.shape[0]["frequencies"] = frequencies.data_ptr()
            self.shape[0]["angles"] = self._vector(step.TOKENS * model.config.head_dim)

    def _block(self, layer: int, block: Any) -> None:
        mlp, attention = block.mlp, block.attention
        keys, values = self._cache.keys[layer].data_ptr(), self._cache.values[layer].data_ptr()
        stream = {"source": self._x, "source_stride": self._x_stride}
        into_stream = {"after": step.ADD, "target": self._x, "target_stride": self._x_stride}
        hidden, stride = self._hidden, self._hidden_stride
        to_cache = {"after": step.HEADS, "target": 1, "keys": keys, "values": values}
        self._product(attention.qkv.weight, attention.qkv.bias, norm=block.norm1, **stream, **to_cache)
        self._stages.append({"kind": step.ATTEND, "keys": keys, "values": values})
        self._product(attention.out.weight, attention.out.bias, before=step.JOIN, **into_stream)
        up, after = (mlp.gate_up, step.SWIGLU) if hasattr(mlp, "gate_up") else (mlp.up, step.GELU)
        to_hidden = {"after": after, "target": hidden, "target_stride": stride}
        self._product(up.weight, up.bias, norm=block.norm2, **stream, **to_hidden)
        self._product(mlp.down.weight, mlp.down.bias, source=hidden, source_stride=stride, **into_stream)

    def _product(self, weight: Tensor, bias: Tensor | None = None, *, norm: Any = None, **fields: int) -> None:
        """norm: a LayerNorm or RMSNorm of the source, or None."""
        stage: dict[str, Any] = {"kind": step.PRODUCT, **self._matrix(weight), **fields}
        if norm is not None:
            stage["before"], shift = step.RMS_NORM, None
            if isinstance(norm, LayerNorm):
                stage["before"] = step.LAYER_NORM
                shift = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
            stage["gain"], stage["eps"] = self._copy(norm.weight), norm.eps
            stage["shift"] = 0 if shift is None else self._copy(shift)
        if bias is not None:
            stage["bias"] = self._copy(bias)
        rows = weight.shape[0] // (2 if stage.get("after") == step.SWIGLU else 1)
        stage["rows"] = rows
        stage["panel"] = self._model.config.head_dim if stage.get("after") == step.HEADS else step.PANEL
        bounds = _bounds(rows, stage["panel"], self._threads)
        stage["first_bound"], stage["chunks"] = len(self._bounds), len(bounds) - 1
        self._bounds += bounds
        self._stages.append(stage)

    def _matrix(self, weight: Tensor) -> dict[str, int]:
        if isinstance(weight, Int8Weight):
            integers, scales = weight.integers, weight.scales
            self._held += [integers, scales]
            return {
                "format": products.INT8,
                "weight": integers.data_ptr(),
                "scales": scales.data_ptr(),
                "row_bytes": integers.shape[1],
                "columns": weight.shape[1],
            }
        self._held.append(weight)
        return {
            "format": _FORMATS[weight.dtype],
            "weight": weight.data_ptr(),
            "row_bytes": weight.stride(0) * weight.element_size(),
            "columns": weight.shape[1],
        }

    def _rows(self, size: int) -> tuple[int, int]:
        """Address and stride of new zeros for every token of a pass."""
        return self._vector(step.TOKENS * _up(size, 64)), 4 * _up(size, 64)

    def _vector(self, size: int) -> int:
        """The address of so many new float32 zeros, and 64 behind them."""
        vector = torch.zeros(size + 64)
        self._held.append(vector)
        return vector.data_ptr()

    def _copy(self, values: Tensor) -> int:
        vector = torch.zeros(_up(values.numel(), 64) + 64)
        vector[: values.numel()] = values
        self._held.append(vector)
        return vector.data_ptr()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _bounds(rows: int, panel: int, threads: int) -> list[int]:
    """Where chunks begin: large ones first, small ones last, so that threads end together and take few tickets."""
    bounds = [0]
    while bounds[-1] < rows:
        left = rows - bounds[-1]
        bounds.append(min(rows, bounds[-1] + max(panel, _up(left // (2 * threads), panel))))
    return bounds
