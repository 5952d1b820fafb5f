"""Sums over the ranks of one machine, by writing to each other's memory; with the addition and norm that follow.

    sum_of_ranks      y = sum over ranks of x
    sum_and_norm      residual += sum over ranks of x;  y = rms_norm(residual)
    sum_into_stream   residual += sum over ranks of x, and what the next norm needs of it (see skinny_matmul.py)
    gather_of_ranks   y = the ranks' x, one after the other

Legend: T rows, D hidden size, n ranks, S bytes of x. x, residual, y  # [T, D].
Bound by latency up to about 100 KB, then by the links: (n - 1) S bytes come in where every rank sums everything (one
shot), 2 (n - 1) / n S where each sums a share and hands it round (two shots).

Terms are added in fp32 in the order of the ranks, and rounded once: every rank gets the same bits, and a row's do not
depend on its neighbours. The rounded sum is added to the residual as in rms_norm.py.

How ranks exchange. A rank writes its x into memory of the others, which spin on their own until no word there is EMPTY:
the data is its own signal, and a small exchange takes one trip over a link. EMPTY is the bits of -0.0 in 16-bit types,
twice, and in fp32, since types share the memory, those of -4.6e-41. As integers only those of smaller negative numbers
are less: EMPTY and these are sent as 0. That changes a term of fp32 by 4.6e-41 at most and of other types by the sign
of a zero. What is gathered may have any bits, and is sent as 32-bit words of 16 bits each, of which none is EMPTY.

Program p of a launch talks to program p of the same launch on the other ranks, and to no other: this is channel p. From
each sender a channel has three regions, used by turns, and in a launch, its use e say, it fills the region of use e - 1
with EMPTY again, for use e + 2. It keeps the turn and the number of words of its last use in device memory, so that a
captured graph can be replayed. A channel that a launch does not need keeps them as they are, on all ranks.

Why no word is lost. The words of use e - 1 have all come and been read when use e empties them: that launch waits for
the end of all earlier ones (see dependent_launch.py). Nor does a word of use e + 2 come before: a rank sends it when
its use e + 1 has ended, so when the words of use e + 1 have come from all ranks (in two shots, perhaps within a share
that another summed); and these were sent after the end of the launch of use e, which flushed what it had written.
A word of 16 or 32 bits arrives whole; nothing is assumed about the order of words.

All ranks must make the same launches in the same order, and each must find its programs placed in the order of their
numbers. A rank that is missing lets the others wait forever: it is for the host to notice.

Ran: in several processes through the interpreter over shared memory of a CPU; on two and on four H200s, where
bench/all_reduce.py found every sum right. 8 KB took 1.9 and 2.4 us there, 512 KB 3.7 and 6.7: a fifth to a third of
NCCL's time (bench/results/all_reduce.jsonl). Not run on more GPUs, nor where not all are linked.

Source: the scheme is that of the one-shot "Lamport" all-reduce in NVIDIA's TensorRT-LLM.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from minisgl.kernels.dependent_launch import dependent_launch, wait_for_previous_kernel
from minisgl.kernels.launch import cdiv, check, check_same, next_power_of_2
from minisgl.kernels.rms_norm import rms_norm_reference
from minisgl.kernels.skinny_matmul import Stream, stream_reference

CHANNELS = 128  # programs at once: one for each multiprocessor of the smallest GPU that has NVLink
MAX_RANKS = 8  # of more, a region would not hold two blocks of fp32
TURN_BYTES = 16 << 20  # of all senders; three are 48 MB of each GPU, and move 8 MB in two shots
EMPTY = tl.constexpr(0x80008000 - (1 << 32))  # an int32
EMPTY_HALF = tl.constexpr(0x8000 - (1 << 16))  # each of its halves
WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}  # as they are sent
MIN_FLAT_BLOCK, MAX_FLAT_BLOCK, FLAT_WARP = 256, 2048, 256  # elements; a warp's: 16 bytes of bf16 a thread
STREAM_BLOCK, STREAM_WARPS = 1024, 4
# Largest one shot by ranks: above, the bytes that two shots save take longer than a second trip.
ONE_SHOT_BYTES = {2: 4 << 20, 3: 1 << 19, 4: 1 << 18}
ONE_SHOT_BYTES_OF_MORE_RANKS = 1 << 18


class PeerMemory:
    """Memory of n ranks that all of them can reach: of each sender three regions a channel.

    buffers: one of each rank  # [PeerMemory.num_bytes(n)] uint8, filled with EMPTY as int32. All must have come so far
    before the first launch. waits: False where all buffers are one, see `alone`.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], rank: int, owner: object = None, *, waits: bool = True) -> None:
        self.rank, self.num_ranks, self.waits = rank, len(buffers), waits
        self.owner = owner  # of the buffers' memory: kept alive
        self.region_bytes = TURN_BYTES // CHANNELS // next_power_of_2(self.num_ranks)
        self.max_one_shot_bytes = CHANNELS * self.region_bytes
        self.max_bytes = self.max_one_shot_bytes * self.num_ranks // 2  # a region has a share of x and one of sums
        senders = [rank] * self.num_ranks if waits else range(self.num_ranks)
        size = 3 * self.max_one_shot_bytes
        outboxes = [buffer[sender * size :][:size] for buffer, sender in zip(buffers, senders, strict=True)]
        words = set(WORDS.values())
        self.outboxes = {word: tuple(outbox.view(word) for outbox in outboxes) for word in words}  # own: not used
        self.inbox = {word: buffers[rank].view(word) for word in words}  # [n, 3, CHANNELS, words of a region]
        self.state = torch.zeros(CHANNELS, 2, dtype=torch.int32, device=buffers[rank].device)  # turn, 32-bit words
        self.one_shot_bytes = ONE_SHOT_BYTES.get(self.num_ranks, ONE_SHOT_BYTES_OF_MORE_RANKS)

    @staticmethod
    def num_bytes(num_ranks: int) -> int:
        """What each rank gives: 48 MB, or less where n is no power of two."""
        return 3 * TURN_BYTES // next_power_of_2(num_ranks) * num_ranks

    @classmethod
    def of_gpus(cls, device: torch.device, group: "torch.distributed.ProcessGroup") -> "PeerMemory":
        """Torch's symmetric memory of a group's GPUs; every rank must call it, and wait for the others before it
        launches. RuntimeError where there is none: no links between GPUs, or ranks on different machines."""
        from torch.distributed import _symmetric_memory as symmetric

        if group.size() > MAX_RANKS:
            raise RuntimeError(f"up to {MAX_RANKS} GPUs write to each other's")
        size = cls.num_bytes(group.size())
        own = symmetric.empty(size, dtype=torch.uint8, device=device)
        own.view(torch.int32).fill_(EMPTY.value)
        handle = symmetric.rendezvous(own, group.group_name)
        buffers = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
        torch.cuda.synchronize(device)
        return cls(buffers, group.rank(), (own, handle))

    @classmethod
    def alone(cls, device: torch.device, num_ranks: int, rank: int) -> "PeerMemory":
        """One rank's own memory in place of all ranks': launches wait for nobody, and in one shot find what this rank
        has, as often as there are ranks. They are compiled with it, in any order."""
        buffer = torch.full((cls.num_bytes(num_ranks) // 4,), EMPTY.value, dtype=torch.int32, device=device)
        return cls([buffer.view(torch.uint8)] * num_ranks, rank, waits=False)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether `sum_of_ranks` takes x."""
        return x.is_contiguous() and x.dtype in WORDS and x.nbytes <= self.max_bytes

    def holds_words(self, x: torch.Tensor) -> bool:
        """Whether `gather_of_ranks` takes x."""
        return x.is_contiguous() and x.itemsize % 2 == 0 and 2 * x.nbytes <= self.max_one_shot_bytes

    def holds_at_once(self, x: torch.Tensor) -> bool:
        """Whether `sum_and_norm` takes x  # [T, D]: in one shot, whole rows a channel."""
        row_bytes = _row_block(x.shape[1]) * x.itemsize
        fits = x.nbytes <= self.one_shot_bytes and cdiv(len(x), CHANNELS) * row_bytes <= self.region_bytes
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
def _pack(x, word: tl.constexpr):
    """x as words of a type; EMPTY is less than all of them."""
    if x.dtype == tl.int16:  # of what is gathered; an int32 each
        words = x.to(word)
    else:
        words = x.to(word, bitcast=True)
        words = tl.where(words <= (EMPTY if word == tl.int32 else EMPTY_HALF), 0, words)
    return words


@triton.jit
def _unpack(words, dtype: tl.constexpr):
    """x of a type, of which `_pack` made words."""
    return words.to(dtype) if dtype == tl.int16 else words.to(dtype, bitcast=True)


@triton.jit
def _send(outboxes, place, words, cols, end, rank, NUM_RANKS: tl.constexpr):
    """Write words, of cols below end, to place on all other ranks."""
    for peer in tl.static_range(NUM_RANKS):
        tl.store(outboxes[peer] + place, words, mask=cols < tl.where(peer == rank, 0, end))


@triton.jit
def _receive(pointers, mask, waits):
    """The words at pointers, when all have come."""
    words = tl.load(pointers, mask=mask, other=0, volatile=True)
    while (tl.min(words, 0) <= (EMPTY if words.dtype == tl.int32 else EMPTY_HALF)) & (waits != 0):
        words = tl.load(pointers, mask=mask, other=0, volatile=True)
    return words


@triton.jit
def _receive_sum(inbox_ptr, place, x, cols, end, rank, waits, NUM_RANKS: tl.constexpr, SENDER: tl.constexpr):
    """The sum of this rank's x and the others', which come to place; in x's dtype."""
    word: tl.constexpr = inbox_ptr.dtype.element_ty
    own = _unpack(_pack(x, word), x.dtype)  # as the others have it
    total = tl.zeros(place.shape, tl.float32)
    missing = waits >= 0
    while missing:  # for all at once: one trip to the memory, not one for each
        total = tl.zeros(place.shape, tl.float32)
        least = tl.zeros(place.shape, word)
        for peer in tl.static_range(NUM_RANKS):
            mask = cols < tl.where(peer == rank, 0, end)
            words = tl.load(inbox_ptr + peer * SENDER + place, mask=mask, other=0, volatile=True)
            least = tl.minimum(least, words)
            total += tl.where(mask, _unpack(words, x.dtype), own).to(tl.float32)
        missing = (tl.min(least, 0) <= (EMPTY if word == tl.int32 else EMPTY_HALF)) & (waits != 0)
    return total.to(x.dtype)


@triton.jit
def _clear(inbox_ptr, place, size, rank, NUM_RANKS: tl.constexpr, SENDER: tl.constexpr, BLOCK: tl.constexpr):
    """Make `size` int32 of each other sender EMPTY again, or some more: whole blocks, as a region is. place, SENDER and
    BLOCK count words of inbox_ptr."""
    WORDS: tl.constexpr = 32 // inbox_ptr.dtype.element_ty.primitive_bitwidth  # in an int32
    empty = tl.full((BLOCK // WORDS,), EMPTY, tl.int32)
    pointers = inbox_ptr.to(tl.pointer_type(tl.int32)) + place // WORDS + tl.arange(0, BLOCK // WORDS)
    for start in range(0, size, BLOCK // WORDS):
        for peer in tl.static_range(NUM_RANKS):
            if peer != rank:
                tl.store(pointers + peer * (SENDER // WORDS) + start, empty)


# The size is specialised: as a multiple of 16 it keeps masked loads 16 bytes wide. And blocks_each: without a loop x is
# asked for before the state has come.
@triton.jit(do_not_specialize=["rank", "waits"])
def _flat_kernel(
    x_ptr,
    outboxes,
    inbox_ptr,
    state_ptr,
    y_ptr,
    size,
    blocks_each,
    rank,
    waits,
    NUM_RANKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REGION: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHERS: tl.constexpr,
    TWO_SHOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = sum over ranks of x, or with GATHERS all of them; blocks_each blocks a program, n shares with TWO_SHOTS."""
    SENDER: tl.constexpr = 3 * CHANNELS * REGION
    word: tl.constexpr = inbox_ptr.dtype.element_ty
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    channel = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    start = channel * blocks_each * BLOCK
    wait_for_previous_kernel(PDL)
    last_turn, last_size = tl.load(state_ptr + 2 * channel), tl.load(state_ptr + 2 * channel + 1)
    turn = (last_turn + 1) % 3
    region = (turn * CHANNELS + channel) * REGION
    last_region = (last_turn * CHANNELS + channel) * REGION
    words_each = blocks_each * BLOCK
    if TWO_SHOTS:
        share = blocks_each // NUM_RANKS
        words_each = 2 * share * BLOCK  # of x, then of sums
        for block in range(share):
            place = region + block * BLOCK + lanes
            for peer in tl.static_range(NUM_RANKS):
                cols = start + (peer * share + block) * BLOCK + lanes
                mask = cols < tl.where(peer == rank, 0, size)
                x = tl.load(x_ptr + cols, mask=mask, other=0.0)
                tl.store(outboxes[peer] + place, _pack(x, word), mask=mask)
        _clear(inbox_ptr, last_region, last_size, rank, NUM_RANKS, SENDER, BLOCK)
        for block in range(share):
            cols = start + (rank * share + block) * BLOCK + lanes
            mask = cols < size
            x = tl.load(x_ptr + cols, mask=mask, other=0.0)
            place = region + block * BLOCK + lanes
            total = _receive_sum(inbox_ptr, place, x, cols, size, rank, waits, NUM_RANKS, SENDER)
            words = _pack(total, word)
            _send(outboxes, place + share * BLOCK, words, cols, size, rank, NUM_RANKS)
            tl.store(y_ptr + cols, _unpack(words, dtype), mask=mask)  # as the others have it
        for block in range(share):
            place = region + (share + block) * BLOCK + lanes
            for peer in tl.static_range(NUM_RANKS):
                cols = start + (peer * share + block) * BLOCK + lanes
                mask = cols < tl.where(peer == rank, 0, size)
                words = _receive(inbox_ptr + peer * SENDER + place, mask, waits)
                tl.store(y_ptr + cols, _unpack(words, dtype), mask=mask)
    else:
        for block in range(blocks_each):
            cols = start + block * BLOCK + lanes
            x = tl.load(x_ptr + cols, mask=cols < size, other=0)
            _send(outboxes, region + block * BLOCK + lanes, _pack(x, word), cols, size, rank, NUM_RANKS)
        _clear(inbox_ptr, last_region, last_size, rank, NUM_RANKS, SENDER, BLOCK)
        for block in range(blocks_each):
            cols = start + block * BLOCK + lanes
            mask = cols < size
            x = tl.load(x_ptr + cols, mask=mask, other=0)
            place = region + block * BLOCK + lanes
            if GATHERS:
                for peer in tl.static_range(NUM_RANKS):
                    is_other = cols < tl.where(peer == rank, 0, size)
                    words = _receive(inbox_ptr + peer * SENDER + place, is_other, waits)
                    tl.store(y_ptr + peer * size + cols, tl.where(is_other, _unpack(words, dtype), x), mask=mask)
            else:
                total = _receive_sum(inbox_ptr, place, x, cols, size, rank, waits, NUM_RANKS, SENDER)
                tl.store(y_ptr + cols, total, mask=mask)
    tl.store(state_ptr + 2 * channel, turn)
    tl.store(state_ptr + 2 * channel + 1, words_each * word.primitive_bitwidth // 32)


@triton.jit(do_not_specialize=["rows", "rank", "waits"])
def _rows_kernel(
    x_ptr,
    outboxes,
    inbox_ptr,
    state_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    squares_ptr,
    eps,
    rows,
    rank,
    waits,
    NUM_RANKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    REGION: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_ROW: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TO_STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of `sum_and_norm`, one or several a program; or parts of rows of `sum_into_stream`."""
    PARTS: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    SENDER: tl.constexpr = 3 * CHANNELS * REGION
    word: tl.constexpr = inbox_ptr.dtype.element_ty
    channel = tl.program_id(0)
    first_row, rows_at_once = channel // PARTS, tl.num_programs(0) // PARTS
    part = channel % PARTS
    lanes = tl.arange(0, BLOCK)
    cols = part * BLOCK + lanes
    mask = cols < HIDDEN
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # a constant: before the wait
    wait_for_previous_kernel(PDL)
    last_turn, last_size = tl.load(state_ptr + 2 * channel), tl.load(state_ptr + 2 * channel + 1)
    turn = (last_turn + 1) % 3
    region = (turn * CHANNELS + channel) * REGION
    rows_each = 1 if ONE_ROW else tl.cdiv(rows - first_row, rows_at_once)  # 1: no loop, as in `_flat_kernel`
    for i in range(rows_each):
        out = (first_row + i * rows_at_once) * HIDDEN + cols  # 8 MB at most: int32 is enough
        x = tl.load(x_ptr + out, mask=mask, other=0.0)
        _send(outboxes, region + i * BLOCK + lanes, _pack(x, word), cols, HIDDEN, rank, NUM_RANKS)
    _clear(inbox_ptr, (last_turn * CHANNELS + channel) * REGION, last_size, rank, NUM_RANKS, SENDER, BLOCK)
    for i in range(rows_each):
        row = first_row + i * rows_at_once
        out = row * HIDDEN + cols
        x = tl.load(x_ptr + out, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + out, mask=mask, other=0.0).to(tl.float32)  # while words come
        place = region + i * BLOCK + lanes
        y = _receive_sum(inbox_ptr, place, x, cols, HIDDEN, rank, waits, NUM_RANKS, SENDER)
        if HAS_RESIDUAL:
            y = (residual + y.to(tl.float32)).to(y.dtype)
        tl.store(residual_ptr + out, y, mask=mask)
        wide = y.to(tl.float32)
        squares = tl.sum(wide * wide, 0)
        if TO_STREAM:
            tl.store(squares_ptr + row * PARTS + part, squares)
            scaled = wide * weight
        else:
            scaled = weight * (wide * tl.rsqrt(squares / HIDDEN + eps)).to(y.dtype).to(tl.float32)
        tl.store(y_ptr + out, scaled.to(y.dtype), mask=mask)
    tl.store(state_ptr + 2 * channel, turn)
    tl.store(state_ptr + 2 * channel + 1, rows_each * BLOCK * word.primitive_bitwidth // 32)


def sum_of_ranks(x: torch.Tensor, memory: PeerMemory) -> torch.Tensor:
    """Sum x over the ranks in place, and return it; any shape, contiguous, up to `memory.max_bytes`: 8 MB.

    Raises ValueError for what `memory` does not hold.
    """
    check(memory.holds(x), f"x: expected contiguous {list(WORDS)} up to {memory.max_bytes} bytes")
    two_shots = x.nbytes > memory.one_shot_bytes
    _launch_flat(x, memory, x, WORDS[x.dtype], gathers=False, two_shots=two_shots)
    return x


def gather_of_ranks(x: torch.Tensor, memory: PeerMemory) -> torch.Tensor:
    """The ranks' x  # [n, *x.shape]; x contiguous, of 2-, 4- or 8-byte items, up to half of what fits in one shot.

    Raises ValueError for what `memory` does not hold.
    """
    limit = memory.max_one_shot_bytes // 2
    check(memory.holds_words(x), f"x: expected contiguous items of 2, 4 or 8 bytes, up to {limit} bytes")
    y = x.new_empty(memory.num_ranks, *x.shape)
    halves, all_halves = x.view(-1).view(torch.int16), y.view(-1).view(torch.int16)
    _launch_flat(halves, memory, all_halves, torch.int32, gathers=True, two_shots=False)
    return y


def _launch_flat(
    x: torch.Tensor, memory: PeerMemory, y: torch.Tensor, word: torch.dtype, *, gathers: bool, two_shots: bool
) -> None:
    _check_device(x, memory)
    if x.numel() == 0:
        return
    shares = memory.num_ranks if two_shots else 1
    block = next_power_of_2(cdiv(x.numel(), CHANNELS * shares))
    block = min(max(block, MIN_FLAT_BLOCK), MAX_FLAT_BLOCK)
    blocks_each = cdiv(x.numel(), CHANNELS * shares * block) * shares
    _flat_kernel[(cdiv(x.numel(), blocks_each * block),)](
        x,
        *_pointers(word, memory),
        y,
        x.numel(),
        blocks_each,
        memory.rank,
        int(memory.waits),
        **_constants(word, memory),
        BLOCK=block,
        GATHERS=gathers,
        TWO_SHOTS=two_shots,
        num_warps=block // FLAT_WARP,
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
    block = _row_block(x.shape[1])
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
    parts = cdiv(x.shape[1], block)
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
    parts = cdiv(hidden, block)
    _rows_kernel[(min(rows, CHANNELS // parts) * parts,)](
        x,
        *_pointers(WORDS[x.dtype], memory),
        residual,
        weight,
        y,
        squares,
        eps,
        rows,
        memory.rank,
        int(memory.waits),
        **_constants(WORDS[x.dtype], memory),
        HIDDEN=hidden,
        BLOCK=block,
        ONE_ROW=rows <= CHANNELS // parts,
        HAS_RESIDUAL=has_residual,
        TO_STREAM=squares is not None,
        num_warps=warps,
        num_stages=1,
        **dependent_launch(x.device),
    )


def _row_block(hidden: int) -> int:
    """Elements of a row in a region: a power of two, and 16 bytes at least."""
    return max(next_power_of_2(hidden), 8)


def _pointers(word: torch.dtype, memory: PeerMemory) -> tuple[object, ...]:
    return memory.outboxes[word], memory.inbox[word], memory.state


def _constants(word: torch.dtype, memory: PeerMemory) -> dict[str, int]:
    return {"NUM_RANKS": memory.num_ranks, "CHANNELS": CHANNELS, "REGION": memory.region_bytes // word.itemsize}


def _check_device(x: torch.Tensor, memory: PeerMemory) -> None:
    check(x.device == memory.state.device, f"x: is on {x.device}, expected {memory.state.device}")
