"""How golden tensors are compared: the error is relative to the largest entry, as their READMEs say."""

from torch import Tensor


def assert_near(ours: Tensor | None, stored: Tensor, tolerance: float, name: str = "") -> None:
    assert ours is not None, name
    assert ours.shape == stored.shape, name
    error = float((ours.detach().double() - stored.double()).abs().max() / stored.double().abs().max())
    assert error < tolerance, f"{name}: relative error {error}"
