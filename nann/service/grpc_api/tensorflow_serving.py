"""tensorflow.serving.PredictionService and ModelService, for clients that speak to TensorFlow Serving."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from nann.service.grpc_api.call import Call, Method
from nann.service.registry import ServedVersion
from nann.service.retrieval import RetrievalService
from nann.service.wire import tf_messages
from nann.service.wire.tf_choice import (
    ModelChoice,
    model_choice,
    not_found_as,
    servable_not_found,
    versions_not_found,
)
from nann.service.wire.tf_model_config import configs_of_message
from nann.service.wire.tf_predict import (
    metadata_response,
    predict_call,
    predict_response,
    status_response,
    whole,
)

__all__ = ["MODEL_SERVICE", "PREDICTION_SERVICE", "TensorFlowServingApi"]

PREDICTION_SERVICE: Final = "tensorflow.serving.PredictionService"
MODEL_SERVICE: Final = "tensorflow.serving.ModelService"


@dataclass(frozen=True, slots=True)
class TensorFlowServingApi:
    """The methods of both services."""

    service: RetrievalService

    def prediction_methods(self) -> dict[str, tuple[type[Any], Method]]:
        """Method name -> (request class, coroutine) of PredictionService."""
        return {
            "Predict": (tf_messages.PredictRequest, self.predict),
            "GetModelMetadata": (tf_messages.GetModelMetadataRequest, self.get_model_metadata),
        }

    def model_methods(self) -> dict[str, tuple[type[Any], Method]]:
        """Method name -> (request class, coroutine) of ModelService."""
        return {
            "GetModelStatus": (tf_messages.GetModelStatusRequest, self.get_model_status),
            "HandleReloadConfigRequest": (tf_messages.ReloadConfigRequest, self.handle_reload_config_request),
        }

    async def predict(self, call: Call) -> Any:
        """NANN's served search: embedded histories in, item ids (and scores) out."""
        with self._leased(call) as served:
            metadata = served.metadata
            predict = predict_call(call.message, metadata)
            results = await self.service.retrieve_many(
                predict.requests, deadline_s=call.deadline_s, on=served
            )
        return predict_response(predict, whole(results), metadata)

    async def get_model_metadata(self, call: Call) -> Any:
        """The signatures that may be called."""
        with self._leased(call) as served:
            return metadata_response(call.message, served.metadata)

    async def get_model_status(self, call: Call) -> Any:
        """The state of one version of a model, or of all."""
        choice = _choice(call)
        with not_found_as(versions_not_found(choice)):
            return status_response(
                self.service.version_status(choice.name, version=choice.version, label=choice.label)
            )

    async def handle_reload_config_request(self, call: Call) -> Any:
        """Serve other models or versions from now on; answers when they are served."""
        await self.service.reload_models(configs_of_message(call.message.config))
        return tf_messages.ReloadConfigResponse(status={})

    def _leased(self, call: Call) -> AbstractContextManager[ServedVersion]:
        choice = _choice(call)
        with not_found_as(servable_not_found(choice)):
            return self.service.leased(choice.name, version=choice.version, label=choice.label)


def _choice(call: Call) -> ModelChoice:
    choice = model_choice(call.message.model_spec)
    call.model = choice.name
    return choice
