"""One device: model, KV pages and row table; `forward(step)` launches a step, whose results `StepResults` brings.

Where ranks hold the model together, each has an engine, and all of them launch the same steps in the same order.

    Step -> RowTable.load -> Batch -> Decoder.forward -> logits -> (edits, masks) -> sample -> ids -> row table

Knows tensors and memory. Does not know scheduling, text or files.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from minisgl.batch import Batch, Kept, KVCache
from minisgl.cascade import CascadePlanner, packed_length
from minisgl.config import EngineConfig
from minisgl.errors import MinisglError
from minisgl.forward import EVERYTHING, NOTHING_MORE, Forward, Logprobs, Wanted
from minisgl.graphs import BATCH_SIZES, LOSING_ON_HOPPER, Key, StepGraphs, padded_size
from minisgl.kernels.attention_cascade import CascadeTiles, min_members, tile_members
from minisgl.kernels.attention_decode import FEW_KEYS, kinds_of_batches, many_sequences
from minisgl.kernels.compile_ahead import compile_ahead
from minisgl.kernels.launch import hopper_module, use_device, use_triton
from minisgl.kernels.logits import edit_logits
from minisgl.kernels.rms_norm import early_tokens
from minisgl.layers.ops import FASTEST, INVARIANT
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.parallel import ParallelGroup
from minisgl.request import Request, SamplingParams
from minisgl.rows import RowTable
from minisgl.sampler import Sampler
from minisgl.scheduler import Chunk, Step
from minisgl.upload import Ints, upload
from minisgl.weights import load_weights

log = logging.getLogger("minisgl")

# On a CPU the KV cache is at most this large: small models run there, beside everything else on the machine.
CPU_KV_BYTES = 2 << 30
# Left free on a GPU beside what the profile run saw: the driver's own allocations, and fragmentation.
GPU_RESERVE_BYTES = 512 << 20
# Scored prompt tokens whose logits exist at once: 78 MB of Qwen3's vocabulary in bf16.
SCORED_TOKENS = 256


class Engine:
    """Loads a model on one device, gives the memory that is left to KV pages, and runs steps.

    `config` is a resolved one (`resolve.resolve`); `self.config` also has `num_pages`, and the `max_len` that fits
    them. Raises MinisglError when the model and one full request do not fit the device. `group`: the ranks that hold
    the model together, this one alone when none is given.
    """

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, folder: Path, group: ParallelGroup | None = None
    ) -> None:
        assert config.max_len is not None
        self.group = group or ParallelGroup()
        self.model_config = model_config
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        max_len = config.max_len
        use_device(self.device)
        allocated_before = self._allocated_bytes()
        try:
            ops = INVARIANT if config.deterministic else FASTEST
            self.model = Decoder(
                model_config, device=self.device, dtype=self.dtype, max_len=max_len, group=self.group, ops=ops
            )
            self.sampler = Sampler(self.model.shard, self.group)
            load_weights(self.model, folder, config.load_format, config.seed)
            block = ops.query_block(model_config.head_dim, self.device, self.dtype)
            self._batch_sizes = self._sizes_of_batches()
            padded = padded_size(config.max_running, self._batch_sizes)
            self.rows = RowTable(config.max_running, padded, max_len, config.page_size, block, self.device)
            # All zeros between steps; see `kernels.logits`.
            self._counts = torch.zeros(padded, self.model.shard.vocab.size, dtype=torch.int32, device=self.device)
            if self.device.type == "cuda":
                self._compile_kernels(config)
            num_pages = config.num_pages or self.group.min(self._profile_pages(config, allocated_before))
            self.config = self._fit(config, num_pages)
            self.num_pages = num_pages
            self.kv = self._new_cache(num_pages, config.page_size)
            self.graphs = self._new_graphs()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # A CPU's allocator has no error type of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
                raise
            raise MinisglError(
                f"the model and its KV pages do not fit in the memory of {self.device}: use a smaller model or a "
                "larger device, free it of other programs, or lower --num-pages, --max-step-tokens and --max-running"
            ) from error

    @property
    def max_len(self) -> int:
        """Most tokens of a prompt and its output together."""
        assert self.config.max_len is not None
        return self.config.max_len

    @property
    def closed(self) -> bool:
        return not hasattr(self, "model")

    def close(self) -> None:
        """Give the device's memory back."""
        if not self.closed:
            for name in ("model", "sampler", "kv", "rows", "graphs", "_counts", "_waiting_logits"):
                vars(self).pop(name, None)  # not all are there where loading failed
            self.empty_cache()

    def watched(self) -> AbstractContextManager[None]:
        """Around a step and the wait for its results. One rank alone has nobody to watch."""
        return nullcontext()

    def check(self) -> None:
        """MinisglError when a rank has failed."""

    def on_hang(self, say: Callable[[str], object]) -> None:
        """What to do with the line that says which rank hangs, before the process ends, instead of printing it."""

    def empty_cache(self) -> None:
        """Give back what torch keeps of freed memory, so that it can be had in other sizes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def forward(self, step: Step, *, masked: bool = False) -> Forward:
        """Launch the forward pass of a step, and its sampling unless it waits for masks."""
        use_device(self.device)
        wanted = Wanted.of(step)
        if self.group.size > 1:  # then a search for thresholds takes exchanges
            wanted = wanted._replace(filters=any(request.filters for request in step.sampled))
        if self.graphs and (captured := self.graphs.run(step, wanted, masked)):
            return captured
        longest = max((request.length for request in step.sampled), default=0)
        return self._run(self.rows.load(step), self.kv, wanted, longest, masked)

    @torch.inference_mode()
    def sample(self, forward: Forward, masks: Ints, mask_of: Ints) -> Forward:
        """Sample a step that waited for masks  # [M, W] of allowed ids; mask_of  # [N], -1: none. See
        `kernels.logits`."""
        use_device(self.device)
        on_device = upload(self.device, masks=masks.ravel(), mask_of=mask_of)
        return self._sample(forward, on_device["masks"].view(masks.shape), on_device["mask_of"])

    def _run(
        self, batch: Batch, kv: KVCache, wanted: Wanted = NOTHING_MORE, longest: int = 0, masked: bool = False
    ) -> Forward:
        """The forward pass, and the sampling unless it waits for masks; no sampled position is above `longest`."""
        scored, pooled = None, None
        if batch.kept is None:
            logits = self.model.forward(batch, kv)
        else:
            hidden = self.model.hidden(batch, kv)
            logits = self.model.logits(hidden[batch.kept.sampled])
            scored = self._score(hidden, batch.kept) if len(batch.kept.scored_ids) else None
            pooled = _pool(hidden, batch.kept) if len(batch.kept.pooled) else None
        made = Forward(
            wanted, longest, batch.sample_rows, batch.sample_positions, logits=logits, scored=scored, pooled=pooled
        )
        return made if masked else self._sample(made)

    def run_key(self, batch: Batch, key: Key) -> Forward:
        """The step that a graph is made of. Logits that wait for masks go where those of all graphs do."""
        made = self._run(batch, self.kv, key.wanted, key.bound, key.masked)
        if made.logits is None:
            return made
        return replace(made, logits=self._waiting_logits[: len(made.logits)].copy_(made.logits))

    @cached_property
    def _waiting_logits(self) -> torch.Tensor:
        return self.model.lm_head.new_empty(self._counts.shape)  # [most samples, V]

    def _score(self, hidden: torch.Tensor, kept: Kept) -> Logprobs:
        """Logprobs of prompt tokens, a few at a time: memory does not grow with the prompt."""
        parts = [
            self.sampler.logprobs(self.model.logits(hidden[before]), ids, kept.num_top)
            for before, ids in zip(
                kept.before_scored.split(SCORED_TOKENS), kept.scored_ids.split(SCORED_TOKENS), strict=True
            )
        ]
        return Logprobs(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _sample(self, made: Forward, masks: torch.Tensor | None = None, mask_of: torch.Tensor | None = None) -> Forward:
        rows, logits = self.rows, made.logits
        assert logits is not None
        ids, of_ids = made.rows, None
        if len(logits):
            if made.wanted.edits or masks is not None:
                self._edit(logits, made, masks, mask_of)
            ids = self.sampler(
                logits,
                made.rows,
                made.positions,
                rows.temperature,
                rows.top_k,
                rows.top_p,
                rows.min_p,
                rows.seed,
                tokens=rows.tokens,
                filters=made.wanted.filters,
            )
            if made.wanted.num_top is not None:
                of_ids = Logprobs(*self.sampler.logprobs(logits, ids, made.wanted.num_top))
        return replace(made, logits=None, ids=ids, logprobs=of_ids)

    def _edit(
        self, logits: torch.Tensor, made: Forward, masks: torch.Tensor | None, mask_of: torch.Tensor | None
    ) -> None:
        tables, tokens, shard = self.rows.edits.tables, self.rows.tokens, self.model.shard
        part = {"first_id": shard.first_id, "num_ids": shard.vocab.num_real} if self.group.size > 1 else {}
        try:
            edit_logits(
                logits, made.rows, made.positions, tokens, made.longest, tables, self._counts, masks, mask_of, **part
            )
        except BaseException:
            self._counts.zero_()  # between its two launches they are not
            raise

    def cascade_planner(self) -> CascadePlanner | None:
        """What plans the decodes that attend to a shared prefix together; None where none do."""
        together = self._tile_members(self.config)
        kv_bytes = self._page_bytes(1) // self.model_config.num_layers
        return CascadePlanner(together, self.config.page_size, kv_bytes) if together else None

    def _tile_members(self, config: EngineConfig) -> int:
        """Most sequences that attend to a shared prefix in one program; 0 when none do."""
        shard = self.model.shard
        together = tile_members(shard.q_heads.size, shard.kv_heads.size, self.dtype)
        fill = together > 1 and min_members(together) <= config.max_running
        all_windows = all(self.model_config.windows)  # whose attention reads no shared prefix by itself
        return together if config.cascade and use_triton(self.model.lm_head) and fill and not all_windows else 0

    def _new_graphs(self) -> StepGraphs | None:
        if self.device.type == "cpu" or self.config.max_graph_batch == 0:
            return None
        kv_heads, max_len = self.model.shard.kv_heads.size, self.rows.tokens.shape[1]
        short_sizes = range(many_sequences(kv_heads, FEW_KEYS), many_sequences(kv_heads, max_len))
        return StepGraphs(
            self.rows, self.run_key, self.config.max_graph_batch, self.group, self._batch_sizes, short_sizes
        )

    def _sizes_of_batches(self) -> Sequence[int]:
        """Numbers of rows that decode batches are padded to, ascending."""
        whole = self.group.size == 1 and self.dtype.itemsize == 2 and self.model.ops.streams
        on_hopper = whole and hopper_module("matmul_sm90", self.device) is not None
        return [size for size in BATCH_SIZES if not on_hopper or size not in LOSING_ON_HOPPER]

    # -- memory --

    def _new_cache(self, num_pages: int, page_size: int) -> KVCache:
        model, kv_heads = self.model_config, self.model.shard.kv_heads.size
        shape = (len(self.model.layers), num_pages, page_size, kv_heads, model.head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return KVCache(keys, values)

    def _page_bytes(self, page_size: int) -> int:
        model, kv_heads = self.model_config, self.model.shard.kv_heads.size
        return 2 * model.num_layers * page_size * kv_heads * model.head_dim * self.dtype.itemsize

    def _allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _profile_pages(self, config: EngineConfig, allocated_before: int) -> int:
        """How many KV pages fit beside the weights and the largest step, which is run to see what it takes."""
        page_bytes = self._page_bytes(config.page_size)
        if self.device.type == "cpu":
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * config.memory_fraction
            return int(min(available, CPU_KV_BYTES) // page_bytes)
        fixed = torch.cuda.memory_allocated(self.device) - allocated_before
        activations = self._profile_activations(config)
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = total * config.memory_fraction - fixed - activations
        return max(0, int(min(allowed, free - activations - GPU_RESERVE_BYTES) // page_bytes))

    @torch.inference_mode()
    def _profile_activations(self, config: EngineConfig) -> int:
        """Peak bytes of the largest steps beyond weights and KV."""
        model, rows = self.model_config, self.rows
        most = rows.tokens.shape[1] - 1  # tokens of one request
        each, longer = divmod(config.max_step_tokens, config.max_running)
        counts = [min(each + (row < longer), most) for row in range(config.max_running)]
        pages_each = -(-counts[0] // config.page_size)
        kv = self._new_cache(pages_each, config.page_size)
        params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, top_k=50, min_p=0.1, seed=0)
        requests = [Request(row, [0] * count, params, count + 1, frozenset()) for row, count in enumerate(counts)]
        for row, request in enumerate(requests):
            request.row = row
        pages = [(row, place, place) for row in range(config.max_running) for place in range(pages_each)]
        chunks = [Chunk(request, 0, count, 0, samples=True) for request, count in zip(requests, counts, strict=True)]
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._run(rows.load(Step(chunks=chunks, new_rows=requests, page_updates=pages)), kv, EVERYTHING, counts[0])
        decode = rows.load(Step(decodes=requests))
        # Split-KV decode takes its largest workspace at the longest context.
        self._run(replace(decode, max_decode_len=rows.tokens.shape[1]), kv)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kv, decode
        rows.reset()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        log.debug("%s: the largest steps take %.2f GB", model.architecture, peak / 1e9)
        return peak

    def _compile_kernels(self, config: EngineConfig) -> None:
        """Run every kind of step, so that no request waits for a compiler: once to see which kernels they launch, and
        once more to see them run."""
        with self._few_layers(), self.group.rehearsal():
            kv = self._new_cache(1, config.page_size)
            with compile_ahead(self.device):
                self._run_every_kind(config, kv)
            self._run_every_kind(config, kv)
        self.rows.reset()

    @torch.inference_mode()
    def _run_every_kind(self, config: EngineConfig, kv: KVCache) -> None:
        """Small steps of every kind that has kernels of its own."""
        rows, max_len = self.rows, self.rows.tokens.shape[1]

        def decodes(size: int, bound: int, cascade: CascadeTiles | None = None) -> Batch:
            padding = torch.full((size,), -1, dtype=torch.int32, device=self.device)  # changes no row
            return rows.decode_batch(padding, bound, cascade)

        self.model.run_prefill_matmuls(config.max_step_tokens, kv)  # first, since they take a compiler longest
        params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, top_k=50, min_p=0.1, seed=0)
        prompt = Request(0, [0, 0], params, 3, frozenset())
        prompt.row = 0
        step = Step(chunks=[Chunk(prompt, 0, 2, 0, samples=True)], new_rows=[prompt])
        self._run(rows.load(step), kv)
        borders, most = self.model.stream_borders, padded_size(config.max_running, self._batch_sizes)
        kinds = kinds_of_batches(self.model.shard.kv_heads.size, min(max(borders[-1], 1), most), max_len)
        for size, bound in sorted(kinds | {(border + 1, max_len) for border in borders}):
            if size <= most:
                self._run(decodes(size, bound), kv)
        self.model.hidden(decodes(1, max_len), kv)  # as decodes beside chunks
        if together := self._tile_members(config):
            members = min_members(together)  # as many as make a tile; it has nothing to do
            packed = torch.zeros(packed_length(members, together), dtype=torch.int32, device=self.device)
            for bound in (1, max_len):  # no tile is used where a sequence has one split
                self._run(decodes(members, bound, CascadeTiles.unpack(packed, members, together)), kv)
        borders = self.model.ops.linear_borders(self.dtype, self.device)
        for border in sorted({*borders, early_tokens(self.model_config.hidden_size)}):
            if border < config.max_step_tokens:
                self.model.run_matmuls(border + 1, kv)
        self._run(decodes(1, 1), kv, EVERYTHING, max_len)
        # Not `self.sample`, with which a first rank tells the others to do the same.
        masks = np.zeros((1, -(-self.model_config.vocab_size // 32)), np.int32)
        Engine.sample(self, self._run(decodes(1, 1), kv, masked=True), masks, np.full(1, -1, np.int32))

    @contextmanager
    def _few_layers(self) -> Iterator[None]:
        """Inside, steps run through few layers, which launch all kernels that the whole model does."""
        whole, self.model = self.model, self.model.excerpt()
        try:
            yield
        finally:
            self.model = whole

    def _fit(self, config: EngineConfig, num_pages: int) -> EngineConfig:
        """Keep max_len within the pages there are, so that any request that is let in can finish alone."""
        assert config.max_len is not None
        capacity = num_pages * config.page_size
        if capacity < 2 * config.page_size:
            raise MinisglError(
                f"{self.device} has no room for KV beside the model: {num_pages} pages, and 2 are needed. Use a "
                "smaller model or a larger device, raise --num-pages or --memory-fraction, or lower --max-step-tokens "
                "and --max-running"
            )
        if config.max_len > capacity:
            log.warning("max_len is lowered from %d to %d, the tokens that the KV pages hold", config.max_len, capacity)
        return replace(config, num_pages=num_pages, max_len=min(config.max_len, capacity))


def _pool(hidden: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Sums of hidden states  # [chunks that pool, hidden] fp32."""
    return torch.segment_reduce(hidden[kept.pooled].float(), "sum", lengths=kept.pool_sizes.long())
