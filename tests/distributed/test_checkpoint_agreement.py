"""One rank's disk fails, one rank's file is damaged: all ranks decide alike, and rank 0 alone speaks."""

from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from checkpoint_faults import saves_and_loads


@pytest.mark.parametrize("faulty", [0, 2])
def test_all_ranks_decide_alike(make_config: Callable[..., Path], tmp_path: Path, faulty: int) -> None:
    found = processes.run(3, saves_and_loads, make_config(), tmp_path / "checkpoints", faulty)
    for rank, (left, told, step, same) in enumerate(found):
        assert left == ["step-00000001", "step-00000003"]
        assert (step, same) == (1, True)
        assert len(told.splitlines()) == (2 if rank == 0 else 0)
    failed, damaged = found[0][1].splitlines()
    assert "step-00000002" in failed and f"rank-{faulty:05d}" in failed and "No space left" in failed
    assert f"rank-{faulty:05d}.safetensors: damaged" in damaged and "taking step-00000001 instead" in damaged
