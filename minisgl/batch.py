"""What one forward pass needs: packed tensors, and the shape legend of everything below the engine.

Legend
    T  packed tokens of the step: first one token of each decoding row, then the prefill chunks, end to end
    S  sequences of the step: B decoding rows, then S - B prefill chunks
    N  sampled positions: one for each decoding row and one for each chunk that ends its prompt
    A captured step has room for a number of each, and padding where it has fewer: sequences of row -1, of which those
    that decode have one token in a step of decodes alone and none beside chunks, and the last has all that are left.
    R  rows of the row table (running requests), M pages a row may have, P pages of the KV cache
    H  query heads, K KV heads, D head dim, V vocabulary

Knows shapes only. `Engine` makes it from a scheduler's `Step`.
"""

from dataclasses import dataclass

import torch

from minisgl.kernels.attention_cascade import CascadeTiles


@dataclass(frozen=True)
class Kept:
    """What a step makes of hidden states beside samples; int32. Places are among the tokens of `Batch.sample_index`."""

    sampled: torch.Tensor  # [N] places of the tokens that are sampled
    before_scored: torch.Tensor  # [scored] places of the tokens that precede prompt tokens whose logprobs are asked for
    scored_ids: torch.Tensor  # [scored] these prompt tokens
    num_top: int  # likeliest tokens that are asked for beside each
    pooled: torch.Tensor  # [pooled] places of the tokens whose hidden states are summed, chunk after chunk
    pool_sizes: torch.Tensor  # [chunks that pool] how many of them each chunk has


@dataclass(frozen=True)
class Batch:
    """The tensors of one forward pass; int32 on the model's device unless said."""

    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] place of each token in its own text
    slots: torch.Tensor  # [T] page * page_size + place in the page of the token's KV; -1: already stored, do not write
    rows: torch.Tensor  # [S] row table index of each sequence
    kv_lens: torch.Tensor  # [S] tokens each sequence attends to, those of this step included
    num_decode: int  # B: sequences 0..B-1 decode; that of token t < B, if any, is sequence t
    max_decode_len: int  # bound on kv_lens[:B], known on the host
    cu_seqlens: torch.Tensor  # [S - B + 1] offsets of the chunks' tokens
    tiles: torch.Tensor  # [1 + num_tiles, 2]: their number, then (chunk, query block) of each prefill attention tile
    sample_index: torch.Tensor  # [N] packed tokens whose logits are sampled; with `kept`, all that leave the model
    sample_rows: torch.Tensor  # [N] row of each sample
    sample_positions: torch.Tensor  # [N] place of the sampled token in its text
    page_table: torch.Tensor  # [R, M] page ids of each row
    cascade: CascadeTiles | None = None  # decoding sequences that attend to a shared prefix together
    kept: Kept | None = None

    @property
    def decodes_only(self) -> bool:
        """Whether it has no chunks, and so samples every token."""
        return len(self.tiles) == 1


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, in pages."""

    keys: torch.Tensor  # [layers, P, page_size, K, D]
    values: torch.Tensor  # [layers, P, page_size, K, D]
