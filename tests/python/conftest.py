"""Every test starts from one seed, so that a failure comes back."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20240229)
