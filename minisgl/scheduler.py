"""Which tokens the next forward pass computes: admit, chunk, mix, preempt, retire.

A step holds one token of every decoding request and, within the same token budget, chunks of prompts. Chunks end on
page borders (but for a prompt's last), so that each page is computed by one request and belongs to the prefix tree from
the moment it is scheduled: a follower in the same step may already read it, since a layer stores all keys before it
attends.

The next step may be scheduled while one is in flight: the tokens it samples are not known here then, but their places
are. Pages and rows that are given back while a step in flight still uses them are safe: whoever gets them next is
computed by a later step, and the device runs its steps in order.

Knows requests, pages and the prefix tree. Knows no tensors: it runs, and is tested, with no device.
"""

from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from minisgl.cascade import CascadePlan, CascadePlanner
from minisgl.page_pool import PagePool
from minisgl.radix_cache import Node, RadixCache
from minisgl.request import Request


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, start + count) of a request in one step; KV before `store_from` is stored already."""

    request: Request
    start: int
    count: int
    store_from: int
    samples: bool  # the chunk ends the prompt: its last token's logits are sampled
    scored: tuple[int, int] = (0, 0)  # prompt tokens [first, last) get their logprobs from this chunk

    @property
    def pooled(self) -> tuple[int, int]:
        """Tokens [first, last) whose hidden states count for the request's embedding."""
        end = self.start + self.count
        if self.request.pooling == "mean":
            return self.start, end
        return (end - 1, end) if self.request.pooling == "last" and self.samples else (end, end)

    @property
    def pools(self) -> bool:
        return self.pooled[0] < self.pooled[1]

    @property
    def scores(self) -> bool:
        return self.scored[0] < self.scored[1]


@dataclass
class Step:
    """One forward pass: first the decoding requests, then the chunks, in the order every rank uses."""

    decodes: list[Request] = field(default_factory=list)  # longest first
    chunks: list[Chunk] = field(default_factory=list)
    new_rows: list[Request] = field(default_factory=list)  # requests that got their row in this step
    page_updates: list[tuple[int, int, int]] = field(default_factory=list)  # (row, place in the row's table, page)
    stamp: int = 0  # prefixes inserted after it belong to this step
    cascade: CascadePlan | None = None  # which decodes attend to a shared prefix together

    @property
    def sampled(self) -> list[Request]:
        """The requests that get a token from this step, in the order of the sampled ids."""
        return self.decodes + [chunk.request for chunk in self.chunks if chunk.samples]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """Continuous batching over one page pool. Each step of `schedule` goes to `complete`, in order, at most one step
    later; `retire` ends requests."""

    def __init__(
        self,
        pool: PagePool,
        cache: RadixCache | None,
        max_running: int,
        max_step_tokens: int,
        cascade: CascadePlanner | None = None,
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.cascade = cascade
        self.max_step_tokens = max_step_tokens
        self._least_step_tokens = max_running + pool.page_size
        assert max_step_tokens >= self._least_step_tokens, "a full house of decodes would starve prompts"
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}  # oldest first
        self.num_preemptions = 0
        self._free_rows = list(range(max_running - 1, -1, -1))
        self._budget = 0  # tokens that the step in the making may still take
        self._nodes: dict[Request, Node] = {}  # the node each running request locks

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        assert self.pool.pages_for(request.max_total) <= self.pool.num_pages, "refused at the edge, by max_len"
        self.waiting.append(request)

    def schedule(self) -> Step:
        """Choose the next step and reserve its pages. The step is empty only when there is nothing to do; when this
        raises, it is rolled back."""
        step = Step(stamp=self.cache.stamp() if self.cache else 0)
        try:
            self._fill(step)
        except BaseException:
            self.roll_back(step)
            raise
        return step

    def _fill(self, step: Step) -> None:
        preemptions = self.num_preemptions
        self._schedule_decodes(step)
        self._budget = self.max_step_tokens - len(step.decodes)
        for request in list(self.running):
            if not request.decoding and request in self.running:
                self._schedule_chunk(step, request)
        if self.num_preemptions == preemptions:  # whom we just preempted would come straight back
            self._admit(step)
        if self.cascade:
            step.cascade = self.cascade.plan(step.decodes)

    def complete(self, step: Step, ids: npt.NDArray[np.int32]) -> list[Request]:
        """Append the sampled ids of a step that ran; returns the requests that got one. The caller retires the
        ended."""
        got_token = []
        for request, token in zip(step.sampled, ids.tolist(), strict=True):
            request.num_pending -= 1
            if request.num_dropped:
                request.num_dropped -= 1
            elif not request.retired:
                request.append(token)
                got_token.append(request)
        return got_token

    def extend(self, request: Request, tokens: list[int]) -> None:
        """Append output tokens that are known without sampling. They are computed together, like a chunk of a prompt;
        what steps in flight sample for the request is dropped."""
        request.num_dropped = request.num_pending
        for token in tokens:
            request.append(token)
            if request.finish_reason:
                return
        request.decoding = False
        request.num_shareable = request.num_shared * self.pool.page_size

    def retire(self, request: Request) -> None:
        """Take out a request that ended or was aborted; its whole pages stay in the prefix tree."""
        request.retired = True
        if request in self.running:
            self._leave(request, keep_prefix=True)
        else:
            self.waiting.remove(request)

    def roll_back(self, step: Step) -> None:
        """A step failed: take its prefixes out of the tree and its requests back to the queue. Steps in flight are
        rolled back from the newest to the oldest."""
        failed = {*step.sampled, *step.new_rows, *(chunk.request for chunk in step.chunks)}
        failed |= {request for request, node in self._nodes.items() if node.born > step.stamp}
        rows = {row for row, _, _ in step.page_updates}  # of pages that the device may not have been told of
        failed |= {request for request in self.running if request.row in rows}
        for request in [request for request in reversed(self.running) if request in failed]:
            self._leave(request, keep_prefix=False)
            self._requeue(request)
        for request in step.sampled:
            request.num_pending -= 1
            request.num_dropped = min(request.num_dropped, request.num_pending)
        if self.cache:
            self.pool.free(self.cache.forget_since(step.stamp))

    def halve_steps(self) -> bool:
        """Make steps half as large from now on, so that they take less memory; False when they are at their least."""
        smaller = max(self.max_step_tokens // 2, self._least_step_tokens)
        shrunk = smaller < self.max_step_tokens
        self.max_step_tokens = smaller
        return shrunk

    # -- decode --

    def _schedule_decodes(self, step: Step) -> None:
        for request in list(self.running):
            if not request.decoding or request not in self.running:
                continue
            if request.num_tokens + request.num_pending >= request.max_total:
                continue  # its last token is being sampled
            if self.pool.pages_for(request.length + 1) > len(request.pages):
                pages = self._allocate_by_preemption(request, step)
                if not pages:
                    self._preempt(request)
                    continue
                self._give_pages(step, request, pages)
            request.length += 1
            request.num_pending += 1
            step.decodes.append(request)
        step.decodes.sort(key=attrgetter("length"), reverse=True)  # attention is faster with the longest first

    # -- prefill --

    def _schedule_chunk(self, step: Step, request: Request) -> None:
        """Add the next chunk of a running request's prompt, as far as budget and pages go."""
        self._match_further(step, request)
        store_from = request.length
        start = min(request.length, request.num_tokens - 1)  # a prompt found whole: its last token is computed again
        page_size = self.pool.page_size
        end = min(request.num_tokens, start + self._budget)
        if end < request.num_tokens:
            end = end // page_size * page_size
        if end <= start:
            return
        needed = self.pool.pages_for(end) - len(request.pages)
        pages = self._allocate(needed)
        if pages is None:
            room = self._allocate(self._num_available()) or self._allocate_by_preemption(request, step)
            if not room:
                return
            pages = room
            end = min(end, len(request.pages + pages) * page_size)
        self._give_pages(step, request, pages)
        request.length = end
        self._budget -= end - start
        first = request.next_scored
        scored = (max(first, start + 1), min(end + 1, request.scored_end)) if first is not None else (0, 0)
        step.chunks.append(Chunk(request, start, end - start, store_from, end == request.num_tokens, scored))
        if end == request.num_tokens:
            request.num_pending += 1
            request.decoding = True
        self._share(request)

    def _admit(self, step: Step) -> None:
        while self.waiting and self._free_rows and self._budget > 0:
            request = self.waiting[0]
            assert request.num_pending == 0, "its last token is not known yet"
            node, pages = self.cache.match(request.tokens[: request.num_matchable]) if self.cache else (None, [])
            if self.cache and node:
                self.cache.lock(node)
            # Its whole prompt must find room, and each running request's next page too; alone it always fits.
            needed = self.pool.pages_for(request.num_tokens) - len(pages) + len(self.running)
            fits = needed <= self._num_available() or not self.running
            short = request.num_tokens - len(pages) * self.pool.page_size
            if not fits or self._budget < min(short, self.pool.page_size):
                if self.cache and node:
                    self.cache.unlock(node)
                return
            if self.cache and node:
                self.cache.count_use(node)
            self.waiting.popleft()
            request.row = self._free_rows.pop()
            self.running[request] = None
            step.new_rows.append(request)
            if node:
                self._nodes[request] = node
            self._adopt(step, request, pages)
            self._schedule_chunk(step, request)

    def _match_further(self, step: Step, request: Request) -> None:
        """Take over what others have put in the tree beyond the request's own prefix since it last looked."""
        if not self.cache or request.length != self._nodes[request].depth:
            return
        node = self._nodes[request]
        deeper, pages = self.cache.match(request.tokens[: request.num_matchable], node)
        if pages:
            self.cache.lock(deeper)
            self.cache.unlock(node)
            self.cache.count_use(deeper, node)
            self._nodes[request] = deeper
            self._adopt(step, request, pages)

    def _adopt(self, step: Step, request: Request, pages: list[int]) -> None:
        """Let a request go on behind pages of the tree."""
        self._give_pages(step, request, pages)
        request.num_shared += len(pages)
        request.length = request.num_shared * self.pool.page_size
        if not request.was_preempted:
            found = request.cached_tokens + len(pages) * self.pool.page_size
            request.cached_tokens = min(found, request.num_prompt - 1)

    def _share(self, request: Request) -> None:
        """Put the request's whole pages in the tree."""
        if not self.cache:
            return
        node = self._nodes[request]
        whole = min(request.length, request.num_shareable) // self.pool.page_size
        if whole > request.num_shared:
            deeper, duplicates = self.cache.insert(node, request.tokens, request.pages[request.num_shared : whole])
            assert not duplicates, "the request looked just before it computed"
            self.cache.lock(deeper)
            self.cache.unlock(node)
            self._nodes[request] = deeper
            request.num_shared = whole

    # -- pages --

    def _num_available(self) -> int:
        return self.pool.num_free + (self.cache.num_evictable if self.cache else 0)

    def _allocate(self, count: int) -> list[int] | None:
        """`count` pages, evicting cached prefixes when need be, or None."""
        if count > self._num_available():
            return None
        if count > self.pool.num_free and self.cache:
            self.pool.free(self.cache.evict(count - self.pool.num_free))
        return self.pool.allocate(count)

    def _give_pages(self, step: Step, request: Request, pages: list[int]) -> None:
        assert request.row is not None
        first = len(request.pages)
        step.page_updates += [(request.row, first + place, page) for place, page in enumerate(pages)]
        request.pages += pages

    # -- preemption --

    def _allocate_by_preemption(self, request: Request, step: Step) -> list[int] | None:
        """One page for `request`, if need be from the youngest outside this step; None when that is the request
        itself."""
        while (pages := self._allocate(1)) is None:
            busy = set(step.decodes) | {chunk.request for chunk in step.chunks}
            victim = next(other for other in reversed(self.running) if other not in busy)
            if victim is request:
                return None
            self._preempt(victim)
        return pages

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue: its tokens are kept, and its whole pages stay cached until they are needed."""
        self.num_preemptions += 1
        self._leave(request, keep_prefix=True)
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        request.restart()
        request.was_preempted = True
        self.waiting.appendleft(request)

    def _leave(self, request: Request, keep_prefix: bool) -> None:
        """Give back row and pages; whole pages go to the tree if they are to be kept, all else is freed."""
        assert request.row is not None
        own = request.pages[request.num_shared :]
        if self.cache:
            node = self._nodes.pop(request)
            if keep_prefix:
                known = min(request.length, request.num_tokens)  # a step in flight may be sampling the last
                whole = known // self.pool.page_size - request.num_shared
                _, duplicates = self.cache.insert(node, request.tokens, own[:whole])
                own = duplicates + own[whole:]
            self.cache.unlock(node)
        self.pool.free(own)
        del self.running[request]
        self._free_rows.append(request.row)
        request.row = None
        request.pages = []
