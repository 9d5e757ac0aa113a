"""The model as JAX functions of its weights, in half precision or float32.

Half precision rounds the operands of matrix products to float16; sums, softmax and biases stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nann.offline.benchmark.gpu.corpus import HISTORY_LENGTH
from nann.offline.benchmark.gpu.model import HIDDEN_UNITS, SCORE_UNITS, Weights

if TYPE_CHECKING:
    from jaxtyping import Float32

__all__ = ["ModelFunctions", "Precision"]

Precision = Literal["float16", "float32"]
Tensors = Mapping[str, Any]
Shapes = dict[str, tuple[tuple[int, ...], str]]
# Tensor cores read 16 bytes at a time, so 8 half-precision columns: 50 positions become 56.
_HALF_ALIGNMENT = 8
# Takes a padding position out of the softmax; finite, so that float16 can hold it.
_NEVER = -3e4
_KERNELS = ("history_kernel", "key_kernel", "key_bias_kernel", "value_kernel", "kernel_2", "kernel_3")


@dataclass(frozen=True, slots=True)
class ModelFunctions:
    """`encode_user` and `score` in one precision, and the shapes of what they exchange.

    A user tensor of length L = 50 has 56 columns in half precision; the last six take no weight.
    """

    precision: Precision

    @property
    def columns(self) -> int:
        """Columns of the attention's user tensors: the history's positions and padding."""
        alignment = _HALF_ALIGNMENT if self.precision == "float16" else 1
        return -(-HISTORY_LENGTH // alignment) * alignment

    @property
    def user_tensors(self) -> Shapes:
        """Shape of one user's tensors and their dtype, by name."""
        first = SCORE_UNITS[0]
        return {
            "user_key_bias": ((1, self.columns), "float32"),
            "user_keys": ((HIDDEN_UNITS, self.columns), self.precision),
            "user_values": ((self.columns, first), self.precision),
        }

    @property
    def item_tensors(self) -> Shapes:
        """Shape of one item's tensors and their dtype, by name."""
        return {"item_hidden": ((SCORE_UNITS[0],), "float16"), "item_query": ((HIDDEN_UNITS,), "float16")}

    def weights(self, weights: Weights, embeddings: Float32[np.ndarray, "N 64"]) -> dict[str, np.ndarray]:
        """The functions' first argument, on the host: the model's own weights and the history's table."""
        arrays = {name: array for name, array in weights.arrays().items() if "item" not in name}
        arrays = {name: array for name, array in arrays.items() if not name.startswith("query")}
        for name in _KERNELS:
            arrays[name] = arrays[name].astype(self.precision)
        return {**arrays, "embeddings": embeddings.astype(self.precision)}

    def encode_user(self, weights: Tensors, history: Any) -> dict[str, Any]:
        """Histories int32 [b, 50], -1 = missing -> user tensors [b, …]."""
        import jax.numpy as jnp

        half = self.precision
        inputs = jnp.where(history[..., None] >= 0, weights["embeddings"][history], 0)
        hidden = _prelu(
            _dense(inputs, weights["history_kernel"], weights["history_bias"]), weights["history_slope"]
        )
        keys = _dense(hidden.astype(half), weights["key_kernel"])
        bias = _dense(hidden.astype(half), weights["key_bias_kernel"][:, None])
        values = _dense(inputs, weights["value_kernel"])
        padding = (0, self.columns - HISTORY_LENGTH)
        return {
            "user_key_bias": jnp.pad(
                bias.swapaxes(-1, -2), ((0, 0), (0, 0), padding), constant_values=_NEVER
            ),
            "user_keys": jnp.pad(keys.swapaxes(-1, -2), ((0, 0), (0, 0), padding)).astype(half),
            "user_values": jnp.pad(values, ((0, 0), padding, (0, 0))).astype(half),
        }

    def score(self, weights: Tensors, users: Tensors, items: Tensors) -> Any:
        """User tensors [T, …] × item tensors [T or 1, R, …] -> float32 [T, R]."""
        import jax

        half = self.precision
        query = items["item_query"].astype(half)
        attention = jax.nn.softmax(_product(query, users["user_keys"]) + users["user_key_bias"], axis=-1)
        attended = _product(attention.astype(half), users["user_values"])
        hidden = _prelu(attended + items["item_hidden"].astype("float32"), weights["slope_1"])
        hidden = _prelu(
            _dense(hidden.astype(half), weights["kernel_2"], weights["bias_2"]), weights["slope_2"]
        )
        hidden = _prelu(
            _dense(hidden.astype(half), weights["kernel_3"], weights["bias_3"]), weights["slope_3"]
        )
        return (hidden * weights["kernel_4"]).sum(axis=-1)


def _product(left: Any, right: Any) -> Any:
    """A matrix product with float32 sums; float32 operands are taken as they are, not rounded to TF32."""
    import jax
    import jax.numpy as jnp

    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.matmul(left, right, precision=precision, preferred_element_type=jnp.float32)


def _dense(inputs: Any, kernel: Any, bias: Any = 0.0) -> Any:
    """[..., n] × [n, m] as one flat product."""
    flat = _product(inputs.reshape(-1, inputs.shape[-1]), kernel)
    return flat.reshape(*inputs.shape[:-1], kernel.shape[-1]) + bias


def _prelu(inputs: Any, slope: Any) -> Any:
    import jax.numpy as jnp

    return jnp.maximum(inputs, 0.0) + slope * jnp.minimum(inputs, 0.0)
