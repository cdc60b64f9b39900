"""Ranks that hold copies of a parameter hold the same bits; where they do not, the check names parameter and rank."""

import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replica_faults import STEPS, Damage, damaged_step, verdicts

from llada_train.checkpoint.manifest import Progress
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.data.loader import GlobalBatch, Validation
from llada_train.data.timeline import Timeline
from llada_train.parallel import replicas
from llada_train.parallel.engine import Losses, Step
from llada_train.parallel.gate import Accepts
from llada_train.training import loop
from llada_train.training.loop import Trainer

TP2, PP2, CP2 = "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2", "parallel.context_parallel=2"
SP, ZERO2, ZERO3 = "parallel.sequence_parallel=true", "parallel.zero_stage=2", "parallel.zero_stage=3"
BF16 = "training.precision=bf16"
MATRIX = "decoder.layers.1.mlp.linear_fc2.weight"
NORM = "decoder.layers.1.pre_mlp_layernorm.weight"
LAST = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    "ranks, overrides, damages",
    [
        pytest.param(
            4,
            [BF16],
            {
                Damage(2, (MATRIX,)): (MATRIX, "rank 2"),
                Damage(0, (NORM,)): (NORM, "rank 0"),
                Damage(3, (MATRIX,), "swap"): (MATRIX, "rank 3"),
            },
            id="dp4",
        ),
        pytest.param(2, [ZERO2], {Damage(1, (MATRIX,)): (MATRIX, "ranks 0, 1")}, id="dp2-zero2"),
        pytest.param(2, [ZERO3, BF16], {Damage(1, (NORM,)): (NORM, "ranks 0, 1")}, id="dp2-zero3"),  # keeps those whole
        pytest.param(2, [CP2], {Damage(0, (MATRIX,), "swap"): (MATRIX, "ranks 0, 1")}, id="cp2"),
        pytest.param(
            2, [TP2, SP, BF16], {Damage(1, (NORM,)): (NORM, "ranks 0, 1"), Damage(1, (MATRIX,)): None}, id="tp2-sp"
        ),
        pytest.param(4, [TP2], {Damage(1, (NORM,)): (NORM, "rank 1")}, id="tp2-dp2"),
        pytest.param(4, [PP2], {Damage(3, (LAST,)): (LAST, "ranks 2, 3")}, id="pp2-dp2"),
    ],
)
def test_only_damaged_copies_are_found_and_named(
    make_config: Callable[..., Path], ranks: int, overrides: list[str], damages: dict[Damage, tuple[str, str] | None]
) -> None:
    """And every rank says the same, so that none waits for another. Slices of a matrix are not copies."""
    found = processes.run(ranks, verdicts, make_config(), overrides, list(damages))
    assert all(said == found[0] for said in found)
    sound, *said = found[0]
    assert sound is None
    for message, expected in zip(said, damages.values(), strict=True):
        if expected is None:
            assert message is None
        else:
            name, culprits = expected
            assert message is not None and f"step {STEPS}: " in message
            assert f"bit for bit: {name} (on {culprits}); the run stops" in message
            assert f"The machine of {culprits} is suspect" in message


def test_a_long_list_is_cut(make_config: Callable[..., Path]) -> None:
    names = tuple(f"decoder.layers.{i}.mlp.linear_fc{n}.weight" for i in range(4) for n in (1, 2))
    found = processes.run(2, verdicts, make_config(), [], [Damage(0, names)])
    message = found[0][1]
    assert [name for name in names if name in message] == list(names[:5])
    assert " and 3 more; " in message


def test_a_flipped_weight_is_found_in_the_step_that_it_spoils(make_config: Callable[..., Path]) -> None:
    """And a norm's master on one tensor-parallel rank in the step after."""
    found = processes.run(2, damaged_step, make_config(), Damage(1, (NORM,)), 1)[0]
    assert found[0] is not None and f"bit for bit: {NORM} (on ranks 0, 1); the run stops before the update" in found[0]
    before, after = processes.run(2, damaged_step, make_config(), Damage(1, (NORM,), "flip master"), 2)[0]
    assert before is None
    assert after is not None and NORM in after


def wrapped(number: int) -> int:
    """As int64."""
    return (number + 2**63) % 2**64 - 2**63


def plain_digest(bits: list[int], chunk: int) -> int:
    golden, mix = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
    total = 0
    for first in range(0, len(bits), chunk):
        part = 0
        for i, value in enumerate(bits[first : first + chunk]):
            x = wrapped((i + 1) * golden)
            part += value * (wrapped((x ^ (x >> 29)) * mix) | 1)
        total = total * golden + part
    return wrapped(total)


@pytest.mark.parametrize("elements", [1, 7, 8, 8 * 5 + 3])
def test_digest_is_that_of_unbounded_integers(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", 8)
    values = torch.randn(elements, generator=torch.Generator().manual_seed(elements)).bfloat16()
    raw = [struct.pack(">f", value) for value in values.tolist()]  # a bfloat16 is the first half of a float
    for tensor, width in [(values.float(), 4), (values, 2)]:
        bits = [int.from_bytes(each[:width], signed=True) for each in raw]
        assert digest_of(tensor) == plain_digest(bits, 8)


def digest_of(tensor: torch.Tensor) -> int:
    return int(replicas.digest(tensor, replicas.position_multipliers(tensor.device)))


@given(st.data())
@settings(deadline=None)
def test_one_bit_or_two_elements_that_change_places_change_the_digest(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "_CHUNK", 8)
        elements = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=30))
        bits = torch.tensor(elements, dtype=torch.int32)
        before = digest_of(bits.view(torch.float32))
        i, j = (data.draw(st.integers(0, len(elements) - 1)) for _ in range(2))
        if elements[i] != elements[j]:
            bits[[i, j]] = bits[[j, i]]
            assert digest_of(bits.view(torch.float32)) != before
            bits[[i, j]] = bits[[j, i]]
        for flipped in [1 << bit for bit in range(31)] + [-(2**31)]:
            bits[i] ^= flipped
            assert digest_of(bits.view(torch.float32)) != before
            bits[i] ^= flipped


def test_a_whole_tensor_of_ones_is_not_one_of_zeros() -> None:
    """Sizes and floats are powers of two: multipliers 1, 3, 5 … would add up to a multiple of 2⁶⁴."""
    ones = torch.ones(1 << 21)
    assert len({digest_of(ones), digest_of(ones * 0), digest_of(ones * 2), digest_of(-ones)}) == 4


@pytest.mark.parametrize(("interval", "checked"), [(2, [2, 4, 6, 8, 10]), (4, [4, 8]), (None, [])])
def test_the_loop_checks_every_so_many_steps(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, interval: int | None, checked: list[int]
) -> None:
    trainer, events = trainer_of_ten_steps(make_config, monkeypatch, interval)
    trainer.train()
    assert [step for what, step in events if what == "check"] == checked


def test_a_damaged_step_is_not_saved(make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, events = trainer_of_ten_steps(make_config, monkeypatch, 2, damaged_at=4)
    with pytest.raises(UserError, match="damaged"):
        trainer.train()
    assert events == [("check", 2), ("save", 2), ("check", 4)]


def trainer_of_ten_steps(
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    interval: int | None,
    damaged_at: int | None = None,
) -> tuple[Trainer, list[tuple[str, int]]]:
    """The loop over an engine that does nothing, and the list of what it will have called, with the step."""
    path = make_config(checkpoint__interval_steps=2, training__replica_check_interval_steps=interval)
    config = load_config(path, [])
    events: list[tuple[str, int]] = []

    def train_step(batches: list[Any], rate: float, accepts: Accepts, check_as: int | None) -> Step:
        if check_as is not None:
            events.append(("check", check_as))
        if check_as is not None and check_as == damaged_at:
            raise UserError("damaged")
        return Step(Losses.none(), 1.0, applied=True)

    def save(progress: Progress) -> None:
        events.append(("save", progress.step))

    def batches(first: int, last: int) -> Iterator[GlobalBatch]:
        size = config.training.global_batch_size
        for sample in range(first, last, size):
            yield GlobalBatch(sample, sample + size, [])

    topology = SimpleNamespace(device=torch.device("cpu"), failing_together=nullcontext)
    engine = SimpleNamespace(train_step=train_step, topology=topology)
    monkeypatch.setattr(loop, "any_rank", lambda *flags, device: list(flags))
    monkeypatch.setattr(loop, "gather", lambda values, device: [list(values)])
    trainer = Trainer(
        config=config,
        engine=engine,  # type: ignore[arg-type]
        loader=SimpleNamespace(iterate=batches),  # type: ignore[arg-type]
        timeline=Timeline(config),
        validation=Validation([], np.empty(0), {}),
        samples=SimpleNamespace(),  # type: ignore[arg-type]
        run=SimpleNamespace(checkpoints=config.run_dir),  # type: ignore[arg-type]
        writer=SimpleNamespace(start=save, save=save, settle=lambda: None, pending=False, writing=False),  # type: ignore[arg-type]
        log=None,
        journal=None,
        stop=SimpleNamespace(received=False),  # type: ignore[arg-type]
        watchdog=SimpleNamespace(beat=lambda doing: None),  # type: ignore[arg-type]
        progress=Progress(step=0, consumed_samples=0),
    )
    return trainer, events
