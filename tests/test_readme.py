"""The README's examples run as they stand, on fewer samples."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_examples(one_thread):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names = {"torch": torch, "my_network": torch.nn.Conv2d(32, 64, 1), "other_network": torch.nn.Conv2d(32, 64, 1)}
    for block in blocks:
        code = block.replace("16000", "160").replace("chunk=1600", "chunk=80")
        if "my_network" in code:
            names["x"] = torch.randn(2, 64, 4, 4)
        exec(code, names)
