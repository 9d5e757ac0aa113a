"""The service's messages, from a descriptor pool of our own.

Python keeps one protobuf pool a process, and a second registration of a name that differs in anything
is an error there. So that this package can live beside the server's, TensorFlow's and older or newer
copies of itself, its declarations (`service.binpb`, generated from the project's protos) stay private.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["MODEL_SERVICE", "RETRIEVAL_SERVICE", "method_types"]

RETRIEVAL_SERVICE: Final = "nann.retrieval.v1.RetrievalService"
MODEL_SERVICE: Final = "tensorflow.serving.ModelService"


def _load_pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(
        (files(__name__) / "service.binpb").read_bytes()
    ).file:
        pool.Add(file)
    return pool


_POOL: Final = _load_pool()


def method_types(service: str, method: str) -> tuple[Any, Any]:
    """The classes of a method's request and reply."""
    found = _POOL.FindServiceByName(service).methods_by_name[method]
    return (
        message_factory.GetMessageClass(found.input_type),
        message_factory.GetMessageClass(found.output_type),
    )
