"""What decides the bits of a compiled kernel's sums."""

import re
from typing import Any


def arithmetic(compiled: Any) -> set[str]:
    """Every matmul and every sum over a dimension, with the layouts of its operands."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma)\b.*? : ((?:tensor|!).*) loc\(", text)
    assert found, "no matmul was found"
    found += re.findall(r"^ *\}\) : (.*) loc\(", text, re.MULTILINE)  # the types of a sum stand below its body

    def spelled_out(types: str) -> str:
        while (plain := re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), types)) != types:
            types = plain
        return types

    return {spelled_out(types) for types in found}
