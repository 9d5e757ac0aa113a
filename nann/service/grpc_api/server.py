"""The gRPC server: which services it has, its limits, and where it listens."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nann.service.grpc_api import native, tensorflow_serving
from nann.service.grpc_api.call import Methods
from nann.service.grpc_api.health import HealthApi
from nann.service.health import Health
from nann.service.metrics import Metrics
from nann.service.retrieval import RetrievalService
from nann.service.settings import Settings

__all__ = ["create_server"]

_SERVICES = (native.SERVICE_NAME, tensorflow_serving.PREDICTION_SERVICE, tensorflow_serving.MODEL_SERVICE)
# The names under which TensorFlow Serving's own health service knows its services (server.cc).
_TENSORFLOW_HEALTH_NAMES = ("PredictionService", "ModelService")


def create_server(
    service: RetrievalService, settings: Settings, health: Health, metrics: Metrics
) -> tuple[grpc.aio.Server, int]:
    """The server, bound but not started, and its port (that of `settings`, or the one chosen for 0).

    Call it on the event loop that will run it. Raises OSError when the address is taken.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            # Two servers on one port would share its requests without a word.
            ("grpc.so_reuseport", 0),
        ]
    )
    methods = Methods(metrics, access_log=settings.access_log)
    tf_api = tensorflow_serving.TensorFlowServingApi(service)
    server.add_generic_rpc_handlers(
        (
            methods.handler(native.SERVICE_NAME, native.NativeApi(service).methods()),
            methods.handler(
                tensorflow_serving.PREDICTION_SERVICE, tf_api.prediction_methods(), tensorflow_codes=True
            ),
            methods.handler(tensorflow_serving.MODEL_SERVICE, tf_api.model_methods(), tensorflow_codes=True),
        )
    )
    health_api = HealthApi(health, (*_SERVICES, *_TENSORFLOW_HEALTH_NAMES))
    health_pb2_grpc.add_HealthServicer_to_server(health_api, server)
    # TensorFlow's declarations are not in the default pool, which is all that reflection can show.
    reflection.enable_server_reflection(
        (
            native.SERVICE_NAME,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )
    return server, _bind(server, settings.host, settings.grpc_port)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound: int = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}; choose another --grpc-port") from error
    return bound
