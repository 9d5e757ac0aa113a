"""Models by name: a new model is one file beside this one, and one line here."""

from __future__ import annotations

from nann.offline.models.attention_dnn import AttentionDnn
from nann.offline.models.dnn import Dnn
from nann.offline.models.model import ModelSpec, RetrievalModel
from nann.offline.models.two_sided import TwoSided

__all__ = ["MODELS", "create_model"]

MODELS: dict[str, type[AttentionDnn | Dnn | TwoSided]] = {
    "attention_dnn": AttentionDnn,
    "dnn": Dnn,
    "two_sided": TwoSided,
}


def create_model(name: str, spec: ModelSpec, *, seed: int = 0) -> RetrievalModel:
    """A freshly initialised model; ValueError when no model has that name."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(sorted(MODELS))}")
    return MODELS[name](spec, seed=seed)
