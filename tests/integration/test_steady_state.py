"""A long run in one process does not grow."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest

from llada_train.config.load import load_config
from llada_train.parallel import topology
from llada_train.training.journal import StartTimes
from llada_train.training.metrics import MetricsLog, read_metrics
from llada_train.training.preflight import open_inputs
from llada_train.training.signals import StopRequest
from llada_train.training.watchdog import Watchdog

STEPS, SETTLED = 1000, 400  # caches have filled after so many, and a checkpoint was saved
GROWTH = 5 * 2**20  # bytes; it is under 1 MiB, and would be 10 if each step's batch were kept


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_thousand_steps_take_no_more_memory(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_per_step = 8 * 32
    config = make_config(
        model={
            "num_layers": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "num_kv_heads": 2,
            "ffn_hidden_size": 32,
            "vocab_size": 300,
            "max_sequence_length": 64,
        },
        training={"global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
        optimizer={"learning_rate": [{"until_tokens": STEPS * tokens_per_step, "start": 1e-3, "end": 1e-3}]},
        logging={"interval_steps": 100},
        checkpoint={"interval_steps": 250},
        validation={"interval_steps": 250, "sequences": 8},
    )
    at: dict[int, int] = {}
    log = MetricsLog.train

    def log_and_measure(self: MetricsLog, **values: Any) -> None:
        log(self, **values)
        at[values["step"]] = resident()

    monkeypatch.setattr(MetricsLog, "train", log_and_measure)
    hears_no_signal = cast(StopRequest, SimpleNamespace(received=False, ignore=lambda: None))
    with mock.patch.dict(os.environ), Watchdog(1800, 0) as watchdog:
        topology.quiet_engines()
        from llada_train.training.pretrain import pretrain

        inputs = open_inputs(load_config(config, [], 1))
        assert pretrain(inputs, hears_no_signal, watchdog, StartTimes({})) == 0
    assert list(at) == list(range(100, STEPS + 1, 100))
    grown = {step: size - at[SETTLED] for step, size in at.items() if step > SETTLED}
    assert grown[STEPS] < GROWTH, {step: f"{size / 2**20:.1f} MiB" for step, size in grown.items()}
    last = [record for record in read_metrics(inputs.config.run_dir) if record["kind"] == "train"][-1]
    assert 0 < last["step_seconds_median"] < last["step_seconds_p99"]
