"""TensorFlow Serving's messages, from a descriptor pool of our own: importing this imports no TensorFlow.

TensorFlow and `tensorflow-serving-api` register the same full names in protobuf's default pool, which
holds one file per name. The declarations of `protos/tensorflow_serving/` therefore go into a private
pool, and both may live in one process in either order.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = [
    "DATA_TYPES",
    "POOL",
    "GetModelMetadataRequest",
    "GetModelMetadataResponse",
    "GetModelStatusRequest",
    "GetModelStatusResponse",
    "ModelServerConfig",
    "ModelSpec",
    "ModelVersionStatus",
    "PredictRequest",
    "PredictResponse",
    "PredictionLog",
    "ReloadConfigRequest",
    "ReloadConfigResponse",
    "SignatureDefMap",
    "TensorProto",
    "data_type_name",
    "message_class",
    "service_methods",
]

_DESCRIPTOR_SET: Final = "tensorflow_serving.binpb"


def _load_pool() -> descriptor_pool.DescriptorPool:
    serialized = (files("nann.service.pb") / _DESCRIPTOR_SET).read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(serialized).file:
        pool.Add(file)
    return pool


POOL: Final = _load_pool()


def message_class(full_name: str) -> Any:
    """The Python class of a message of the private pool; KeyError when there is none of that name."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(full_name))


def service_methods(full_name: str) -> dict[str, tuple[Any, Any]]:
    """Method name -> (request class, response class) of a service of the private pool."""
    service = POOL.FindServiceByName(full_name)
    return {
        method.name: (
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        for method in service.methods
    }


TensorProto: Final = message_class("tensorflow.TensorProto")
ModelSpec: Final = message_class("tensorflow.serving.ModelSpec")
PredictRequest: Final = message_class("tensorflow.serving.PredictRequest")
PredictResponse: Final = message_class("tensorflow.serving.PredictResponse")
SignatureDefMap: Final = message_class("tensorflow.serving.SignatureDefMap")
GetModelMetadataRequest: Final = message_class("tensorflow.serving.GetModelMetadataRequest")
GetModelMetadataResponse: Final = message_class("tensorflow.serving.GetModelMetadataResponse")
GetModelStatusRequest: Final = message_class("tensorflow.serving.GetModelStatusRequest")
GetModelStatusResponse: Final = message_class("tensorflow.serving.GetModelStatusResponse")
ModelVersionStatus: Final = message_class("tensorflow.serving.ModelVersionStatus")
ModelServerConfig: Final = message_class("tensorflow.serving.ModelServerConfig")
ReloadConfigRequest: Final = message_class("tensorflow.serving.ReloadConfigRequest")
ReloadConfigResponse: Final = message_class("tensorflow.serving.ReloadConfigResponse")
PredictionLog: Final = message_class("tensorflow.serving.PredictionLog")

DATA_TYPES: Final[dict[str, int]] = {
    value.name: value.number for value in POOL.FindEnumTypeByName("tensorflow.DataType").values
}
_DATA_TYPE_NAMES: Final = {number: name for name, number in DATA_TYPES.items()}


def data_type_name(number: int) -> str:
    """`DT_HALF` for 19; a number TensorFlow may know and we do not reads `DT_<number>`."""
    return _DATA_TYPE_NAMES.get(number, f"DT_{number}")
