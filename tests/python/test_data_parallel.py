"""Layers in two processes: DistributedDataParallel and FSDP2 train as one process does."""

import os
import pathlib
import subprocess
import sys

import turnout


def test_two_processes_train_as_one(tmp_path) -> None:
    script = pathlib.Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(turnout.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path / "store"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
