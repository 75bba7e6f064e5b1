"""The example that needs PyTorch alone: its step equals the loop's, and the comparison can fail."""

from __future__ import annotations

import differences
import hand_written
import pytest
import torch
from torch import Tensor

from fastadapt.kernels.transcoder import transcoder


class WithoutSubtraction(hand_written.OnTheOp):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + self.b_dec)


class Detached(hand_written.OnTheOp):
    """The output is right, and the gradient of the decoder's bias lacks a part."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.encoder.weight, self.encoder.bias, self.decoder.weight.T, self.b_dec
        result = transcoder(x - self.b_dec.detach(), *weights)
        return result.out, result.penalty / len(x)


def test_the_example_is_equal_and_wrong_ones_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert differences.report("right", hand_written.compare()) == 0
    for wrong in (WithoutSubtraction, Detached):
        assert differences.report(wrong.__name__, hand_written.compare(wrong, steps=1)) == 1
    assert capsys.readouterr().out.count("more than 1e-10") == 2


def test_nothing_is_compared_with_zeros_or_nan() -> None:
    one = torch.ones(2)
    for actual, expected in ((one, one * 0), (one, one / 0), (one * torch.nan, one)):
        with pytest.raises(ValueError, match="finite values that are not all 0"):
            differences.largest_difference({"x": actual}, {"x": expected})
    with pytest.raises(ValueError, match="equal names"):
        differences.largest_difference({}, {"x": one})
    assert differences.report("nan", float("nan")) == 1
