from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Id(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: str
    def __init__(self, number: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class IdList(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedCompositeFieldContainer[Id]
    def __init__(self, ids: _Optional[_Iterable[_Union[Id, _Mapping]]] = ...) -> None: ...

class EmbeddedHistory(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("null_value", "bool_value", "int_value", "double_value", "string_value", "list_value", "map_value")
    NULL_VALUE_FIELD_NUMBER: _ClassVar[int]
    BOOL_VALUE_FIELD_NUMBER: _ClassVar[int]
    INT_VALUE_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_VALUE_FIELD_NUMBER: _ClassVar[int]
    STRING_VALUE_FIELD_NUMBER: _ClassVar[int]
    LIST_VALUE_FIELD_NUMBER: _ClassVar[int]
    MAP_VALUE_FIELD_NUMBER: _ClassVar[int]
    null_value: bool
    bool_value: bool
    int_value: int
    double_value: float
    string_value: str
    list_value: ValueList
    map_value: ValueMap
    def __init__(self, null_value: _Optional[bool] = ..., bool_value: _Optional[bool] = ..., int_value: _Optional[int] = ..., double_value: _Optional[float] = ..., string_value: _Optional[str] = ..., list_value: _Optional[_Union[ValueList, _Mapping]] = ..., map_value: _Optional[_Union[ValueMap, _Mapping]] = ...) -> None: ...

class ValueList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class ValueMap(_message.Message):
    __slots__ = ("entries",)
    class EntriesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.MessageMap[str, Value]
    def __init__(self, entries: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class SearchParams(_message.Message):
    __slots__ = ("policy", "ef", "beam_width", "max_steps", "level_topn", "gate_width", "gate_margin")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    EF_FIELD_NUMBER: _ClassVar[int]
    BEAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_TOPN_FIELD_NUMBER: _ClassVar[int]
    GATE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    GATE_MARGIN_FIELD_NUMBER: _ClassVar[int]
    policy: str
    ef: int
    beam_width: int
    max_steps: int
    level_topn: _containers.RepeatedScalarFieldContainer[int]
    gate_width: int
    gate_margin: float
    def __init__(self, policy: _Optional[str] = ..., ef: _Optional[int] = ..., beam_width: _Optional[int] = ..., max_steps: _Optional[int] = ..., level_topn: _Optional[_Iterable[int]] = ..., gate_width: _Optional[int] = ..., gate_margin: _Optional[float] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("user_id", "history", "comm_seq", "k", "model", "version", "params", "profile", "include_ids", "exclude_ids", "filter", "exclude_seen", "timeout_ms", "strict", "explain", "with_attributes")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    COMM_SEQ_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_IDS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SEEN_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    WITH_ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    history: IdList
    comm_seq: EmbeddedHistory
    k: int
    model: str
    version: int
    params: SearchParams
    profile: str
    include_ids: _containers.RepeatedCompositeFieldContainer[Id]
    exclude_ids: _containers.RepeatedCompositeFieldContainer[Id]
    filter: ValueMap
    exclude_seen: bool
    timeout_ms: float
    strict: bool
    explain: bool
    with_attributes: bool
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ..., history: _Optional[_Union[IdList, _Mapping]] = ..., comm_seq: _Optional[_Union[EmbeddedHistory, _Mapping]] = ..., k: _Optional[int] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., params: _Optional[_Union[SearchParams, _Mapping]] = ..., profile: _Optional[str] = ..., include_ids: _Optional[_Iterable[_Union[Id, _Mapping]]] = ..., exclude_ids: _Optional[_Iterable[_Union[Id, _Mapping]]] = ..., filter: _Optional[_Union[ValueMap, _Mapping]] = ..., exclude_seen: _Optional[bool] = ..., timeout_ms: _Optional[float] = ..., strict: _Optional[bool] = ..., explain: _Optional[bool] = ..., with_attributes: _Optional[bool] = ...) -> None: ...

class Hit(_message.Message):
    __slots__ = ("item_id", "score", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    item_id: Id
    score: float
    attributes: _containers.MessageMap[str, Value]
    def __init__(self, item_id: _Optional[_Union[Id, _Mapping]] = ..., score: _Optional[float] = ..., attributes: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class Note(_message.Message):
    __slots__ = ("code", "message", "count")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    count: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("items", "model", "version", "n_scored", "timings_ms", "notes", "explain")
    class TimingsMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ExplainEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    N_SCORED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_MS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Hit]
    model: str
    version: int
    n_scored: int
    timings_ms: _containers.ScalarMap[str, float]
    notes: _containers.RepeatedCompositeFieldContainer[Note]
    explain: _containers.MessageMap[str, Value]
    def __init__(self, items: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., n_scored: _Optional[int] = ..., timings_ms: _Optional[_Mapping[str, float]] = ..., notes: _Optional[_Iterable[_Union[Note, _Mapping]]] = ..., explain: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class BatchRetrieveRequest(_message.Message):
    __slots__ = ("queries",)
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[RetrieveRequest]
    def __init__(self, queries: _Optional[_Iterable[_Union[RetrieveRequest, _Mapping]]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "grpc_code")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    GRPC_CODE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    grpc_code: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., grpc_code: _Optional[int] = ...) -> None: ...

class BatchRetrieveResult(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: RetrieveResponse
    error: Error
    def __init__(self, response: _Optional[_Union[RetrieveResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class BatchRetrieveResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[BatchRetrieveResult]
    def __init__(self, results: _Optional[_Iterable[_Union[BatchRetrieveResult, _Mapping]]] = ...) -> None: ...

class RecordEventsRequest(_message.Message):
    __slots__ = ("user_id", "item_ids")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    item_ids: _containers.RepeatedCompositeFieldContainer[Id]
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ..., item_ids: _Optional[_Iterable[_Union[Id, _Mapping]]] = ...) -> None: ...

class RecordEventsResponse(_message.Message):
    __slots__ = ("recorded",)
    RECORDED_FIELD_NUMBER: _ClassVar[int]
    recorded: int
    def __init__(self, recorded: _Optional[int] = ...) -> None: ...

class GetUserRequest(_message.Message):
    __slots__ = ("user_id", "model")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    model: str
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class GetUserResponse(_message.Message):
    __slots__ = ("user_id", "history", "n_base", "n_live")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    N_BASE_FIELD_NUMBER: _ClassVar[int]
    N_LIVE_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    history: _containers.RepeatedCompositeFieldContainer[Id]
    n_base: int
    n_live: int
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ..., history: _Optional[_Iterable[_Union[Id, _Mapping]]] = ..., n_base: _Optional[int] = ..., n_live: _Optional[int] = ...) -> None: ...

class DeleteUserRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: Id
    def __init__(self, user_id: _Optional[_Union[Id, _Mapping]] = ...) -> None: ...

class DeleteUserResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
