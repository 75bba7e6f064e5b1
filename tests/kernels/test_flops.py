"""FLOP formulas wait for the counter, whose import brings triton."""

import subprocess
import sys

SCRIPT = """
import sys, torch
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels import flops
assert "torch.utils.flop_counter" not in sys.modules, "importing fastadapt imports the counter"
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
flops.register(torch.ops.aten.relu, lambda x, out_shape=None: 1000)
h, head = torch.ones(4, 3, device="meta"), torch.ones(5, 3, device="meta")
with FlopCounterMode(display=False) as counter:
    linear_kl(h, h[None], head)
    h.relu()
print(counter.get_total_flops())
print(any(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path))
"""


def test_formulas_are_registered_when_the_counter_is_imported():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(2 * 4 * 3 * 5 * 2 + 1000), "False"]
