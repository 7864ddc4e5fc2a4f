"""Training loops that take turns: one step of each, then the next of each, so that a busy machine is unfair to none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.profiler import ProfilerActivity, profile


class Turns:
    """A training loop in a thread of its own, which waits for its turn whenever it asks for a batch.

    A turn lasts from one request for a batch to the next, so it holds a whole step, whatever the loop does around it.

    Args:
        name: Of the contender.
        loop: Trains on ``turns.batches(source)`` for ever.
        device: Where it trains.
    """

    def __init__(self, name: str, loop: Callable[[Turns], None], device: str) -> None:
        self.name = name
        self.device = device
        self.seconds: list[float] = []
        self.peak = 0.0
        self._error: BaseException | None = None
        self._go, self._asked = threading.Semaphore(0), threading.Semaphore(0)
        self._measuring, self._profile = False, None
        self._loop = loop
        threading.Thread(target=self._run, name=name, daemon=True).start()  # a daemon: it never ends by itself
        self._await()

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self._loop(self)
            self._error = RuntimeError("its loop has ended")
        except BaseException as error:
            self._error = error
        self._asked.release()

    def _await(self) -> None:
        self._asked.acquire()
        if self._error is not None:
            raise RuntimeError(f"{self.name} failed") from self._error

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """Pass a loader's batches on, one a turn."""
        for item in source:
            self._end_memory()
            self._asked.release()
            self._go.acquire()
            self._begin_memory()
            yield item[0] if isinstance(source, CombinedLoader) else item

    def step(self) -> None:
        """Take one turn and its time: the processor's on the CPU, where others may be at work too, else the clock's."""
        begin = self._now()
        self._go.release()
        self._await()
        self.seconds.append(self._now() - begin)

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def measure_memory(self) -> None:
        """Take one turn and note the most memory that it held beyond what it began with, in MiB."""
        self._measuring = True
        self._go.release()
        self._await()
        self._measuring = False

    def _begin_memory(self) -> None:
        if not self._measuring:
            return
        if self.device == "cpu":
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        else:
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()

    def _end_memory(self) -> None:
        if not self._measuring:
            return
        if self.device != "cpu":
            self.peak = (torch.cuda.max_memory_allocated() - self._held) / 2**20
        elif self._profile is not None:
            self._profile.stop()
            events = self._profile.profiler.kineto_results.events()
            changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
            held = 0
            for _, change in changes:
                held += change
                self.peak = max(self.peak, held / 2**20)
            self._profile = None


class Source:
    """A loader whose batches are handed out by turns."""

    def __init__(self, turns: Turns, loader: Iterable[Any]) -> None:
        self.turns, self.loader = turns, loader

    def __iter__(self) -> Iterator[Any]:
        return self.turns.batches(self.loader)


def interleave(contenders: list[Turns], rounds: int, warm_up: int) -> None:
    """So many steps of each; those of the warm-up do not count. Who begins changes from round to round."""
    for r in range(warm_up + rounds):
        first = r % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender.step()
    for contender in contenders:
        del contender.seconds[:warm_up]
