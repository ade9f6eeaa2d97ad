"""The counters of the queue: zero before a launch, left zero by it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from . import graphs

_Key = tuple[torch.device, int]
_counters: dict[_Key, Tensor] = {}


def zeroed_counters(count: int, device: torch.device) -> tuple[Tensor, _Key | None]:
    """At least `count` int32 zeros, for launches on the current stream, which leave them zero, and whose they are.

    Nobody else has them until they are given back, after the launches: if an error comes between, what the launches did
    is not known, and the tensor is not used again. There is one for each stream, because launches on a stream follow
    one another. A graph that is being captured gets counters of its own, zeroed in each replay, because it may be
    replayed on any stream; so does each launch on a stream that is not torch's: it may be destroyed, and its handle
    given to another one while it is still at work.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    if graphs.is_capturing(device) or (stream is not None and _is_external(stream)):
        return torch.zeros(count, dtype=torch.int32, device=device), None
    whose = (device, 0 if stream is None else stream.cuda_stream)
    counters = _counters.pop(whose, None)
    if counters is None or counters.shape[0] < count:
        counters = _new_counters(max(1024, 1 << (count - 1).bit_length()), device)
    return counters, whose


def give_back(counters: Tensor, whose: _Key | None) -> None:
    """What `zeroed_counters` returned, when everything that was to use it is launched."""
    if whose is not None:
        _counters[whose] = counters


def _is_external(stream: torch.cuda.Stream) -> bool:
    """Whether somebody else made it: torch numbers its own, and calls others by their handles."""
    return stream.stream_id == stream.cuda_stream != 0


def _new_counters(count: int, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    made = []

    def make() -> None:
        with torch.cuda.stream(stream):
            made.append(torch.zeros(count, dtype=torch.int32, device=device))

    # In a thread of its own: while torch.compile warms up a CUDA graph, all that this thread allocates comes from
    # the graph's pool, where nothing may stay behind.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
