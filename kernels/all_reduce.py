"""Sums over the ranks of one machine, by reading each other's memory; with the addition and norm that follow.

    sum_of_ranks      y = sum over ranks of x
    sum_and_norm      residual += sum over ranks of x;  y = rms_norm(residual)
    sum_into_stream   residual += sum over ranks of x, and what the next norm needs of it (see skinny_matmul.py)
    gather_of_ranks   y = the ranks' x, one after the other

Legend: T rows, D hidden size, n ranks, S bytes of x. x, residual, y  # [T, D].
Bound by latency up to about 100 KB, then by the links: (n - 1) S bytes come in where every rank sums everything (one
shot), 2 (n - 1) / n S where each sums a part and hands it round (two shots).

Terms are added in fp32 in the order of the ranks, and rounded once: every rank gets the same bits, and a row's do not
depend on its neighbours. The rounded sum is added to the residual as in rms_norm.py.

How ranks meet. Program p of a launch talks to program p of the same launch on the other ranks, and to no other: this
is channel p. A channel has a region of each rank's memory of its own, a counter of its meetings (its epoch), and a
signal from each rank. To meet, a program adds one to its signal on every rank and waits until its own signals have all
reached the epoch. Writes before the meeting are seen after it: a barrier of the program's threads, then an addition
with release semantics at system scope by one of them; on the other side a read with acquire semantics, then a barrier.
Counters are in device memory and go on from launch to launch, so that a captured graph can be replayed. They wrap.

One shot: write x to one's region, meet, read all regions. Regions are double, and the epoch's parity chooses: a program
that passed meeting e + 1 knows that all others have ended the launch of meeting e, whose regions it will overwrite.
Two shots: write x, meet, sum a part and write it to every rank's result region, meet, read that. Nobody reads the first
region after the second meeting; results are written after a first meeting only, when the last ones have been read.

All ranks must make the same launches in the same order, and each must find its programs placed in the order of their
numbers. A rank that is missing lets the others wait forever: it is for the host to notice.

Ran: the protocol, in several processes through the interpreter over shared memory of a CPU; and on two H200s, where
bench/all_reduce.py found every sum right. One shot took 0.36 to 0.5 of NCCL's time up to 1 MB there
(bench/results/all_reduce.jsonl). Not run on more GPUs than two.

Source: the scheme is that of NVIDIA's TensorRT-LLM and of vLLM's and SGLang's custom all-reduce; PTX ISA, "Memory
Consistency Model" (causality order through barriers).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import check, check_same
from minisgl.kernels.rms_norm import rms_norm_reference
from minisgl.kernels.skinny_matmul import Stream, stream_reference

CHANNELS = 128  # programs at once: one for each multiprocessor of the smallest GPU that has NVLink
REGION_BYTES = 1 << 16  # what a channel moves at most: 8 MB in all; above, NCCL reaches the links' rate
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FAR_AHEAD = 1 << 30  # of any epoch
FLAT_BLOCK, FLAT_WARPS = 2048, 8  # elements at a time: 16 bytes of bf16 a thread
STREAM_BLOCK, STREAM_WARPS = 1024, 4
# Largest one shot by ranks: from there on the bytes that two shots save take longer than a second meeting (about 2 us).
ONE_SHOT_BYTES = {2: CHANNELS * REGION_BYTES, 3: 2 << 20, 4: 1 << 20}
ONE_SHOT_BYTES_OF_MORE_RANKS = 1 << 18


def signal_bytes(num_ranks: int) -> int:
    """At the start of each rank's memory; zeros at first."""
    return 4 * CHANNELS * num_ranks


class PeerMemory:
    """Memory of n ranks that all of them can reach: signals, then two regions and a result region a channel.

    buffers: one of each rank  # [PeerMemory.num_bytes(n)] uint8, the signals zeros. All must have come so far before
    the first launch.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], rank: int, owner: object = None) -> None:
        self.rank, self.num_ranks = rank, len(buffers)
        self.owner = owner  # of the buffers' memory: kept alive
        start = signal_bytes(self.num_ranks)
        self.signals = tuple(buffer[:start].view(torch.int32) for buffer in buffers)  # [CHANNELS, n] each
        dtypes = (*DTYPES, torch.int32)
        self.regions = {dtype: tuple(buffer[start:].view(dtype) for buffer in buffers) for dtype in dtypes}
        self.epochs = torch.zeros(CHANNELS, dtype=torch.int32, device=buffers[rank].device)
        self.one_shot_bytes = ONE_SHOT_BYTES.get(self.num_ranks, ONE_SHOT_BYTES_OF_MORE_RANKS)

    @staticmethod
    def num_bytes(num_ranks: int) -> int:
        """What each rank gives."""
        return signal_bytes(num_ranks) + 3 * CHANNELS * REGION_BYTES

    @classmethod
    def of_gpus(cls, device: torch.device, group: "torch.distributed.ProcessGroup") -> "PeerMemory":
        """Torch's symmetric memory of a group's GPUs; every rank must call it, and wait for the others before it
        launches. RuntimeError where there is none: no links between GPUs, or ranks on different machines."""
        from torch.distributed import _symmetric_memory as symmetric

        size = cls.num_bytes(group.size())
        own = symmetric.empty(size, dtype=torch.uint8, device=device)
        own.zero_()
        handle = symmetric.rendezvous(own, group.group_name)
        buffers = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
        torch.cuda.synchronize(device)
        return cls(buffers, group.rank(), (own, handle))

    @classmethod
    def alone(cls, device: torch.device, num_ranks: int, rank: int) -> "PeerMemory":
        """One rank's own memory in place of all ranks': launches wait for nobody, and in one shot find what this rank
        has, as often as there are ranks. They are compiled with it, in any order."""
        buffer = torch.zeros(cls.num_bytes(num_ranks), dtype=torch.uint8, device=device)
        memory = cls([buffer] * num_ranks, rank)
        memory.signals[rank].fill_(FAR_AHEAD)
        return memory

    def holds(self, x: torch.Tensor) -> bool:
        """Whether `sum_of_ranks` takes x."""
        return x.is_contiguous() and x.dtype in DTYPES and x.nbytes <= CHANNELS * REGION_BYTES

    def holds_words(self, x: torch.Tensor) -> bool:
        """Whether `gather_of_ranks` takes x."""
        return x.is_contiguous() and x.itemsize % 4 == 0 and x.nbytes <= CHANNELS * REGION_BYTES

    def holds_at_once(self, x: torch.Tensor) -> bool:
        """Whether `sum_and_norm` takes x  # [T, D]: in one shot, whole rows a channel."""
        row_bytes = int(triton.next_power_of_2(x.shape[1])) * x.itemsize
        fits = x.nbytes <= self.one_shot_bytes and triton.cdiv(len(x), CHANNELS) * row_bytes <= REGION_BYTES
        return fits and self.holds(x)


def sum_of_ranks_reference(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`sum_of_ranks` in torch; `parts` are the ranks' x."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].to(wide)
    for part in parts[1:]:  # one after another: torch's sum over a dimension has an order of its own
        total = total + part
    return total.to(parts[0].dtype)


def sum_and_norm_reference(
    parts: Sequence[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`sum_and_norm` in torch. Updates the residual in place."""
    return rms_norm_reference(sum_of_ranks_reference(parts), weight, eps, residual)


def sum_into_stream_reference(
    parts: Sequence[torch.Tensor], residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float
) -> Stream:
    """`sum_into_stream` in torch. Updates the residual in place."""
    x = sum_of_ranks_reference(parts)
    return stream_reference(x if residual is None else residual.add_(x), norm_weight, eps)


@triton.jit
def _meet(signals, own_signals_ptr, channel, rank, epoch, NUM_RANKS: tl.constexpr):
    """Wait for this channel's programs on all ranks; what they wrote before is seen after."""
    tl.debug_barrier()  # the writes of all threads come before the release, which one thread makes
    for peer in tl.static_range(NUM_RANKS):
        tl.atomic_add(signals[peer] + channel * NUM_RANKS + rank, 1, sem="release", scope="sys")
    for peer in tl.static_range(NUM_RANKS):
        signal_ptr = own_signals_ptr + channel * NUM_RANKS + peer
        # A difference, since counters wrap; one that is ahead has left this meeting already.
        while tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys") - epoch < 0:
            pass
    tl.debug_barrier()  # the reads of all threads come after the acquire


@triton.jit
def _load_sum(regions, offsets, mask, NUM_RANKS: tl.constexpr):
    """The sum over ranks of what their regions hold at offsets, in the regions' dtype."""
    total = tl.zeros(offsets.shape, tl.float32)
    for peer in tl.static_range(NUM_RANKS):
        total += tl.load(regions[peer] + offsets, mask=mask, other=0.0).to(tl.float32)
    return total.to(regions[0].dtype.element_ty)


# The size is specialised: as a multiple of 16 it keeps masked loads 16 bytes wide.
@triton.jit(do_not_specialize=["blocks_each", "rank"])
def _flat_kernel(
    x_ptr,
    regions,
    own_region_ptr,
    signals,
    own_signals_ptr,
    epochs_ptr,
    y_ptr,
    size,
    blocks_each,
    rank,
    NUM_RANKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REGION: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHERS: tl.constexpr,
    TWO_SHOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = sum over ranks of x, or with GATHERS all of them; blocks_each blocks a program."""
    channel = tl.program_id(0)
    start = channel * blocks_each * BLOCK
    cols = tl.arange(0, BLOCK)
    wait_for_previous_kernel(PDL)
    epoch = tl.load(epochs_ptr + channel) + 1
    region = ((epoch & 1) * CHANNELS + channel) * REGION
    for block in range(blocks_each):
        mask = start + block * BLOCK + cols < size
        x = tl.load(x_ptr + start + block * BLOCK + cols, mask=mask, other=0.0)
        tl.store(own_region_ptr + region + block * BLOCK + cols, x, mask=mask)
    _meet(signals, own_signals_ptr, channel, rank, epoch, NUM_RANKS)
    if TWO_SHOTS:
        results = (2 * CHANNELS + channel) * REGION
        share = (blocks_each + NUM_RANKS - 1) // NUM_RANKS
        for block in range(rank * share, tl.minimum((rank + 1) * share, blocks_each)):
            mask = start + block * BLOCK + cols < size
            total = _load_sum(regions, region + block * BLOCK + cols, mask, NUM_RANKS)
            for peer in tl.static_range(NUM_RANKS):
                tl.store(regions[peer] + results + block * BLOCK + cols, total, mask=mask)
        epoch += 1
        _meet(signals, own_signals_ptr, channel, rank, epoch, NUM_RANKS)
        for block in range(blocks_each):
            mask = start + block * BLOCK + cols < size
            total = tl.load(own_region_ptr + results + block * BLOCK + cols, mask=mask, other=0.0)
            tl.store(y_ptr + start + block * BLOCK + cols, total, mask=mask)
    elif GATHERS:
        for block in range(blocks_each):
            mask = start + block * BLOCK + cols < size
            for peer in tl.static_range(NUM_RANKS):
                x = tl.load(regions[peer] + region + block * BLOCK + cols, mask=mask, other=0)
                tl.store(y_ptr + peer * size + start + block * BLOCK + cols, x, mask=mask)
    else:
        for block in range(blocks_each):
            mask = start + block * BLOCK + cols < size
            total = _load_sum(regions, region + block * BLOCK + cols, mask, NUM_RANKS)
            tl.store(y_ptr + start + block * BLOCK + cols, total, mask=mask)
    tl.store(epochs_ptr + channel, epoch)


@triton.jit(do_not_specialize=["rows", "rank"])
def _rows_kernel(
    x_ptr,
    regions,
    own_region_ptr,
    signals,
    own_signals_ptr,
    epochs_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    squares_ptr,
    eps,
    rows,
    rank,
    NUM_RANKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REGION: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TO_STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of `sum_and_norm`, one or several a program; or parts of rows of `sum_into_stream`."""
    PARTS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    channel = tl.program_id(0)
    first_row, rows_at_once = channel // PARTS, tl.num_programs(0) // PARTS
    part = channel % PARTS
    lanes = tl.arange(0, BLOCK)
    cols = part * BLOCK + lanes
    mask = cols < HIDDEN
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # a constant: before the wait
    wait_for_previous_kernel(PDL)
    epoch = tl.load(epochs_ptr + channel) + 1
    region = ((epoch & 1) * CHANNELS + channel) * REGION
    place = region
    for row in range(first_row, rows, rows_at_once):
        x = tl.load(x_ptr + row * HIDDEN + cols, mask=mask, other=0.0)  # 8 MB at most: int32 is enough
        tl.store(own_region_ptr + place + lanes, x, mask=mask)
        place += BLOCK
    _meet(signals, own_signals_ptr, channel, rank, epoch, NUM_RANKS)
    place = region
    for row in range(first_row, rows, rows_at_once):
        y = _load_sum(regions, place + lanes, mask, NUM_RANKS)
        place += BLOCK
        out = row * HIDDEN + cols
        if HAS_RESIDUAL:
            y = (tl.load(residual_ptr + out, mask=mask, other=0.0).to(tl.float32) + y.to(tl.float32)).to(y.dtype)
        tl.store(residual_ptr + out, y, mask=mask)
        wide = y.to(tl.float32)
        squares = tl.sum(wide * wide, 0)
        if TO_STREAM:
            tl.store(squares_ptr + row * PARTS + part, squares)
            scaled = wide * weight
        else:
            scaled = weight * (wide * tl.rsqrt(squares / HIDDEN + eps)).to(y.dtype).to(tl.float32)
        tl.store(y_ptr + out, scaled.to(y.dtype), mask=mask)
    tl.store(epochs_ptr + channel, epoch)


def sum_of_ranks(x: torch.Tensor, memory: PeerMemory) -> torch.Tensor:
    """Sum x over the ranks in place, and return it; any shape, contiguous, up to 8 MB.

    Raises ValueError for what `memory` does not hold.
    """
    check(memory.holds(x), f"x: expected contiguous {DTYPES} up to {CHANNELS * REGION_BYTES} bytes")
    _check_device(x, memory)
    _launch_flat(x, memory, x, gathers=False, two_shots=x.nbytes > memory.one_shot_bytes)
    return x


def gather_of_ranks(x: torch.Tensor, memory: PeerMemory) -> torch.Tensor:
    """The ranks' x  # [n, *x.shape]; x contiguous, of 4- or 8-byte items, up to 8 MB.

    Raises ValueError for what `memory` does not hold.
    """
    check(memory.holds_words(x), f"x: expected contiguous 4-byte items up to {CHANNELS * REGION_BYTES} bytes")
    y = x.new_empty(memory.num_ranks, *x.shape)
    _launch_flat(x.view(-1).view(torch.int32), memory, y.view(-1).view(torch.int32), gathers=True, two_shots=False)
    return y


def _launch_flat(x: torch.Tensor, memory: PeerMemory, y: torch.Tensor, *, gathers: bool, two_shots: bool) -> None:
    _check_device(x, memory)
    if x.numel() == 0:
        return
    blocks = triton.cdiv(x.numel(), FLAT_BLOCK)
    blocks_each = triton.cdiv(blocks, CHANNELS)
    _flat_kernel[(triton.cdiv(blocks, blocks_each),)](
        x,
        *_pointers(x, memory),
        y,
        x.numel(),
        blocks_each,
        memory.rank,
        **_constants(x, memory),
        BLOCK=FLAT_BLOCK,
        GATHERS=gathers,
        TWO_SHOTS=two_shots,
        num_warps=FLAT_WARPS,
        num_stages=1,
        **dependent_launch(x.device),
    )


def sum_and_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, memory: PeerMemory
) -> torch.Tensor:
    """Add the sum over ranks of x  # [T, D] to the residual  # [T, D] in place; returns its RMS norm  # [T, D].

    Raises ValueError for a wrong shape, stride, dtype or device, and for an x that `memory` does not hold at once.
    """
    check(x.dim() == 2 and memory.holds_at_once(x), f"x: expected contiguous [T, D] in one shot, got {list(x.shape)}")
    y = torch.empty_like(x)
    block = int(triton.next_power_of_2(x.shape[1]))
    warps = min(max(block // 512, 1), 16)  # 16 elements a thread
    _launch_rows(x, residual, weight, eps, memory, y, None, block, warps)
    return y


def sum_into_stream(
    x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, memory: PeerMemory
) -> Stream:
    """Add the sum over ranks of x  # [M, D] to the residual  # [M, D] in place; without one, the sum is the residual.

    Returns the stream that the norm with norm_weight  # [D] reads. M is small: a part of a row is a program.
    Raises ValueError for a wrong shape, stride, dtype or device, and for more parts than programs.
    """
    check(x.dim() == 2 and memory.holds(x), f"x: expected contiguous [M, D], got {list(x.shape)}")
    block = STREAM_BLOCK if x.shape[1] <= 8 * STREAM_BLOCK else 2 * STREAM_BLOCK
    parts = triton.cdiv(x.shape[1], block)
    check(len(x) * parts <= CHANNELS, f"x: expected up to {CHANNELS // parts} rows, got {len(x)}")
    scaled, squares = torch.empty_like(x), torch.empty(len(x), parts, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x) if residual is None else residual
    _launch_rows(x, out, norm_weight, eps, memory, scaled, squares, block, STREAM_WARPS, residual is not None)
    return Stream(out, scaled, squares, eps)


def _launch_rows(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    memory: PeerMemory,
    y: torch.Tensor,
    squares: torch.Tensor | None,
    block: int,
    warps: int,
    has_residual: bool = True,
) -> None:
    rows, hidden = x.shape
    check(residual.shape == x.shape, f"residual: expected {list(x.shape)}, got {list(residual.shape)}")
    check(residual.is_contiguous(), "residual: must be contiguous")
    check_same("residual", residual, device=x.device, dtype=x.dtype)
    check(weight.shape == (hidden,), f"weight: expected [{hidden}], got {list(weight.shape)}")
    check_same("weight", weight, device=x.device, dtype=x.dtype)
    _check_device(x, memory)
    if x.numel() == 0:
        return
    parts = triton.cdiv(hidden, block)
    _rows_kernel[(min(rows, CHANNELS // parts) * parts,)](
        x,
        *_pointers(x, memory),
        residual,
        weight,
        y,
        squares,
        eps,
        rows,
        memory.rank,
        **_constants(x, memory),
        HIDDEN=hidden,
        BLOCK=block,
        HAS_RESIDUAL=has_residual,
        TO_STREAM=squares is not None,
        num_warps=warps,
        num_stages=1,
        **dependent_launch(x.device),
    )


def _pointers(x: torch.Tensor, memory: PeerMemory) -> tuple[object, ...]:
    regions, signals = memory.regions[x.dtype], memory.signals
    return regions, regions[memory.rank], signals, signals[memory.rank], memory.epochs


def _constants(x: torch.Tensor, memory: PeerMemory) -> dict[str, int]:
    return {"NUM_RANKS": memory.num_ranks, "CHANNELS": CHANNELS, "REGION": REGION_BYTES // x.itemsize}


def _check_device(x: torch.Tensor, memory: PeerMemory) -> None:
    check(x.device == memory.epochs.device, f"x: is on {x.device}, expected {memory.epochs.device}")
