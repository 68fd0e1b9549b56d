"""Every test starts from one seed, so that a failure comes back; and a text to train on."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20240229)


@pytest.fixture
def text(tmp_path):
    """A folder of 30 small files."""
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(30):
        (folder / f"page{n}.txt").write_text(f"page {n}: " + "the points are set for the other line. " * 20)
    return folder
