"""A copy of a rank's state in the host's memory, made while the next step's passes run.

    snapshot = Snapshot(tensors, buffers)     # on the training thread; copies nothing
    snapshot.copy()                           # on another
    snapshot.wait()                           # on the training thread, before anything is changed

Forward and backward passes change neither weights nor moments: training waits only if the copy is not done when the
optimizer is about to.
"""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor


class Snapshot:
    """Of `tensors`, into `buffers`, which keeps its tensors from one snapshot to the next: first touched, memory is
    several times slower."""

    def __init__(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor]):
        self._tensors, self._buffers = tensors, buffers
        self._copied, self._error = threading.Event(), None
        self._stream = None
        # The masters may be on the host while the experts' bias is on the GPU.
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        if device is not None:
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self) -> dict[str, Tensor]:
        """→ the copies, keyed alike. Raises what copying raises; the training thread is let go all the same."""
        try:
            for name in self._buffers.keys() - self._tensors.keys():
                del self._buffers[name]
            with torch.cuda.stream(self._stream):
                for name, tensor in self._tensors.items():
                    own = self._buffers.get(name)
                    if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
                        pinned = tensor.device.type == "cuda"
                        own = self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
                    own.copy_(tensor, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
        finally:
            self._tensors = {}
            self._copied.set()
        return self._buffers

    def wait(self) -> float:
        """Until the copy is made → the seconds that took."""
        started_at = time.perf_counter()
        self._copied.wait()
        return time.perf_counter() - started_at
