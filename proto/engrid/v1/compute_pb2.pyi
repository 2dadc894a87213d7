from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadModelRequest(_message.Message):
    __slots__ = ("checkpoint", "run")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    run: str
    def __init__(self, checkpoint: _Optional[str] = ..., run: _Optional[str] = ...) -> None: ...

class LoadModelReply(_message.Message):
    __slots__ = ("run", "step", "model", "checkpoint")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    run: str
    step: int
    model: str
    checkpoint: str
    def __init__(self, run: _Optional[str] = ..., step: _Optional[int] = ..., model: _Optional[str] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "max_new_tokens", "temperature", "seed", "explain", "draft_tokens", "model")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    explain: bool
    draft_tokens: int
    model: str
    def __init__(self, prompt: _Optional[str] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., explain: bool = ..., draft_tokens: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("text", "token_ids", "totals", "trace")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    totals: GenerateTotals
    trace: _containers.RepeatedCompositeFieldContainer[TokenTrace]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., totals: _Optional[_Union[GenerateTotals, _Mapping]] = ..., trace: _Optional[_Iterable[_Union[TokenTrace, _Mapping]]] = ...) -> None: ...

class GenerateTotals(_message.Message):
    __slots__ = ("prompt_tokens", "new_tokens", "prefill_time", "decode_time", "exposed_wait", "rows_fetched", "bytes_fetched", "drafted_tokens", "accepted_tokens", "rows_here")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TIME_FIELD_NUMBER: _ClassVar[int]
    DECODE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_WAIT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FETCHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_HERE_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    new_tokens: int
    prefill_time: float
    decode_time: float
    exposed_wait: float
    rows_fetched: int
    bytes_fetched: int
    drafted_tokens: int
    accepted_tokens: int
    rows_here: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., prefill_time: _Optional[float] = ..., decode_time: _Optional[float] = ..., exposed_wait: _Optional[float] = ..., rows_fetched: _Optional[int] = ..., bytes_fetched: _Optional[int] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., rows_here: _Optional[int] = ...) -> None: ...

class TokenTrace(_message.Message):
    __slots__ = ("token", "layer", "ngrams", "gates")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NGRAMS_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    token: str
    layer: int
    ngrams: _containers.RepeatedCompositeFieldContainer[NgramTrace]
    gates: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token: _Optional[str] = ..., layer: _Optional[int] = ..., ngrams: _Optional[_Iterable[_Union[NgramTrace, _Mapping]]] = ..., gates: _Optional[_Iterable[float]] = ...) -> None: ...

class NgramTrace(_message.Message):
    __slots__ = ("order", "text", "row_ids")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    order: int
    text: str
    row_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, order: _Optional[int] = ..., text: _Optional[str] = ..., row_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("config", "rank", "workers", "rendezvous", "identity")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    config: str
    rank: int
    workers: int
    rendezvous: str
    identity: str
    def __init__(self, config: _Optional[str] = ..., rank: _Optional[int] = ..., workers: _Optional[int] = ..., rendezvous: _Optional[str] = ..., identity: _Optional[str] = ...) -> None: ...

class TrainProgress(_message.Message):
    __slots__ = ("step", "steps", "loss", "tokens_per_second", "exposed_wait", "phase", "result", "notice")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_WAIT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    step: int
    steps: int
    loss: float
    tokens_per_second: float
    exposed_wait: float
    phase: str
    result: str
    notice: str
    def __init__(self, step: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., exposed_wait: _Optional[float] = ..., phase: _Optional[str] = ..., result: _Optional[str] = ..., notice: _Optional[str] = ...) -> None: ...

class StopTrainingRequest(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: str
    def __init__(self, identity: _Optional[str] = ...) -> None: ...

class StopTrainingReply(_message.Message):
    __slots__ = ("stopping",)
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    stopping: bool
    def __init__(self, stopping: bool = ...) -> None: ...

class WorkerDescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDescribeReply(_message.Message):
    __slots__ = ("name", "device", "checkpoint", "training", "models")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    device: str
    checkpoint: str
    training: bool
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., device: _Optional[str] = ..., checkpoint: _Optional[str] = ..., training: bool = ..., models: _Optional[_Iterable[str]] = ...) -> None: ...
