"""ComputeService over gRPC: a few models, one training run at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import grpc

from engrid.directory import DirectoryError
from engrid.rpc.errors import EngridError, abort
from engrid.storage.errors import CheckpointError, CheckpointMissingError
from engrid.v1 import compute_pb2 as pb
from engrid.v1 import compute_pb2_grpc

from .config import TrainConfig, WorkerConfig
from .serve.engine import Generation
from .serve.models import ModelNotLoadedError, Models, connect
from .train.run import Place, Progress, train
from .train.stopping import Stopping


class ComputeServicer(compute_pb2_grpc.ComputeServiceServicer):
    """Adapts Models and train to the generated service."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._models = Models(config)
        self._training = threading.Lock()
        self._run: tuple[str, Stopping] | None = None
        """Identity of the run under way, and how it is told to end."""

    def close(self) -> None:
        """Closes the connection to memory."""
        self._models.close()

    def LoadModel(self, request: pb.LoadModelRequest, context: grpc.ServicerContext) -> pb.LoadModelReply:
        if bool(request.checkpoint) == bool(request.run):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "give a checkpoint, or a run whose version is published")
        try:
            if request.run:
                engine = self._models.load_published(request.run, context.is_active)
            else:
                engine = self._models.load(Path(request.checkpoint), context.is_active)
        except CheckpointMissingError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except (CheckpointError, DirectoryError, OSError, ValueError) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except EngridError as error:
            abort(context, error)
        saved = engine.saved
        return pb.LoadModelReply(run=saved.run, step=saved.step, model=saved.model_name, checkpoint=str(saved.path))

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateReply]:
        if not request.model and self._models.names():
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the request names no model; give the name that LoadModel returned"
            )
        try:
            engine = self._models.named(request.model)
        except ModelNotLoadedError as error:
            none = "no model is loaded; load a checkpoint first"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error) if self._models.names() else none)
        try:
            generation = engine.generate(
                request.prompt,
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                seed=request.seed,
                explain=request.explain,
                draft_tokens=request.draft_tokens,
            )
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
        stopping = Stopping()
        try:
            self._run = (request.identity, stopping)
            if not context.add_callback(stopping.cancel):
                return
            yield from self._train(request, stopping)
        except Exception as error:  # noqa: BLE001 - all are answered below, or raised again
            if stopping.cancelled:
                return  # nobody hears of it; what was cut off says so in its own way
            self._abort_training(context, error)
        finally:
            self._run = None
            self._training.release()

    def _train(self, request: pb.TrainRequest, stopping: Stopping) -> Iterator[pb.TrainProgress]:
        config = TrainConfig.from_json(json.loads(request.config))
        place = Place(
            identity=request.identity,
            rank=request.rank,
            workers=max(1, request.workers),
            rendezvous=request.rendezvous,
        )
        for progress in train(config, place, partial(connect, self._config), self._config.device, stopping):
            yield _progress(config, progress)

    def _abort_training(self, context: grpc.ServicerContext, error: Exception) -> NoReturn:
        if isinstance(error, EngridError):
            abort(context, error)
        if isinstance(error, (ValueError, TypeError)):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if isinstance(error, (DirectoryError, OSError, RuntimeError)):
            # RuntimeError is what torch.distributed raises when another worker goes away.
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"worker {self._config.name}: {error}")
        raise error

    def StopTraining(self, request: pb.StopTrainingRequest, context: grpc.ServicerContext) -> pb.StopTrainingReply:
        run = self._run
        if run is None or run[0] != request.identity:
            return pb.StopTrainingReply(stopping=False)
        run[1].finish()
        return pb.StopTrainingReply(stopping=True)

    def Describe(self, request: pb.WorkerDescribeRequest, context: grpc.ServicerContext) -> pb.WorkerDescribeReply:
        last = self._models.last
        return pb.WorkerDescribeReply(
            name=self._config.name,
            device=self._config.device,
            checkpoint=str(last.saved.path) if last else "",
            training=self._training.locked(),
            models=self._models.names(),
        )


def _progress(config: TrainConfig, progress: Progress) -> pb.TrainProgress:
    reply = pb.TrainProgress(steps=config.steps, phase=progress.phase, notice=progress.notice)
    if progress.step is not None:
        step = progress.step
        reply.step, reply.loss, reply.exposed_wait = step.step, step.loss, step.exposed_wait
        reply.tokens_per_second = config.batch * config.length / step.seconds
    if progress.result is not None:
        reply.step = progress.result["steps"]
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
