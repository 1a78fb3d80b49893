import datetime

from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOG_LEVEL_UNSPECIFIED: _ClassVar[LogLevel]
    LOG_LEVEL_DEBUG: _ClassVar[LogLevel]
    LOG_LEVEL_INFO: _ClassVar[LogLevel]
    LOG_LEVEL_WARN: _ClassVar[LogLevel]
    LOG_LEVEL_ERROR: _ClassVar[LogLevel]

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    TASK_STATE_RUNNING: _ClassVar[TaskState]
    TASK_STATE_SUCCESS: _ClassVar[TaskState]
    TASK_STATE_FAILED: _ClassVar[TaskState]
    TASK_STATE_SKIPPED: _ClassVar[TaskState]
    TASK_STATE_UP_FOR_RESCHEDULE: _ClassVar[TaskState]
LOG_LEVEL_UNSPECIFIED: LogLevel
LOG_LEVEL_DEBUG: LogLevel
LOG_LEVEL_INFO: LogLevel
LOG_LEVEL_WARN: LogLevel
LOG_LEVEL_ERROR: LogLevel
TASK_STATE_UNSPECIFIED: TaskState
TASK_STATE_RUNNING: TaskState
TASK_STATE_SUCCESS: TaskState
TASK_STATE_FAILED: TaskState
TASK_STATE_SKIPPED: TaskState
TASK_STATE_UP_FOR_RESCHEDULE: TaskState

class RegisterRequest(_message.Message):
    __slots__ = ("agent_version", "hostname", "environment")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    hostname: str
    environment: _containers.ScalarMap[str, str]
    def __init__(self, agent_version: _Optional[str] = ..., hostname: _Optional[str] = ..., environment: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("session_id", "server_time")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    server_time: _timestamp_pb2.Timestamp
    def __init__(self, session_id: _Optional[str] = ..., server_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetTaskSpecRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TaskSpec(_message.Message):
    __slots__ = ("tenant_id", "dag_id", "dag_version", "run_id", "task_id", "try_number", "operator", "entrypoint", "environment", "xcom_input_mapping", "execution_timeout_seconds", "extra", "call_args_json", "logical_date", "data_interval_start", "data_interval_end", "params_json", "first_reschedule_at", "max_tries", "declared_variables", "declared_connections")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class XcomInputMappingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    DAG_ID_FIELD_NUMBER: _ClassVar[int]
    DAG_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    TRY_NUMBER_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    ENTRYPOINT_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    XCOM_INPUT_MAPPING_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    CALL_ARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_DATE_FIELD_NUMBER: _ClassVar[int]
    DATA_INTERVAL_START_FIELD_NUMBER: _ClassVar[int]
    DATA_INTERVAL_END_FIELD_NUMBER: _ClassVar[int]
    PARAMS_JSON_FIELD_NUMBER: _ClassVar[int]
    FIRST_RESCHEDULE_AT_FIELD_NUMBER: _ClassVar[int]
    MAX_TRIES_FIELD_NUMBER: _ClassVar[int]
    DECLARED_VARIABLES_FIELD_NUMBER: _ClassVar[int]
    DECLARED_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    tenant_id: str
    dag_id: str
    dag_version: str
    run_id: str
    task_id: str
    try_number: int
    operator: str
    entrypoint: str
    environment: _containers.ScalarMap[str, str]
    xcom_input_mapping: _containers.ScalarMap[str, str]
    execution_timeout_seconds: int
    extra: _struct_pb2.Struct
    call_args_json: str
    logical_date: str
    data_interval_start: str
    data_interval_end: str
    params_json: str
    first_reschedule_at: str
    max_tries: int
    declared_variables: _containers.RepeatedScalarFieldContainer[str]
    declared_connections: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tenant_id: _Optional[str] = ..., dag_id: _Optional[str] = ..., dag_version: _Optional[str] = ..., run_id: _Optional[str] = ..., task_id: _Optional[str] = ..., try_number: _Optional[int] = ..., operator: _Optional[str] = ..., entrypoint: _Optional[str] = ..., environment: _Optional[_Mapping[str, str]] = ..., xcom_input_mapping: _Optional[_Mapping[str, str]] = ..., execution_timeout_seconds: _Optional[int] = ..., extra: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., call_args_json: _Optional[str] = ..., logical_date: _Optional[str] = ..., data_interval_start: _Optional[str] = ..., data_interval_end: _Optional[str] = ..., params_json: _Optional[str] = ..., first_reschedule_at: _Optional[str] = ..., max_tries: _Optional[int] = ..., declared_variables: _Optional[_Iterable[str]] = ..., declared_connections: _Optional[_Iterable[str]] = ...) -> None: ...

class FetchXComRequest(_message.Message):
    __slots__ = ("upstream_task_id", "key")
    UPSTREAM_TASK_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    upstream_task_id: str
    key: str
    def __init__(self, upstream_task_id: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class FetchXComResponse(_message.Message):
    __slots__ = ("value", "content_type", "size_bytes", "created_at")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    value: bytes
    content_type: str
    size_bytes: int
    created_at: _timestamp_pb2.Timestamp
    def __init__(self, value: _Optional[bytes] = ..., content_type: _Optional[str] = ..., size_bytes: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class PushXComRequest(_message.Message):
    __slots__ = ("key", "value", "content_type")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    content_type: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ..., content_type: _Optional[str] = ...) -> None: ...

class PushXComResponse(_message.Message):
    __slots__ = ("accepted", "rejection_reason", "ttl_seconds")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTION_REASON_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    rejection_reason: str
    ttl_seconds: int
    def __init__(self, accepted: _Optional[bool] = ..., rejection_reason: _Optional[str] = ..., ttl_seconds: _Optional[int] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("time", "level", "message", "stream", "line_number")
    TIME_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    LINE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    level: LogLevel
    message: str
    stream: str
    line_number: int
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., level: _Optional[_Union[LogLevel, str]] = ..., message: _Optional[str] = ..., stream: _Optional[str] = ..., line_number: _Optional[int] = ...) -> None: ...

class LogAck(_message.Message):
    __slots__ = ("acknowledged_through_line",)
    ACKNOWLEDGED_THROUGH_LINE_FIELD_NUMBER: _ClassVar[int]
    acknowledged_through_line: int
    def __init__(self, acknowledged_through_line: _Optional[int] = ...) -> None: ...

class ReportStateRequest(_message.Message):
    __slots__ = ("state", "exit_code", "error_message", "occurred_at", "reschedule_at")
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    OCCURRED_AT_FIELD_NUMBER: _ClassVar[int]
    RESCHEDULE_AT_FIELD_NUMBER: _ClassVar[int]
    state: TaskState
    exit_code: int
    error_message: str
    occurred_at: _timestamp_pb2.Timestamp
    reschedule_at: _timestamp_pb2.Timestamp
    def __init__(self, state: _Optional[_Union[TaskState, str]] = ..., exit_code: _Optional[int] = ..., error_message: _Optional[str] = ..., occurred_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., reschedule_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ReportStateResponse(_message.Message):
    __slots__ = ("acknowledged", "should_terminate")
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    SHOULD_TERMINATE_FIELD_NUMBER: _ClassVar[int]
    acknowledged: bool
    should_terminate: bool
    def __init__(self, acknowledged: _Optional[bool] = ..., should_terminate: _Optional[bool] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("sent_at", "custom_metrics")
    class CustomMetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    CUSTOM_METRICS_FIELD_NUMBER: _ClassVar[int]
    sent_at: _timestamp_pb2.Timestamp
    custom_metrics: _containers.ScalarMap[str, float]
    def __init__(self, sent_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., custom_metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("should_terminate", "server_time", "renewed_token")
    SHOULD_TERMINATE_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    RENEWED_TOKEN_FIELD_NUMBER: _ClassVar[int]
    should_terminate: bool
    server_time: _timestamp_pb2.Timestamp
    renewed_token: str
    def __init__(self, should_terminate: _Optional[bool] = ..., server_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., renewed_token: _Optional[str] = ...) -> None: ...

class GetVariablesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetVariablesResponse(_message.Message):
    __slots__ = ("variables",)
    class VariablesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VARIABLES_FIELD_NUMBER: _ClassVar[int]
    variables: _containers.ScalarMap[str, str]
    def __init__(self, variables: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetConnectionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetConnectionsResponse(_message.Message):
    __slots__ = ("connection_uris",)
    class ConnectionUrisEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CONNECTION_URIS_FIELD_NUMBER: _ClassVar[int]
    connection_uris: _containers.ScalarMap[str, str]
    def __init__(self, connection_uris: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ExchangeTokenRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExchangeTokenResponse(_message.Message):
    __slots__ = ("agent_token",)
    AGENT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    agent_token: str
    def __init__(self, agent_token: _Optional[str] = ...) -> None: ...
