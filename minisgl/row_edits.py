"""What the rows' requests ask of their logits, on the device: biases, bans and penalties.

Knows requests' parameters and the tables of `kernels.logits`. Does not know steps. Most requests ask for nothing, and
then nothing is uploaded.
"""

import numpy as np
import torch

from minisgl.kernels.logits import Edits
from minisgl.request import MAX_BAN_TOKENS, MAX_BANS, MAX_BIASES, Request
from minisgl.upload import Ints, ints, upload


class RowEdits:
    """The edits of all rows; `tables` is what kernels read. tokens  # [R, max_len] int32, the rows' texts."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.device = device = tokens.device
        self._tokens = tokens
        num_rows = len(tokens)
        self.tables = Edits.none(num_rows, MAX_BIASES, device, max_bans=MAX_BANS, max_ban_tokens=MAX_BAN_TOKENS)
        self._asking: set[int | None] = set()  # rows whose tables ask for something

    def update(self, new_rows: list[Request]) -> None:
        """Fill in the rows of new requests, and empty those of requests that ask for nothing."""
        changed = [request for request in new_rows if request.edits_logits or request.row in self._asking]
        if not changed:
            return
        self._asking |= {request.row for request in changed}
        on_device = upload(self.device, **_pack(changed))
        tables, rows = self.tables, on_device["rows"]
        tables.prompt_length[rows] = on_device["prompt_length"]
        rates = on_device["rates"].view(torch.float32).view(-1, 3)
        tables.repetition[rows], tables.presence[rows], tables.frequency[rows] = rates.unbind(1)
        tables.bias_ids[rows] = -1
        entries = on_device["bias_entries"]
        tables.bias_ids.view(-1)[entries] = on_device["bias_ids"]
        tables.biases.view(-1)[entries] = on_device["biases"].view(torch.float32)
        tables.bias_from.view(-1)[entries] = on_device["bias_from"]
        tables.bans[rows] = -1
        tables.bans.view(-1, MAX_BAN_TOKENS)[on_device["ban_entries"]] = on_device["bans"].view(-1, MAX_BAN_TOKENS)
        # Penalties and bans look at the whole text, of which chunks do not bring what the prefix cache has.
        texts = on_device["texts"].split([request.num_tokens for request in changed])
        for request, text in zip(changed, texts, strict=True):
            self._tokens[request.row, : len(text)] = text
        self._asking -= {request.row for request in changed if not request.edits_logits}  # once nothing can fail


def _pack(requests: list[Request]) -> dict[str, Ints]:
    rates, biases, bans = [], [], []
    for request in requests:
        params, row = request.params, request.row or 0
        rates += [params.repetition_penalty or 1.0, params.presence_penalty or 0.0, params.frequency_penalty or 0.0]
        for slot, (token, (bias, first)) in enumerate(request.biases.items()):
            biases.append((row * MAX_BIASES + slot, token, bias, first))
        for slot, ban in enumerate(request.bans):
            bans.append([row * MAX_BANS + slot, *[-1] * (MAX_BAN_TOKENS - len(ban)), *ban])
    ban_table = np.array(bans, np.int32).reshape(-1, 1 + MAX_BAN_TOKENS)
    return {
        "rows": ints([request.row for request in requests]),
        "texts": np.concatenate([request.tokens[: request.num_tokens] for request in requests]),
        "prompt_length": ints([request.num_prompt for request in requests]),
        "rates": np.array(rates, np.float32).view(np.int32),
        "bias_entries": ints([entry for entry, _, _, _ in biases]),
        "bias_ids": ints([token for _, token, _, _ in biases]),
        "biases": np.array([bias for _, _, bias, _ in biases], np.float32).view(np.int32),
        "bias_from": ints([first for _, _, _, first in biases]),
        "ban_entries": ban_table[:, 0],
        "bans": ban_table[:, 1:].ravel(),
    }
