"""Several runs at once on one device: the steps of these nets are too small to fill a GPU.

Processes that share a GPU take turns on it. Runs of one process, each on a thread and a CUDA stream of its own,
overlap.
"""

import contextlib
import threading
from collections.abc import Callable

import torch

from ..config import UserError
from .engine import GraphTrainer


def train_together(
    trainers: list[GraphTrainer], max_seconds: float = 0.0, log: Callable[[int, str], None] | None = None
) -> list[bool]:
    """Fits every trainer at the same time; each computes what it would alone. Whether each one's recipe has ended.

    Args:
        trainers: on one device, without dropout (its random numbers come from one generator of the process).
        max_seconds: see :meth:`GraphTrainer.fit`.
        log: takes the number of a trainer and a line of its.

    Raises:
        UserError: for a net with dropout.
        Whatever a fit raised, after the others have ended; KeyboardInterrupt after the epoch that each is in.
    """
    for trainer in trainers:
        if any(isinstance(m, torch.nn.Dropout) and m.p for m in trainer.net.modules()) or any(
            layer.dropout for layer in trainer.net.layers
        ):
            raise UserError("runs at once have to be without dropout: their random numbers would mix.")
    streams = [torch.cuda.Stream() if trainer.device.type == "cuda" else None for trainer in trainers]
    for trainer, stream in zip(trainers, streams, strict=True):
        with _on(stream):
            trainer.prepare()
    if any(streams):
        torch.cuda.synchronize()
    if len(trainers) == 1:
        with _on(streams[0]):
            return [trainers[0].fit(max_seconds, lambda line: log and log(0, line))]
    ended, failed, stop = [False] * len(trainers), [], threading.Event()

    def fit(i: int) -> None:
        try:
            with _on(streams[i]):
                ended[i] = trainers[i].fit(max_seconds, lambda line: log and log(i, line), stop)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=fit, args=(i,)) for i in range(len(trainers))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    finally:
        if any(streams):
            torch.cuda.synchronize()
    if failed:
        raise failed[0]
    return ended


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()
