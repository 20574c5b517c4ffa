"""A server like ours with a service that does nothing: the ceiling of this stack.

As a program, `python -m tests.benchmarks.noop_server THREADS ANSWERS POOL`, it serves the prebuilt answers in
the folder ANSWERS, one file for each method, and prints its address. POOL says whose threads handlers run in:
those that grpcio's documentation has (`stock`) or those of our server (`ours`).
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from proxystash.v1 import cache_service_pb2 as pb
from proxystash.v1 import cache_service_pb2_grpc as pb_grpc
from proxystash.v1 import pool_service_pb2 as pool_pb
from proxystash.v1 import pool_service_pb2_grpc as pool_grpc
from proxystash_server.rpc.calls import CallPool
from proxystash_server.rpc.workers import WorkerPool

ANSWERS: Final[dict[str, type[Message]]] = {
    "Get": pb.GetResponse,
    "BatchGet": pb.BatchGetResponse,
    "Put": pb.PutResponse,
    "BatchPut": pb.BatchPutResponse,
    "Acquire": pool_pb.AcquireResponse,
    "Release": pool_pb.ReleaseResponse,
}


class NoopService(pb_grpc.CacheServiceServicer, pool_grpc.PoolServiceServicer):
    """Answers each method of both services with one message, made once."""

    def __init__(self, answers: Path) -> None:
        for method, kind in ANSWERS.items():
            path = answers / method
            if path.exists():
                setattr(self, method, _answering(kind.FromString(path.read_bytes())))


def _answering(answer: Message) -> object:
    def handle(request: Message, context: grpc.ServicerContext) -> Message:
        return answer

    # As our error boundary marks handlers, for which our pool receives the request first.
    handle.takes_one_message = True  # type: ignore[attr-defined]
    return handle


def main(threads: int, answers: Path, pool: str) -> None:
    """Serve until the process is told to stop."""
    workers: Any = ThreadPoolExecutor(threads)
    if pool == "ours":
        workers = CallPool(WorkerPool(threads, "noop"), WorkerPool(1, "urgent"))
    server = grpc.server(
        workers,
        options=[("grpc.so_reuseport", 0)],
    )
    service = NoopService(answers)  # type: ignore[abstract]  # what is not called needs no answer
    pb_grpc.add_CacheServiceServicer_to_server(service, server)
    pool_grpc.add_PoolServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
