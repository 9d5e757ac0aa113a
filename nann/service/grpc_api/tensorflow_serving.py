"""tensorflow.serving.PredictionService and ModelService, for clients that speak to TensorFlow Serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from nann.engine.errors import RetrievalError, UnknownModel, UnknownVersion
from nann.service.grpc_api.call import Call, Method
from nann.service.retrieval import RetrievalService
from nann.service.types import ModelMetadata
from nann.service.wire import tf_messages
from nann.service.wire.tf_predict import (
    ModelChoice,
    metadata_response,
    model_choice,
    predict_call,
    predict_response,
    servable_not_found,
    status_response,
    versions_not_found,
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
        return {"GetModelStatus": (tf_messages.GetModelStatusRequest, self.get_model_status)}

    async def predict(self, call: Call) -> Any:
        """NANN's served search: embedded histories in, item ids (and scores) out."""
        metadata = self._metadata(call)
        predict = predict_call(call.message, metadata)
        results = await self.service.retrieve_many(predict.requests, deadline_s=call.deadline_s)
        for result in results:
            if isinstance(result, RetrievalError):
                raise result
        replies = [result for result in results if not isinstance(result, RetrievalError)]
        return predict_response(predict, replies, metadata)

    async def get_model_metadata(self, call: Call) -> Any:
        """The signatures that may be called."""
        return metadata_response(call.message, self._metadata(call))

    async def get_model_status(self, call: Call) -> Any:
        """The state of one version of a model, or of all."""
        choice = _choice(call)
        with _not_found_as(versions_not_found(choice)):
            return status_response(
                self.service.version_status(choice.name, version=choice.version, label=choice.label)
            )

    def _metadata(self, call: Call) -> ModelMetadata:
        choice = _choice(call)
        with _not_found_as(servable_not_found(choice)):
            return self.service.metadata(choice.name, version=choice.version, label=choice.label)


def _choice(call: Call) -> ModelChoice:
    choice = model_choice(call.message.model_spec)
    call.model = choice.name
    return choice


@contextmanager
def _not_found_as(message: str) -> Iterator[None]:
    """Say in TensorFlow Serving's words that there is no such model or version."""
    try:
        yield
    except (UnknownModel, UnknownVersion) as error:
        raise type(error)(message) from error
