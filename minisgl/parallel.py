"""The ranks that hold one model together, and what they tell each other.

`ParallelGroup` is one rank alone: nothing is exchanged, and torch.distributed is not imported. `ProcessGroup` is one of
several processes, with a GPU each, or on CPUs. State is passed: a group is an argument, never a global.

Every exchange is one that all ranks of the group join in, in the same order. Sums are the same bits on every rank.
Large sums go through NCCL (gloo on CPUs); small ones on GPUs through each other's memory (`kernels.all_reduce`), one
launch with the addition and the norm that follow. What the hosts tell each other goes through gloo and never waits for
a device.

Knows processes and tensors. Does not know what is computed.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch

from minisgl.errors import MinisglError
from minisgl.kernels.all_reduce import (
    PeerMemory,
    gather_of_ranks,
    sum_and_norm,
    sum_into_stream,
    sum_of_ranks,
    sum_of_ranks_reference,
)
from minisgl.kernels.rms_norm import rms_norm
from minisgl.kernels.skinny_matmul import Stream
from minisgl.processes import Meeting
from minisgl.shards import Ranks

log = logging.getLogger("minisgl")

FIRST_MESSAGE_BYTES = 4096  # a message that fits is one broadcast, a longer one two
LENGTH_BYTES = 8


class ParallelGroup:
    """One rank alone. What it would get from the others is what it gives."""

    ranks = Ranks()
    sums_into_streams = True  # `sum_into_stream` works

    @property
    def size(self) -> int:
        return self.ranks.size

    # -- between devices; x may be overwritten --

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x, on every rank."""
        return x

    def sum_and_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add the sum of the ranks' x  # [T, D] to the residual in place; returns the RMS norm of that  # [T, D]."""
        return rms_norm(x, weight, eps, residual)

    def sum_into_stream(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float
    ) -> Stream:
        """Add the sum of the ranks' x  # [M, D] to the residual in place (it is the residual where there is none);
        returns the stream that the norm with norm_weight  # [D] reads."""
        raise NotImplementedError("one rank alone adds within its matmul")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' x  # [...], one after the other  # [size, ...]."""
        return x[None]

    def rehearsal(self) -> AbstractContextManager[None]:
        """Inside, nothing is exchanged between devices, as if every rank had what this one has, but the same kernels
        run: they may be launched in any order, and from several threads."""
        return nullcontext()

    # -- between hosts --

    def min(self, value: int) -> int:
        """The least of the ranks' values."""
        return value

    def send(self, message: bytes) -> bytes:
        """The message of the first rank; the others' own is not looked at."""
        return message

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def close(self) -> None:
        """Leave the group, which cannot be used afterwards."""


class ProcessGroup(ParallelGroup):
    """One of several processes, of which each calls the same methods in the same order.

    torch.distributed's world, which `start_processes` makes, is cut into groups of `size` consecutive processes; all
    of them must make their group at the same time. `peers`: on GPUs, memory that all can reach, where that can be had.
    ordered: add in the order of the ranks whatever the size, so that a row's sum does not depend on the rows beside it;
    NCCL and gloo choose an order by the size. Large sums then take the ranks' x together as memory.
    num_exchanges: that this rank has begun outside of graphs; one that hangs has begun fewer than the others.
    """

    def __init__(self, device: torch.device, size: int, *, ordered: bool = False) -> None:
        import torch.distributed as dist

        self._dist = dist
        rank, world_size = dist.get_rank(), dist.get_world_size()
        assert world_size % size == 0, (world_size, size)
        self._first = rank // size * size
        starts = range(0, world_size, size)
        groups = [dist.new_group(list(range(start, start + size))) for start in starts]  # each process makes them all
        self._group = groups[rank // size]
        self.ranks = Ranks(rank % size, size)
        self.device, self.ordered = device, ordered
        self.num_exchanges = 0
        self._rehearses = False
        self.peers = self._open_peers() if device.type == "cuda" and self.size > 1 else None
        self.sums_into_streams = self.peers is not None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.num_exchanges += 1
        if self.peers is not None and self.peers.holds(x):
            return sum_of_ranks(x, self.peers)
        if self.ordered:
            return sum_of_ranks_reference(self.gather(x).unbind())
        if not self._rehearses:
            self._dist.all_reduce(x, group=self._group)
        return x

    def sum_and_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # Not ordered: the norm of that kernel sums in another order than `rms_norm`, which large x need.
        if self.peers is not None and self.peers.holds_at_once(x) and not self.ordered:
            self.num_exchanges += 1
            return sum_and_norm(x, residual, weight, eps, self.peers)
        return rms_norm(self.sum(x), weight, eps, residual)

    def sum_into_stream(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float
    ) -> Stream:
        assert self.peers is not None
        self.num_exchanges += 1
        return sum_into_stream(x, residual, norm_weight, eps, self.peers)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.num_exchanges += 1
        if self.peers is not None and self.peers.holds_words(x):
            return gather_of_ranks(x, self.peers)
        if self._rehearses:
            return x.expand(self.size, *x.shape).contiguous()
        gathered = x.new_empty(self.size, *x.shape)
        # The same by its new name, and by that of torch before 2.13.
        gather = getattr(self._dist, "all_gather_single", None) or self._dist.all_gather_into_tensor
        gather(gathered.view(-1), x.reshape(-1), group=self._group)
        return gathered

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        before = self.peers, self.num_exchanges
        self._rehearses = True
        if self.peers is not None:
            self.peers = PeerMemory.alone(self.device, self.size, self.ranks.rank)
        try:
            yield
        finally:
            self.peers, self.num_exchanges = before
            self._rehearses = False

    def min(self, value: int) -> int:
        self.num_exchanges += 1
        shared = torch.tensor([value])
        self._dist.all_reduce(shared, self._dist.ReduceOp.MIN, group=self._group)
        return int(shared)

    def send(self, message: bytes) -> bytes:
        is_first = self.ranks.rank == 0
        length = len(message) if is_first else 0
        start = bytearray(FIRST_MESSAGE_BYTES)
        if is_first:
            start[:LENGTH_BYTES] = length.to_bytes(LENGTH_BYTES, "little")
            head = message[: FIRST_MESSAGE_BYTES - LENGTH_BYTES]
            start[LENGTH_BYTES : LENGTH_BYTES + len(head)] = head
        self._broadcast(start)
        if is_first:
            tail = bytearray(message[FIRST_MESSAGE_BYTES - LENGTH_BYTES :])
        else:
            length = int.from_bytes(start[:LENGTH_BYTES], "little")
            tail = bytearray(max(0, length - (FIRST_MESSAGE_BYTES - LENGTH_BYTES)))
        if tail:
            self._broadcast(tail)
        return message if is_first else bytes((start[LENGTH_BYTES:] + tail)[:length])

    def barrier(self) -> None:
        self.min(0)  # and not dist.barrier, which would ask the GPUs

    def close(self) -> None:
        self.peers = None
        self._dist.destroy_process_group(self._group)

    def _broadcast(self, data: bytearray) -> None:
        self.num_exchanges += 1
        self._dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), src=self._first, group=self._group)

    def _open_peers(self) -> PeerMemory | None:
        """Memory of the ranks' GPUs that all of them can reach; None where the ranks are not on one machine, or where
        it cannot be had on one of them: then sums go through NCCL."""
        here = socket.gethostname().encode()
        if not self.min(int(self.send(here) == here)):
            return None
        memory = None
        try:
            memory = PeerMemory.of_gpus(self.device, self._group)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s: no memory shared with the other GPUs (%s): small sums take longer", self.device, reason)
        return memory if self.min(int(memory is not None)) else None


def start_processes(device_type: str, timeout_s: float, meeting: Meeting | None = None) -> tuple[int, int]:
    """Meet the other processes; (rank, number of processes). `timeout_s`: for any exchange.

    At `meeting`, or where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say. MinisglError where they do not come
    together.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        if meeting:
            store, (rank, size, _) = meeting.again(), meeting.place
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise MinisglError(f"the processes did not come together at {address} ({reason}): start them again") from error
    return dist.get_rank(), dist.get_world_size()


def stop_processes() -> None:
    """Leave torch.distributed."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
