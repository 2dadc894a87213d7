"""`engrid generate`: a client of ComputeService."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from engrid.rpc.channel import command_channel
from engrid.rpc.errors import BadRequestError, from_rpc
from engrid.v1 import compute_pb2 as pb
from engrid.v1 import compute_pb2_grpc

from .config import ClusterError, Record
from .status import require_answers, shards_of

LOAD_TIMEOUT = 600.0
GENERATE_TIMEOUT = 600.0
LOAD_ATTEMPTS = 5
"""Times a model is loaded for one prompt, where other callers keep the worker busy with other models."""


@dataclass(frozen=True)
class Worker:
    """A compute worker, and the model on it to generate with."""

    peer: str
    stub: compute_pb2_grpc.ComputeServiceStub
    request: pb.LoadModelRequest
    loaded: pb.LoadModelReply
    traces: list[pb.TokenTrace] = field(default_factory=list)
    """Of the last explained prompt."""

    @property
    def model(self) -> str:
        """Names the model in requests."""
        return str(self.loaded.model)


def argument_text(argument: str) -> str:
    """Text of the command line. A byte that the locale's encoding lacks is UTF-8, as on any terminal of today.

    Raises ValueError where it is not.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the text is neither in the encoding of the locale nor in UTF-8: {error}") from error
    return argument


@contextmanager
def open_model(record: Record, checkpoint: Path | None, run: str = "") -> Iterator[Worker]:
    """The cluster's first worker, with a checkpoint loaded, or the version of a run that is published."""
    if not record.workers:
        raise ClusterError("the cluster has no compute workers; bring it up with --workers 1 or more")
    name, address = next(iter(record.workers.items()))
    require_answers(Path(record.run_dir), shards_of(record))
    request = pb.LoadModelRequest(checkpoint=str(checkpoint) if checkpoint else "", run=run)
    with command_channel(address) as channel:
        stub = compute_pb2_grpc.ComputeServiceStub(channel)  # type: ignore[no-untyped-call]
        peer = f"{name} at {address}"
        yield Worker(peer, stub, request, _load(stub, request, peer))


def _load(stub: compute_pb2_grpc.ComputeServiceStub, request: pb.LoadModelRequest, peer: str) -> pb.LoadModelReply:
    try:
        reply: pb.LoadModelReply = stub.LoadModel(request, timeout=LOAD_TIMEOUT)
    except grpc.RpcError as error:
        raise _plain(error, peer) from error
    return reply


def stream(
    worker: Worker,
    prompt: str,
    on_text: Callable[[str], None],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    explain: bool = False,
    draft_tokens: int = 0,
) -> pb.GenerateTotals:
    """Generates, handing on text as it comes; any way out of here cancels the call.

    A worker that has let go of the model meanwhile, for those that others asked for, is given it again.
    """
    request = pb.GenerateRequest(
        model=worker.model,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        explain=explain,
        draft_tokens=draft_tokens,
    )
    for attempt in range(LOAD_ATTEMPTS):
        try:
            return _stream(worker, request, on_text)
        except grpc.RpcError as error:
            if not _is_gone(error, worker.model) or attempt + 1 == LOAD_ATTEMPTS:
                raise _plain(error, worker.peer) from error
            again = pb.LoadModelRequest(checkpoint=worker.loaded.checkpoint)
            reply = _load(worker.stub, again, worker.peer)
            if reply.model != worker.model:
                raise BadRequestError(f"{worker.loaded.checkpoint} holds another model now; start again") from error
    raise AssertionError("the last attempt returns or raises")


def _stream(worker: Worker, request: pb.GenerateRequest, on_text: Callable[[str], None]) -> pb.GenerateTotals:
    call = worker.stub.Generate(request, timeout=GENERATE_TIMEOUT)
    totals = pb.GenerateTotals()
    try:
        for reply in call:
            if reply.text:
                on_text(reply.text)
            worker.traces.extend(reply.trace)
            if reply.HasField("totals"):
                totals = reply.totals
    finally:
        call.cancel()
    return totals


def _is_gone(error: grpc.RpcError, model: str) -> bool:
    """Whether the worker refused because it does not hold the model; nothing was generated then."""
    details = error.details() or ""
    return bool(
        error.code() == grpc.StatusCode.FAILED_PRECONDITION
        and details.startswith((f"model {model} is not", "no model"))
    )


def _plain(error: grpc.RpcError, peer: str) -> Exception:
    """A refusal in the worker's own words; an outage with the worker's name."""
    if error.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
    ):
        return BadRequestError(error.details())
    return from_rpc(error, peer)
