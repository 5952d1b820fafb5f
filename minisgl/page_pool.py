"""The free list of KV pages.

Knows which pages are free. Does not know who holds the others: a page is either free, held by one request, or held by
the prefix tree, and the scheduler moves it between the three.
"""


class PagePool:
    """`num_pages` pages of `page_size` tokens each; ids are 0..num_pages - 1."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has made sure that they are there."""
        assert 0 <= count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        return pages

    def free(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, "a page was freed twice"
