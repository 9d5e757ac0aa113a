"""AdamW (Loshchilov and Hutter 2019) in two forms: for dense weights, and for the rows a step touched.

The lazy form costs nothing for the rows of a table that a step does not name: their moments do not decay
and their values do not move until they are named again. Rows have no weight decay, which would pull
rarely seen items to zero at a rate that depends on how often they are seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

__all__ = ["AdamSettings", "DenseAdamW", "LazyAdamRows", "learning_rate_at"]


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """Constants of Kingma and Ba 2015, and the decoupled weight decay."""

    weight_decay: float = 1e-4
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8


def learning_rate_at(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, final_share: float
) -> float:
    """Linear warm-up to `peak`, then linear decay to `peak * final_share` at `total_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (1 - (1 - final_share) * min(done, 1.0))


def _direction(gradient: Any, first: Any, second: Any, step: Any, s: AdamSettings) -> tuple[Any, Any, Any]:
    """(update direction, new first moment, new second moment); `step` counts from 1, float32."""
    first = s.beta_1 * first + (1 - s.beta_1) * gradient
    second = s.beta_2 * second + (1 - s.beta_2) * tf.square(gradient)
    corrected = first / (1 - tf.pow(s.beta_1, step))
    scale = tf.sqrt(second / (1 - tf.pow(s.beta_2, step)))
    return corrected / (scale + s.epsilon), first, second


class DenseAdamW:
    """AdamW over named variables; weight decay on those named in `decayed` alone."""

    def __init__(self, variables: Mapping[str, Any], decayed: Sequence[str], settings: AdamSettings) -> None:
        self.settings = settings
        self._variables = dict(variables)
        self._decayed = frozenset(decayed)
        self.first = {name: tf.Variable(tf.zeros_like(v), trainable=False) for name, v in variables.items()}
        self.second = {name: tf.Variable(tf.zeros_like(v), trainable=False) for name, v in variables.items()}

    def apply(self, gradients: Mapping[str, Any], learning_rate: Any, step: Any) -> None:
        """One update; `gradients` by the same names."""
        for name, variable in self._variables.items():
            direction, first, second = _direction(
                gradients[name], self.first[name], self.second[name], step, self.settings
            )
            self.first[name].assign(first)
            self.second[name].assign(second)
            if name in self._decayed:
                direction += self.settings.weight_decay * variable
            variable.assign_sub(learning_rate * direction)

    def slots(self) -> dict[str, Any]:
        """The moments by name, for checkpoints."""
        return {f"first/{n}": v for n, v in self.first.items()} | {
            f"second/{n}": v for n, v in self.second.items()
        }


class LazyAdamRows:
    """Adam for some rows of one table: gather, update outside of it, scatter."""

    def __init__(self, table: Any, settings: AdamSettings) -> None:
        self.table = table
        self.settings = settings
        self.first = tf.Variable(tf.zeros_like(table), trainable=False)
        self.second = tf.Variable(tf.zeros_like(table), trainable=False)

    def gather(self, rows: Any) -> tuple[Any, Any, Any]:
        """(values, first moments, second moments) of the rows [n], each [n, dim]."""
        return tf.gather(self.table, rows), tf.gather(self.first, rows), tf.gather(self.second, rows)

    def updated(
        self, state: tuple[Any, Any, Any], gradient: Any, learning_rate: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """The state after one update; pure."""
        values, first, second = state
        direction, first, second = _direction(gradient, first, second, step, self.settings)
        return values - learning_rate * direction, first, second

    def scatter(self, rows: Any, state: tuple[Any, Any, Any]) -> None:
        """Write the state back; rows named twice must carry equal values."""
        for variable, values in zip((self.table, self.first, self.second), state, strict=True):
            variable.scatter_update(tf.IndexedSlices(values, rows))

    def slots(self) -> dict[str, Any]:
        """The moments by name, for checkpoints."""
        return {"first": self.first, "second": self.second}
