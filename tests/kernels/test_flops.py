"""FLOP formulas are registered on demand, since importing the counter imports triton."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels.flops import register_flop_formulas
assert "torch.utils.flop_counter" not in sys.modules, "importing fastadapt imports the counter"
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
register_flop_formulas()
register_flop_formulas()
from torch.utils.flop_counter import FlopCounterMode
h, head = torch.ones(4, 3, device="meta"), torch.ones(5, 3, device="meta")
with FlopCounterMode(display=False) as counter:
    linear_kl(h, h[None], head)
print(counter.get_total_flops())
print(any(type(f).__module__.startswith("fastadapt") for f in sys.meta_path))
"""


@pytest.mark.slow
def test_formulas_are_registered_on_demand_and_once() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(2 * 4 * 3 * 5 * 2), "False"]
