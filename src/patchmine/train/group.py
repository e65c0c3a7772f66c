"""The processes of a run as a group: started, met, connected, watched, and parted from again."""

from __future__ import annotations

import os
import subprocess
import warnings
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from patchmine.errors import Say, UserError, reason_of
from patchmine.train.launch import Launch, start_others
from patchmine.train.peers import Door, Peers
from patchmine.train.rendezvous import Meeting, wait_seconds

# A collective waits while the first process evaluates or another one makes its list of files; that
# a process ended is known otherwise.
LONGEST = timedelta(hours=6)
_LEAVING_SECONDS = 30.0


class Group:
    """All processes of a run, connected by gloo (CPU) or NCCL (GPU).

    ``hosts``: the machine of each, by rank; ``peers`` knows when one ends.  Raises UserError as
    `Meeting` does.
    """

    def __init__(self, launch: Launch, device: torch.device, say: Say) -> None:
        seconds = wait_seconds(os.environ)
        door = Door() if launch.rank == 0 else None
        meeting = Meeting(launch, seconds, say)
        self._others = start_others(replace(launch, port=meeting.port))
        try:
            everyone = meeting.sign_in(
                {} if door is None else door.facts, lives=self._refuse_early_end
            )
            self.hosts: list[str] = [facts["host"] for facts in everyone]
            self.peers = Peers(launch, everyone, door, seconds)
        except BaseException:
            self._end_others()
            raise
        self._connect(launch, meeting, device)

    def close(self) -> None:
        """Part from the others, and wait for those that this process started."""
        self.peers.close()
        if torch.distributed.is_initialized() and (self.peers.lost() is None or _is_gloo()):
            torch.distributed.destroy_process_group()  # NCCL's may wait for a process that is gone
        for process in self._others:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVING_SECONDS)
        self._end_others()

    def _connect(self, launch: Launch, meeting: Meeting, device: torch.device) -> None:
        # NCCL's watchdog would end the process with a page of C++ when another one is gone, before
        # we can say so.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.distributed.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    store=meeting.store,
                    rank=launch.rank,
                    world_size=launch.world_size,
                    timeout=LONGEST,
                    **options,
                )
        except (RuntimeError, ValueError) as error:
            raise self.peers.ending(
                UserError(
                    f"the processes met, but cannot exchange tensors ({reason_of(error)}): name "
                    "the network interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, as in "
                    "GLOO_SOCKET_IFNAME=eth0"
                )
            ) from error

    def _refuse_early_end(self) -> None:
        for rank, process in enumerate(self._others, start=1):
            if (code := process.poll()) is not None:
                raise UserError(
                    f"the process of rank {rank} ended with code {code} before the run began: "
                    "see what it said above"
                )

    def _end_others(self) -> None:
        for process in self._others:
            if process.poll() is None:
                process.kill()


def _is_gloo() -> bool:
    return str(torch.distributed.get_backend()) == "gloo"
