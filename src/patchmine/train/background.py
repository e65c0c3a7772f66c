"""Writing a state while training goes on: a copy of it in memory, and a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class Snapshot:
    """Copies of tensors on the host that nothing else changes.

    Their memory is kept for the next copies, since getting it anew from the system takes several
    times as long as copying.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The copy under this name, which replaces the one before."""
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._held[name] = held
        return held.copy_(tensor.detach())


class Beside:
    """One piece of work at a time in a thread of its own; what it raises is raised in `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do it while this thread goes on.  Raises what `wait` raises, of the work before."""
        self.wait()
        # A daemon, because a person who asks a third time does not want to wait for it.
        self._thread = threading.Thread(target=self._do, args=(work,), daemon=True, name="saving")
        self._thread.start()

    def wait(self) -> None:
        """Wait for what was begun.  Raises what that raised, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether it has ended and `wait` would raise."""
        return self._error is not None

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001, raised where it is waited for
            self._error = error
