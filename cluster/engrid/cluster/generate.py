"""`engrid generate`: a client of ComputeService."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Worker:
    """An open compute worker."""

    peer: str
    stub: compute_pb2_grpc.ComputeServiceStub
    traces: list[pb.TokenTrace] = field(default_factory=list)
    """Of the last explained prompt."""


@contextmanager
def open_model(record: Record, checkpoint: Path) -> Iterator[Worker]:
    """The cluster's first worker, with the checkpoint loaded."""
    if not record.workers:
        raise ClusterError("the cluster has no compute workers; bring it up with --workers 1 or more")
    name, address = next(iter(record.workers.items()))
    require_answers(Path(record.run_dir), shards_of(record))
    with command_channel(address) as channel:
        worker = Worker(f"{name} at {address}", compute_pb2_grpc.ComputeServiceStub(channel))  # type: ignore[no-untyped-call]
        try:
            worker.stub.LoadModel(pb.LoadModelRequest(checkpoint=str(checkpoint)), timeout=LOAD_TIMEOUT)
        except grpc.RpcError as error:
            raise _plain(error, worker) from error
        yield worker


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
    """Generates, handing on text as it comes; any way out of here cancels the call."""
    request = pb.GenerateRequest(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        explain=explain,
        draft_tokens=draft_tokens,
    )
    call = worker.stub.Generate(request, timeout=GENERATE_TIMEOUT)
    totals = pb.GenerateTotals()
    try:
        for reply in call:
            if reply.text:
                on_text(reply.text)
            worker.traces.extend(reply.trace)
            if reply.HasField("totals"):
                totals = reply.totals
    except grpc.RpcError as error:
        raise _plain(error, worker) from error
    finally:
        call.cancel()
    return totals


def _plain(error: grpc.RpcError, worker: Worker) -> Exception:
    """A refusal in the worker's own words; an outage with the worker's name."""
    if error.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
    ):
        return BadRequestError(error.details())
    return from_rpc(error, worker.peer)
