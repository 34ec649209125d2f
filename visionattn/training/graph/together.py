"""Several runs at once on one device: the steps of these nets are too small to fill a GPU.

Processes that share a GPU take turns on it. Runs of one process, each on a thread and a CUDA stream of its own,
overlap.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from ..config import UserError
from .engine import GraphTrainer


def train_together(
    trainers: list[GraphTrainer], max_seconds: float = 0.0, log: Callable[[int, str], None] | None = None
) -> list[bool]:
    """Fits every trainer at the same time; each computes what it would alone. Whether each one's recipe has ended.

    Args:
        trainers: on one device; several of them without dropout (its random numbers come from one generator).
        max_seconds: see :meth:`GraphTrainer.fit`; from here on, with the capture of the steps.
        log: takes the number of a trainer and a line of its.

    Raises:
        UserError: for several nets with dropout.
        Whatever a fit raised, after the others have ended; KeyboardInterrupt after the epoch that each is in.
    """
    if len(trainers) == 1:
        return [trainers[0].fit(max_seconds, lambda line: log and log(0, line))]
    for trainer in trainers:
        if any(isinstance(m, torch.nn.Dropout) and m.p for m in trainer.net.modules()) or any(
            layer.dropout for layer in trainer.net.layers
        ):
            raise UserError("runs at once have to be without dropout: their random numbers would mix.")
    begin = time.perf_counter()
    streams = [torch.cuda.Stream() if trainer.device.type == "cuda" else None for trainer in trainers]
    for trainer, stream in zip(trainers, streams, strict=True):
        with _on(stream):
            trainer.prepare()
    if any(streams):
        torch.cuda.synchronize()
    left = max(1.0, max_seconds - (time.perf_counter() - begin)) if max_seconds else 0.0
    stop = threading.Event()

    def fit(i: int) -> bool:
        with _on(streams[i]):
            return trainers[i].fit(left, lambda line: log and log(i, line), stop)

    with ThreadPoolExecutor(len(trainers)) as pool:
        runs = [pool.submit(fit, i) for i in range(len(trainers))]
        try:
            wait(runs)  # not a thread's join: interrupted, that counts a thread as ended which is not
        except BaseException:
            stop.set()
            wait(runs)
            raise
    if any(streams):
        torch.cuda.synchronize()
    return [run.result() for run in runs]


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()
