import torch

from minisgl.kernels.logits import Edits, edit_logits


def launch() -> None:
    index, tokens = torch.empty(3, dtype=torch.int32), torch.empty(5, 4096, dtype=torch.int32)
    edits = Edits.none(5, 300, torch.device("cpu"), max_bans=64, max_ban_tokens=8)
    masks = torch.empty(2, 4748, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        logits, counts = torch.empty(3, 151936, dtype=dtype), torch.empty(3, 151936, dtype=torch.int32)
        edit_logits(logits, index, index, tokens, 4096, edits, counts)
        edit_logits(logits, index, index, tokens, 4096, edits, counts, masks, index)
