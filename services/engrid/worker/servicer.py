"""ComputeService over gRPC: one model, one training run at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc

from engrid.client import ClientConfig, MemoryClient, prune_versions
from engrid.directory import DirectoryError
from engrid.rpc.errors import EngridError, abort
from engrid.storage.errors import CheckpointError, CheckpointMissingError
from engrid.v1 import compute_pb2 as pb
from engrid.v1 import compute_pb2_grpc

from .config import TrainConfig, WorkerConfig
from .engine import Engine, Generation
from .run import Place, Progress, train
from .saved_model import open_checkpoint


class ComputeServicer(compute_pb2_grpc.ComputeServiceServicer):
    """Adapts Engine and train to the generated service."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._client: MemoryClient | None = None
        self._loading = threading.Lock()
        self._training = threading.Lock()

    def close(self) -> None:
        """Closes the connection to memory."""
        if self._client is not None:
            self._client.close()

    def LoadModel(self, request: pb.LoadModelRequest, context: grpc.ServicerContext) -> pb.LoadModelReply:
        try:
            with self._loading:
                engine = Engine(Path(request.checkpoint), self._memory_for(request), self._config.device)
                self._engine = engine
                self._drop_unused(engine.saved.run)
        except CheckpointMissingError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except (CheckpointError, DirectoryError, OSError, ValueError) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except EngridError as error:
            abort(context, error)
        return pb.LoadModelReply(run=engine.saved.run, step=engine.saved.step)

    def _memory_for(self, request: pb.LoadModelRequest) -> MemoryClient | None:
        """The connection to memory, where the model asked for has an Engram."""
        if open_checkpoint(Path(request.checkpoint)).model.engram is None:
            return None
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _connect(self) -> MemoryClient:
        config = ClientConfig(
            push_timeout=self._config.push_timeout,
            shared_memory=self._config.shared_memory,
            cache_bytes=self._config.cache_bytes,
        )
        return MemoryClient(self._config.directory, config)

    def _drop_unused(self, run: str) -> None:
        """Versions of the run that were loaded before, if nobody else reads them. Failing, they stay for next time."""
        if self._client is not None:
            with suppress(EngridError, DirectoryError):
                prune_versions(self._client, run)

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateReply]:
        engine = self._engine
        if engine is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no model is loaded; load a checkpoint first")
        generation = engine.generate(
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            explain=request.explain,
            draft_tokens=request.draft_tokens,
        )
        try:
            sent = 0
            for text in generation.text:
                if not context.is_active():
                    return
                trace = [] if sent else _traces(generation)
                yield pb.GenerateReply(text=text, token_ids=generation.token_ids[sent:], trace=trace)
                sent = len(generation.token_ids)
            trace = [] if sent else _traces(generation)
            yield pb.GenerateReply(token_ids=generation.token_ids[sent:], trace=trace, totals=_totals(generation))
        except EngridError as error:
            abort(context, error)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def Train(self, request: pb.TrainRequest, context: grpc.ServicerContext) -> Iterator[pb.TrainProgress]:
        if not self._training.acquire(blocking=False):
            context.abort(grpc.StatusCode.ABORTED, f"worker {self._config.name} is training already")
        try:
            config = TrainConfig.from_json(json.loads(request.config))
            place = Place(
                identity=request.identity,
                rank=request.rank,
                workers=max(1, request.workers),
                rendezvous=request.rendezvous,
            )
            for progress in train(config, place, self._connect, self._config.device):
                if not context.is_active():
                    return
                yield _progress(config, progress)
        except EngridError as error:
            abort(context, error)
        except (ValueError, TypeError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except (DirectoryError, OSError, RuntimeError) as error:
            # RuntimeError is what torch.distributed raises when another worker goes away.
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"worker {self._config.name}: {error}")
        finally:
            self._training.release()

    def Describe(self, request: pb.WorkerDescribeRequest, context: grpc.ServicerContext) -> pb.WorkerDescribeReply:
        return pb.WorkerDescribeReply(
            name=self._config.name,
            device=self._config.device,
            checkpoint=self._engine.checkpoint if self._engine else "",
            training=self._training.locked(),
        )


def _progress(config: TrainConfig, progress: Progress) -> pb.TrainProgress:
    reply = pb.TrainProgress(steps=config.steps, phase=progress.phase)
    if progress.step is not None:
        step = progress.step
        reply.step, reply.loss, reply.exposed_wait = step.step, step.loss, step.exposed_wait
        reply.tokens_per_second = config.batch * config.length / step.seconds
    if progress.result is not None:
        reply.step = config.steps
        reply.result = json.dumps(progress.result)
    return reply


def _totals(generation: Generation) -> pb.GenerateTotals:
    totals = generation.totals
    return pb.GenerateTotals(
        prompt_tokens=totals.prompt_tokens,
        new_tokens=totals.new_tokens,
        prefill_time=totals.prefill_time,
        decode_time=totals.decode_time,
        exposed_wait=totals.exposed_wait,
        rows_fetched=totals.rows,
        bytes_fetched=totals.bytes,
        drafted_tokens=totals.drafts.drafted,
        accepted_tokens=totals.drafts.accepted,
        rows_here=totals.rows_here,
    )


def _traces(generation: Generation) -> list[pb.TokenTrace]:
    return [
        pb.TokenTrace(
            token=trace.token,
            layer=trace.layer,
            ngrams=[pb.NgramTrace(order=each.order, text=each.text, row_ids=each.row_ids) for each in trace.ngrams],
            gates=trace.gates,
        )
        for trace in generation.trace
    ]
