import pytest

from llada_train.config.errors import UserError
from llada_train.config.schema import ParallelConfig
from llada_train.parallel import topology


def test_one_of_several_processes_must_know_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would wait for the others at an address of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        topology.initialize(ParallelConfig())
