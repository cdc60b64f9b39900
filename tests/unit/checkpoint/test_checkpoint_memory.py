"""What saving and loading take of a process's memory: its shard once more, and a tensor."""

import json
import subprocess
import sys
from pathlib import Path

# Peak resident memory over what there was before, in bytes: of a save, of a second one, of a load into another engine.
MEASURE = """
import json, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:4]
import torch, torch.distributed as dist
from checkpoint_files import CONFIG
from stand_in_engine import StandInEngine
from llada_train.checkpoint.manifest import Progress
from llada_train.checkpoint.reader import Checkpoint
from llada_train.checkpoint.restore import load_newest
from llada_train.checkpoint.writer import CheckpointWriter

def resident(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024

def extra(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "ffn_hidden_size": 2048, "vocab_size": 4096}
config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update=model)})
root = Path(sys.argv[1])
engine = StandInEngine(config)
writer = CheckpointWriter(root, engine)
found = {
    "shard": sum(state.nbytes for state in engine.state().values()),
    "tensor": max(state.nbytes for state in engine.state().values()),
}
writer.save(Progress(step=0, consumed_samples=0))  # what is imported and started only once
writer._buffer = None
found["first"] = extra(lambda: writer.save(Progress(step=1, consumed_samples=4)))
found["second"] = extra(lambda: writer.save(Progress(step=2, consumed_samples=8)))
other = StandInEngine(config, seed=1)
load_newest(root, other)
other = StandInEngine(config, seed=2)
found["load"] = extra(lambda: load_newest(root, other))
print(json.dumps(found))
"""
SLACK = 12 * 2**20  # the buffer of 4 MiB that files are read back through; the interpreter's own


def test_saving_takes_the_shard_once_more_and_loading_a_tensor(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path), str(here), str(here.parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shard"] > 80 * 2**20
    assert found["first"] <= found["shard"] + found["tensor"] + SLACK, found
    assert found["second"] <= found["tensor"] + SLACK, found  # the buffer is used again
    assert found["load"] <= found["tensor"] + SLACK, found
