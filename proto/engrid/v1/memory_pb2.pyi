from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    BAD_REQUEST: _ClassVar[ErrorCode]
    UNKNOWN_TABLE: _ClassVar[ErrorCode]
    ROW_OUT_OF_RANGE: _ClassVar[ErrorCode]
    ROW_WIDTH_MISMATCH: _ClassVar[ErrorCode]
    WRONG_EPOCH: _ClassVar[ErrorCode]
    DEADLINE_EXCEEDED: _ClassVar[ErrorCode]
    STEP_NOT_REACHED: _ClassVar[ErrorCode]
    REQUEST_TOO_LARGE: _ClassVar[ErrorCode]
    CANCELLED: _ClassVar[ErrorCode]
    NOT_FINITE: _ClassVar[ErrorCode]
    READ_ONLY_TABLE: _ClassVar[ErrorCode]
    FENCED: _ClassVar[ErrorCode]
    EXPECTED: _ClassVar[ErrorCode]
    OUT_OF_MEMORY: _ClassVar[ErrorCode]
    UNAVAILABLE: _ClassVar[ErrorCode]
    RUN_MISMATCH: _ClassVar[ErrorCode]
    DISK_FULL: _ClassVar[ErrorCode]
    PINNED: _ClassVar[ErrorCode]
    INTERNAL: _ClassVar[ErrorCode]

class PushOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUSH_OUTCOME_UNSPECIFIED: _ClassVar[PushOutcome]
    ACCEPTED: _ClassVar[PushOutcome]
    DUPLICATE: _ClassVar[PushOutcome]
ERROR_CODE_UNSPECIFIED: ErrorCode
BAD_REQUEST: ErrorCode
UNKNOWN_TABLE: ErrorCode
ROW_OUT_OF_RANGE: ErrorCode
ROW_WIDTH_MISMATCH: ErrorCode
WRONG_EPOCH: ErrorCode
DEADLINE_EXCEEDED: ErrorCode
STEP_NOT_REACHED: ErrorCode
REQUEST_TOO_LARGE: ErrorCode
CANCELLED: ErrorCode
NOT_FINITE: ErrorCode
READ_ONLY_TABLE: ErrorCode
FENCED: ErrorCode
EXPECTED: ErrorCode
OUT_OF_MEMORY: ErrorCode
UNAVAILABLE: ErrorCode
RUN_MISMATCH: ErrorCode
DISK_FULL: ErrorCode
PINNED: ErrorCode
INTERNAL: ErrorCode
PUSH_OUTCOME_UNSPECIFIED: PushOutcome
ACCEPTED: PushOutcome
DUPLICATE: PushOutcome

class LookupFrame(_message.Message):
    __slots__ = ("request", "cancel")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    request: LookupRequest
    cancel: int
    def __init__(self, request: _Optional[_Union[LookupRequest, _Mapping]] = ..., cancel: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("number", "epoch", "timeout_us", "step", "tables", "run")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    number: int
    epoch: int
    timeout_us: int
    step: int
    tables: _containers.RepeatedCompositeFieldContainer[TableIds]
    run: str
    def __init__(self, number: _Optional[int] = ..., epoch: _Optional[int] = ..., timeout_us: _Optional[int] = ..., step: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableIds, _Mapping]]] = ..., run: _Optional[str] = ...) -> None: ...

class TableIds(_message.Message):
    __slots__ = ("table", "row_ids", "row_bytes")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    table: str
    row_ids: bytes
    row_bytes: int
    def __init__(self, table: _Optional[str] = ..., row_ids: _Optional[bytes] = ..., row_bytes: _Optional[int] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("number", "rows", "error", "step")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    number: int
    rows: _containers.RepeatedScalarFieldContainer[bytes]
    error: Error
    step: int
    def __init__(self, number: _Optional[int] = ..., rows: _Optional[_Iterable[bytes]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., step: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "epoch", "expected", "attempt")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    epoch: int
    expected: int
    attempt: int
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ..., epoch: _Optional[int] = ..., expected: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("run", "attempt", "worker", "step", "learning_rate", "partitions", "epoch", "hold", "durable")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    worker: int
    step: int
    learning_rate: float
    partitions: _containers.RepeatedCompositeFieldContainer[PartitionPush]
    epoch: int
    hold: bool
    durable: bool
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., worker: _Optional[int] = ..., step: _Optional[int] = ..., learning_rate: _Optional[float] = ..., partitions: _Optional[_Iterable[_Union[PartitionPush, _Mapping]]] = ..., epoch: _Optional[int] = ..., hold: bool = ..., durable: bool = ...) -> None: ...

class PartitionPush(_message.Message):
    __slots__ = ("table", "partition", "seq", "row_ids", "gradients")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    table: str
    partition: int
    seq: int
    row_ids: bytes
    gradients: bytes
    def __init__(self, table: _Optional[str] = ..., partition: _Optional[int] = ..., seq: _Optional[int] = ..., row_ids: _Optional[bytes] = ..., gradients: _Optional[bytes] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedScalarFieldContainer[PushOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[PushOutcome, str]]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("run", "attempt", "worker", "step", "durable", "epoch")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    worker: int
    step: int
    durable: bool
    epoch: int
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., worker: _Optional[int] = ..., step: _Optional[int] = ..., durable: bool = ..., epoch: _Optional[int] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BeginRunRequest(_message.Message):
    __slots__ = ("run", "attempt", "workers", "tables", "token")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    workers: int
    tables: _containers.RepeatedScalarFieldContainer[str]
    token: str
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., workers: _Optional[int] = ..., tables: _Optional[_Iterable[str]] = ..., token: _Optional[str] = ...) -> None: ...

class BeginRunReply(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class AdoptRequest(_message.Message):
    __slots__ = ("placement", "check_only")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    CHECK_ONLY_FIELD_NUMBER: _ClassVar[int]
    placement: str
    check_only: bool
    def __init__(self, placement: _Optional[str] = ..., check_only: bool = ...) -> None: ...

class AdoptReply(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("shard", "placement", "partitions", "bytes", "bytes_limit", "local_socket", "instance", "pinned")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SOCKET_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    shard: str
    placement: str
    partitions: _containers.RepeatedCompositeFieldContainer[PartitionState]
    bytes: int
    bytes_limit: int
    local_socket: str
    instance: str
    pinned: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, shard: _Optional[str] = ..., placement: _Optional[str] = ..., partitions: _Optional[_Iterable[_Union[PartitionState, _Mapping]]] = ..., bytes: _Optional[int] = ..., bytes_limit: _Optional[int] = ..., local_socket: _Optional[str] = ..., instance: _Optional[str] = ..., pinned: _Optional[_Iterable[str]] = ...) -> None: ...

class PartitionState(_message.Message):
    __slots__ = ("table", "partition", "start", "stop", "step", "run", "attempt", "empty")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EMPTY_FIELD_NUMBER: _ClassVar[int]
    table: str
    partition: int
    start: int
    stop: int
    step: int
    run: str
    attempt: int
    empty: bool
    def __init__(self, table: _Optional[str] = ..., partition: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., step: _Optional[int] = ..., run: _Optional[str] = ..., attempt: _Optional[int] = ..., empty: bool = ...) -> None: ...

class LoadChunk(_message.Message):
    __slots__ = ("table", "partition", "step", "rows", "run", "attempt")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    table: str
    partition: int
    step: int
    rows: bytes
    run: str
    attempt: int
    def __init__(self, table: _Optional[str] = ..., partition: _Optional[int] = ..., step: _Optional[int] = ..., rows: _Optional[bytes] = ..., run: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("table", "partition", "rows_per_chunk")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    table: str
    partition: int
    rows_per_chunk: int
    def __init__(self, table: _Optional[str] = ..., partition: _Optional[int] = ..., rows_per_chunk: _Optional[int] = ...) -> None: ...

class ExportChunk(_message.Message):
    __slots__ = ("rows", "step")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    step: int
    def __init__(self, rows: _Optional[bytes] = ..., step: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("reader", "tables", "seconds")
    READER_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    reader: str
    tables: _containers.RepeatedScalarFieldContainer[str]
    seconds: float
    def __init__(self, reader: _Optional[str] = ..., tables: _Optional[_Iterable[str]] = ..., seconds: _Optional[float] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("run", "attempt", "step", "tables", "folder", "partial", "base", "wait")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    step: int
    tables: _containers.RepeatedScalarFieldContainer[str]
    folder: str
    partial: str
    base: str
    wait: float
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., tables: _Optional[_Iterable[str]] = ..., folder: _Optional[str] = ..., partial: _Optional[str] = ..., base: _Optional[str] = ..., wait: _Optional[float] = ...) -> None: ...

class CheckpointProgress(_message.Message):
    __slots__ = ("begun", "partitions")
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    begun: bool
    partitions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, begun: bool = ..., partitions: _Optional[_Iterable[str]] = ...) -> None: ...

class SettleCheckpointRequest(_message.Message):
    __slots__ = ("partial", "published")
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    partial: str
    published: str
    def __init__(self, partial: _Optional[str] = ..., published: _Optional[str] = ...) -> None: ...

class SettleCheckpointReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("folder", "name", "tables", "attempt", "wait", "token")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    folder: str
    name: str
    tables: _containers.RepeatedScalarFieldContainer[str]
    attempt: int
    wait: float
    token: str
    def __init__(self, folder: _Optional[str] = ..., name: _Optional[str] = ..., tables: _Optional[_Iterable[str]] = ..., attempt: _Optional[int] = ..., wait: _Optional[float] = ..., token: _Optional[str] = ...) -> None: ...

class RestoreReply(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class CheckFolderRequest(_message.Message):
    __slots__ = ("folder", "file")
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    folder: str
    file: str
    def __init__(self, folder: _Optional[str] = ..., file: _Optional[str] = ...) -> None: ...

class CheckFolderReply(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("lookups", "rows", "bytes", "pushes", "pushed_rows", "steps_applied", "errors", "streams", "streams_limit", "uptime")
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    PUSHED_ROWS_FIELD_NUMBER: _ClassVar[int]
    STEPS_APPLIED_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    lookups: int
    rows: int
    bytes: int
    pushes: int
    pushed_rows: int
    steps_applied: int
    errors: int
    streams: int
    streams_limit: int
    uptime: float
    def __init__(self, lookups: _Optional[int] = ..., rows: _Optional[int] = ..., bytes: _Optional[int] = ..., pushes: _Optional[int] = ..., pushed_rows: _Optional[int] = ..., steps_applied: _Optional[int] = ..., errors: _Optional[int] = ..., streams: _Optional[int] = ..., streams_limit: _Optional[int] = ..., uptime: _Optional[float] = ...) -> None: ...
