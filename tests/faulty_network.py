"""A network with faults between a client and one shard: a process that passes calls on, as the shard's second address.

    python tests/faulty_network.py --listen 127.0.0.2:7400 --shard 127.0.0.1:7400 --rate 0.1 --seed 1

Each of the faults befalls one Push, Commit or BeginRun in ten: the request or its reply is lost, and the client is told
at once that the connection broke or hears nothing until its time is over; the request arrives twice, the second time at
once or long after, when later ones are through; it waits while others overtake it. All other calls pass unharmed. SIGTERM
ends it; its last line says how often each was done.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc

from engrid.rpc.channel import open_channel, server_options

TROUBLED = ("Push", "Commit", "BeginRun")
LONGEST_DELAY = 0.03
LONGEST_ECHO = 0.3
CALL_SECONDS = 20.0


class FaultyNetwork(grpc.GenericRpcHandler):
    def __init__(self, shard, rate, seed):
        self._channel = open_channel(shard)
        self._rate, self._chance = rate, random.Random(seed)
        self._lock = threading.Lock()
        self.done = Counter()

    def service(self, details):
        path = details.method
        if path.endswith("/Lookup"):
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, _: self._channel.stream_stream(path)(requests)
            )
        if path.endswith("/Export"):
            return grpc.unary_stream_rpc_method_handler(lambda request, _: self._channel.unary_stream(path)(request))
        troubled = path.rpartition("/")[2] in TROUBLED
        call = self._channel.unary_unary(path)
        pass_on = self._with_faults if troubled else _pass_on
        return grpc.unary_unary_rpc_method_handler(lambda request, context: pass_on(call, request, context))

    def _happens(self, what, rate=1.0):
        with self._lock:
            happens = self._chance.random() < rate * self._rate
            self.done[what] += happens
        return happens

    def _up_to(self, seconds):
        with self._lock:
            return self._chance.uniform(0, seconds)

    def _with_faults(self, call, request, context):
        if self._happens("overtaken"):
            time.sleep(self._up_to(LONGEST_DELAY))
        if self._happens("request lost", 0.5):
            self._lose(context)
        if self._happens("reply lost", 0.5):
            _quietly(call, request)
            self._lose(context)
        try:
            return _pass_on(call, request, context)
        finally:  # the reply is the first one's: whoever hears of the second has not sent it
            if self._happens("twice", 0.5):
                _quietly(call, request)
            if self._happens("again later", 0.5):
                threading.Timer(self._up_to(LONGEST_ECHO), _quietly, (call, request)).start()

    def _lose(self, context):
        if self._up_to(1) < 0.5:
            over = threading.Event()
            if context.add_callback(over.set):
                over.wait(CALL_SECONDS)
        context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")


def _pass_on(call, request, context):
    try:
        return call(request, timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        context.set_trailing_metadata(error.trailing_metadata() or ())
        context.abort(error.code(), error.details())


def _quietly(call, request):
    try:
        call(request, timeout=CALL_SECONDS)
    except grpc.RpcError:
        """Nobody waits for this answer."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--shard", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    network = FaultyNetwork(options.shard, options.rate, options.seed)
    server = grpc.server(ThreadPoolExecutor(64), handlers=[network], options=server_options(30))
    server.add_insecure_port(options.listen)
    server.start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print("passes on", flush=True)
    stop.wait()
    print(json.dumps(network.done), flush=True)
    server.stop(0).wait()
    sys.exit(0)


if __name__ == "__main__":
    main()
