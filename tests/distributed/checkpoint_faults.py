"""On one of N processes: saves of which one rank's fails, and loads of which one rank's files are damaged."""

import io
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from stand_in_engine import StandInEngine

from llada_train.checkpoint import writer
from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.restore import load_newest
from llada_train.checkpoint.store import checkpoints
from llada_train.checkpoint.writer import CheckpointWriter
from llada_train.config.load import load_config


def saves_and_loads(config_file: Path, root: Path, faulty: int) -> tuple[list[str], str, int, bool]:
    """Steps 1 to 3, of which the faulty rank cannot write the second and the third is damaged afterwards.

    Returns the checkpoints left, what was told, the step gone on from, and whether the state is that step's.
    """
    dist.init_process_group("gloo")
    engine = StandInEngine(load_config(config_file), seed=dist.get_rank())
    saving, states = CheckpointWriter(root, engine), {}  # type: ignore[arg-type]
    told = io.StringIO()
    with redirect_stderr(told):
        for step in (1, 2, 3):
            engine.step()
            full = step == 2 and dist.get_rank() == faulty
            error = OSError(28, "No space left on device")
            with mock.patch.object(writer, "write_tensors", side_effect=error) if full else mock.MagicMock():
                saving.start(Progress(step=step, consumed_samples=step))
                saving.finish()
            states[step] = engine.state()
        left = [path.name for path in checkpoints(root)]
        if dist.get_rank() == 0:
            file = root / left[-1] / f"rank-{faulty:05d}.safetensors"
            file.write_bytes(file.read_bytes()[:-4] + b"flip")
        dist.barrier()
        other = StandInEngine(engine.config, seed=99)
        found = load_newest(root, other)  # type: ignore[arg-type]
    assert found is not None
    step = found[1].step
    same = all(torch.equal(state, states[step][key]) for key, state in other.state().items())
    dist.destroy_process_group()
    return left, told.getvalue(), step, same
