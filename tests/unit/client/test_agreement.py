"""The client knows what the server knows: a field, error or method of one side alone fails here."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import nann_client as nc
import pytest
from nann_client import native, operations
from nann_client.client import AsyncClient, Client
from nann_client.errors import error_of_code
from nann_client.pb import RETRIEVAL_SERVICE, method_types

from nann.engine.errors import ArtifactError, RetrievalError
from nann.service import errors as server_errors
from nann.service.errors import ERROR_TABLE
from nann.service.grpc_api import call as grpc_call
from nann.service.http_api import docs
from nann.service.http_api.app import _HTTP_CODES
from nann.service.http_api.call import _HTTP_ROWS
from nann.service.pb import retrieval_pb2 as pb
from nann.service.wire.rest_json import ParamsBody, RetrieveBody

# Raised at start, at a change of what is served, or for a signature: to none of the client's calls.
NOT_OURS = {ArtifactError, server_errors.UnknownSignature} | {
    getattr(server_errors, name)
    for name in ("FailedPrecondition", "NotEnoughMemory")
    if hasattr(server_errors, name)
}
RENAMED = {"InternalError": "ServerError", "RetrievalError": "ServerError"}


def names(kind: Any) -> set[str]:
    return {field.name for field in fields(kind)}


def test_a_query_has_every_field_that_the_server_takes() -> None:
    over_rest = set(RetrieveBody.model_fields)
    assert names(nc.Query) == over_rest - {"timeout_ms"}  # the client's own deadline takes its place
    assert names(nc.SearchParams) == set(ParamsBody.model_fields)
    over_grpc = {field.name for field in pb.RetrieveRequest.DESCRIPTOR.fields}
    assert names(nc.Query) == over_grpc - {"timeout_ms"}


def test_a_reply_has_every_field_that_the_server_gives() -> None:
    assert names(nc.Reply) == set(docs.RetrieveReplyBody.model_fields) | {"request_id"}
    assert names(nc.Item) == set(docs.ItemReply.model_fields)
    assert names(nc.Note) == set(docs.NoteReply.model_fields)
    assert names(nc.User) == set(docs.UserReply.model_fields)


@pytest.mark.parametrize("server_class", set(ERROR_TABLE) - NOT_OURS, ids=lambda cls: cls.__name__)
def test_an_error_has_the_class_of_its_servers_name(server_class: type[RetrievalError]) -> None:
    error = error_of_code(ERROR_TABLE[server_class].code, "why", otherwise=nc.BadReply)
    name = server_class.__name__
    assert type(error).__name__ == RENAMED.get(name, name)


def test_the_tree_of_errors_is_the_servers() -> None:
    for server_class in set(ERROR_TABLE) - NOT_OURS:
        ours = type(error_of_code(ERROR_TABLE[server_class].code, ""))
        for above in set(ERROR_TABLE) - NOT_OURS - {RetrievalError}:
            theirs = type(error_of_code(ERROR_TABLE[above].code, ""))
            if theirs is not nc.ServerError:
                assert issubclass(ours, theirs) == issubclass(server_class, above)


def test_failures_of_http_itself_have_classes() -> None:
    for code in {row.code for row in _HTTP_ROWS.values()} | set(_HTTP_CODES.values()):
        assert type(error_of_code(code, "", otherwise=nc.BadReply)) is not nc.BadReply


def test_the_keys_of_grpcs_metadata_are_the_servers() -> None:
    assert native.REQUEST_ID_KEY == grpc_call.REQUEST_ID_KEY
    assert native._ERROR_CODE_KEY == grpc_call.ERROR_CODE_KEY
    assert native._PUSHBACK_KEY == grpc_call._PUSHBACK_KEY


def test_every_method_of_the_service_can_be_called() -> None:
    methods = pb.DESCRIPTOR.services_by_name["RetrievalService"].methods_by_name
    called = {method for service, method in native._METHODS.values() if service == RETRIEVAL_SERVICE}
    assert called == set(methods)
    for method in methods:
        request, _ = method_types(RETRIEVAL_SERVICE, method)
        assert request.DESCRIPTOR.full_name == methods[method].input_type.full_name


def test_both_clients_have_the_same_methods_with_the_same_signatures_and_texts() -> None:
    public = {name for name in vars(Client) if name[0] != "_"}
    assert public == {name for name in vars(AsyncClient) if name[0] != "_"}
    made = {name for name in public if hasattr(getattr(Client, name), "__wrapped__")}
    assert made == {"retrieve", "retrieve_many", "record_events", "user", "delete_user", "model_status"}
    for name in made:
        build = getattr(operations, name)
        for cls in (Client, AsyncClient):
            method = getattr(cls, name)
            assert method.__doc__ == build.__doc__
            assert inspect.signature(method) == inspect.signature(build)
        assert inspect.iscoroutinefunction(getattr(AsyncClient, name))


def test_what_is_public_is_listed() -> None:
    assert sorted(nc.__all__) == nc.__all__
    error_classes = {
        name for name, value in vars(nc).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert error_classes <= set(nc.__all__)
