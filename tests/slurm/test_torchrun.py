"""Machines without SLURM: torchrun on each, which meet at a rendezvous."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import write_config
from disturbed import last_step, saved_step

from llada_train.parallel.launch import free_port
from llada_train.training.journal import read_history


def test_two_agents(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tiny_data, tmp_path)
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "run"]
    command = ["--nnodes", "2", "--nproc-per-node", "1", *rendezvous, "-m", "llada_train.cli", "pretrain", str(config)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    output = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], output
    started, ended = (next(e for e in read_history(tmp_path / "run") if e["event"] == k) for k in ("started", "ended"))
    assert started["processes"] == 2 and ended["outcome"] == "complete"
    assert last_step(tmp_path / "run") == saved_step(tmp_path / "run") == ended["step"] > 0
