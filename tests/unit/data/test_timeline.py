"""The phases of a run against a walk step by step, and what its samples read against a walk along each corpus."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_train.config.schema import Config
from llada_train.data.order import Order
from llada_train.data.timeline import Phase, Timeline

TREE: dict[str, Any] = {
    "run_dir": "unread",
    "model": {
        "num_layers": 1,
        "hidden_size": 8,
        "num_heads": 1,
        "num_kv_heads": 1,
        "ffn_hidden_size": 8,
        "vocab_size": 8,
    },
    "training": {"micro_batch_size": 1},
}
PATHS = ["a", "b", "c"]


def config_of(
    length: int,
    batch_size: int,
    until: int,
    schedule: list[dict[str, Any]],
    weights: tuple[float, ...] = (1.0,),
    block_length: int | None = None,
) -> Config:
    corpora = [{"path": path, "weight": weight} for path, weight in zip(PATHS, weights, strict=False)]
    data = {"tokenizer": "t", "sequence_length": length, "corpora": corpora, "block_length": block_length}
    return Config.model_validate(
        TREE
        | {
            "data": data,
            "training": {"micro_batch_size": 1, "global_batch_size": batch_size},
            "optimizer": {"learning_rate": [{"until_tokens": until, "end": 0}]},
            "schedule": schedule,
        }
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Runs of up to 400 tokens with up to five changes; blocks of 12 tokens, three corpora."""
    lengths, batch_sizes = st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 7)
    weight = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    times = sorted(draw(st.sets(st.integers(1, 450), max_size=5)))
    schedule: list[dict[str, Any]] = []
    weights = dict(zip(PATHS, draw(st.tuples(weight, weight, weight).filter(any)), strict=True))
    config = config_of(
        draw(lengths), draw(batch_sizes), draw(st.integers(1, 400)), [], tuple(weights.values()), block_length=12
    )
    for time in times:
        kinds = draw(st.sets(st.sampled_from(["global_batch_size", "sequence_length", "weights"]), min_size=1))
        changed = draw(st.dictionaries(st.sampled_from(PATHS), weight, min_size=1))
        if not any((weights | changed).values()):
            changed = {"a": 1.0}
        change = {"global_batch_size": draw(batch_sizes), "sequence_length": draw(lengths), "weights": changed}
        weights |= changed if "weights" in kinds else {}
        schedule.append({"from_tokens": time, **{key: change[key] for key in kinds}})
    return Config.model_validate(config.model_dump() | {"schedule": schedule})


def values(config: Config, token: int) -> tuple[int, int, tuple[float, ...]]:
    """(length, batch size, weights) that the config asks for at so many tokens."""
    length, batch_size = config.data.sequence_length, config.training.global_batch_size
    weights = {corpus.path: corpus.weight for corpus in config.data.corpora}
    for change in config.schedule:
        if change.from_tokens <= token:
            length = change.sequence_length or length
            batch_size = change.global_batch_size or batch_size
            weights.update(change.weights)
    return length, batch_size, tuple(weights.values())


def walk(config: Config) -> list[tuple[int, int, int, int, tuple[float, ...]]]:
    """(first sample, first token, length, batch size, weights) of each step, found step by step."""
    steps, sample, token, now = [], 0, 0, values(config, 0)
    while token < config.optimizer.learning_rate[-1].until_tokens:
        if token % config.block_length == 0:
            now = values(config, token)
        steps.append((sample, token, *now))
        sample, token = sample + now[1], token + now[0] * now[1]
    return steps


def steps_of(timeline: Timeline, first: int = 0) -> list[tuple[int, int, int, int, tuple[float, ...]]]:
    found = []
    for sample in timeline.steps(first, timeline.end_samples):
        phase = timeline.phase(sample)
        found.append(
            (sample, timeline.tokens(sample), phase.sequence_length, phase.global_batch_size, phase.weights),
        )
    return found


@settings(max_examples=100)
@given(configs())
def test_phases_begin_where_a_walk_step_by_step_finds_them(config: Config) -> None:
    timeline = Timeline(config)
    assert steps_of(timeline) == walk(config)
    assert timeline.tokens(timeline.end_samples) >= config.optimizer.learning_rate[-1].until_tokens


def reads(config: Config, timeline: Timeline, sizes: list[int]) -> list[tuple[int, int, int, int]]:
    """(corpus, epoch, block, token of the block) of each token of the run, in order."""
    span = timeline.locate(np.arange(timeline.end_samples))
    place = Order(sizes, timeline.mixtures, config.seed).locate(span.block)
    return [
        (c, e, b, token)
        for c, e, b, offset, length in zip(*(x.tolist() for x in (*place, span.offset, span.length)), strict=True)
        for token in range(offset, offset + length)
    ]


@settings(max_examples=40)
@given(configs(), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_no_token_is_repeated_or_skipped(config: Config, sizes: list[int]) -> None:
    """Each corpus's own tokens are those of whole blocks, each block of an epoch once, in the corpus's own order."""
    tokens = reads(config, Timeline(config), sizes)
    assert len(tokens) == Timeline(config).tokens(Timeline(config).end_samples)
    whole = len(tokens) // 12 * 12
    blocks = [tokens[i : i + 12] for i in range(0, whole, 12)]
    for block in blocks:
        assert [token for *_, token in block] == list(range(12))
        assert len({place[:3] for place in block}) == 1
    assert [token for *_, token in tokens[whole:]] == list(range(len(tokens) - whole))
    for c, size in enumerate(sizes):
        own = [(epoch, block) for (corpus, epoch, block, _), *_ in blocks if corpus == c]
        # The order that the corpus has when it is alone, cut off somewhere.
        alone = Order([1] * c + [size], [(0, [0.0] * c + [1.0])], config.seed).locate(np.arange(len(own)))
        assert own == list(zip(alone.epoch.tolist(), alone.block.tolist(), strict=True))


@settings(max_examples=40)
@given(configs(), st.data())
def test_a_run_that_goes_on_is_the_run_that_never_stopped(config: Config, data: st.DataObject) -> None:
    whole = Timeline(config)
    starts = list(whole.steps(0, whole.end_samples))
    resumed, consumed = whole, 0
    for stop in sorted(data.draw(st.sets(st.sampled_from(starts), min_size=1, max_size=3))):
        recorded = [Phase.model_validate_json(phase.model_dump_json()) for phase in resumed.begun(stop)]
        assert all(phase.first_sample < stop for phase in recorded)
        resumed, consumed = Timeline(config, recorded, stop), stop
    assert resumed.phases == whole.phases
    assert steps_of(resumed, consumed) == steps_of(whole, consumed)


@settings(max_examples=40)
@given(configs(), configs(), st.data())
def test_accepted_changes_hold_from_the_next_boundary_and_leave_the_past(
    before: Config, after: Config, data: st.DataObject
) -> None:
    """Whatever the new config says of the past; what is in force changes at the first boundary, not later or sooner."""
    old = Timeline(before)
    consumed = data.draw(st.sampled_from([*list(old.steps(0, old.end_samples))[1:], old.end_samples]))
    new = Timeline(after, old.begun(consumed), consumed)
    assert new.begun(consumed) == old.begun(consumed)
    for first, second in zip(new.phases, new.phases[1:], strict=False):
        assert (second.first_token - first.first_token) % first.tokens_per_step == 0
        assert second.first_token % 12 == 0
    boundary, current = old.tokens(consumed), (old.begun(consumed) or new.phases)[-1]
    while boundary % 12 or (boundary - current.first_token) % current.tokens_per_step:
        boundary += 1
    phases = [phase for phase in new.phases if phase.first_token <= boundary]
    assert (phases[-1].sequence_length, phases[-1].global_batch_size, phases[-1].weights) == values(after, boundary)
    assert tuple(phases[:-1]) in (old.begun(consumed), old.begun(consumed)[:-1])
    tokens = reads(after, new, [5, 5, 5])
    assert [token for *_, token in tokens] == [i % 12 for i in range(len(tokens))]


def check_the_way_back(timeline: Timeline) -> None:
    """From a step to its samples and back; from the tokens of a block to the samples that read them."""
    starts = list(timeline.steps(0, timeline.end_samples))
    assert [timeline.first_sample(step) for step in range(1, len(starts) + 1)] == starts
    for step in (0, len(starts) + 1):
        with pytest.raises(IndexError, match=f"the run has the steps 1 to {len(starts)}"):
            timeline.first_sample(step)
    steps = {
        sample: number
        for number, first in enumerate(starts, start=1)
        for sample in range(first, first + timeline.phase(first).global_batch_size)
    }
    samples = range(timeline.end_samples + 3)
    assert [timeline.step(sample) for sample in samples] == [steps.get(sample) for sample in samples]
    where = timeline.locate(list(steps))
    for sample, block, offset, length in zip(steps, *(values.tolist() for values in where), strict=True):
        assert timeline.samples_of(block, offset, offset + length) == [sample]
        assert sample in timeline.samples_of(block, max(0, offset - 1), offset + 1)


@settings(max_examples=60)
@given(configs(), configs(), st.data())
def test_passing_over_whole_steps_moves_no_other(config: Config, later: Config, data: st.DataObject) -> None:
    """Nor do a restart and changes that are still to come, before the samples or within them."""
    timeline, passed = Timeline(config), set[int]()
    for _ in range(data.draw(st.integers(1, 2))):
        starts = [*timeline.steps(0, timeline.end_samples), timeline.end_samples]
        first, end = sorted(data.draw(st.tuples(*[st.sampled_from(starts[1:])] * 2)))
        if first == end or any(first <= sample < end for sample in passed):
            continue
        old, timeline = steps_of(timeline), timeline.passing_over(first, end)
        passed.update(range(first, end))
        before, after = ([step for step in old if step[0] < first], [step for step in old if step[0] >= end])
        new = steps_of(timeline)
        assert [step for step in new if step[0] < first] == before
        boundary = next((phase.first_sample for phase in timeline.phases if phase.first_sample > end), 10**9)
        same = [step for step in new if end <= step[0] < boundary]
        assert same == after[: len(same)]
    check_the_way_back(timeline)

    for consumed in [sample for sample in timeline.steps(0, timeline.end_samples) if sample > 0]:
        recorded = timeline.begun(consumed)
        again = Timeline(config, recorded, consumed)
        assert steps_of(again, consumed) == steps_of(timeline, consumed)
        changed = Timeline(later, recorded, consumed)
        found = steps_of(changed, consumed)
        trained = {sample for first, _, _, size, _ in found for sample in range(first, first + size)}
        assert not passed & trained
        for step, following in pairwise(found):
            assert following[0] == changed.next_step(step[0] + step[3])


def test_by_hand() -> None:
    """Steps of 2 × 4 tokens, then of 3 × 4, then of 1 × 8; blocks of 8."""
    schedule = [
        {"from_tokens": 9, "global_batch_size": 3},
        {"from_tokens": 20, "sequence_length": 8, "global_batch_size": 1, "weights": {"b": 0.5}},
    ]
    timeline = Timeline(config_of(4, 2, 57, schedule, (1.0, 0.0)))
    assert [(p.first_sample, p.first_token, p.global_batch_size, p.sequence_length) for p in timeline.phases] == [
        (0, 0, 2, 4),
        (4, 16, 3, 4),  # 9 is within the second step
        (10, 40, 1, 8),  # at 28 a step ends, but not a block
    ]
    assert list(timeline.steps(0, timeline.end_samples)) == [0, 2, 4, 7, 10, 11, 12]
    assert (timeline.end_samples, timeline.tokens(timeline.end_samples)) == (13, 64)
    assert [part.tolist() for part in timeline.locate(np.arange(3, 12))] == [
        [1, 2, 2, 3, 3, 4, 4, 5, 6],
        [4, 0, 4, 0, 4, 0, 4, 0, 0],
        [4] * 7 + [8] * 2,
    ]
    assert timeline.mixtures == [(0, (1.0, 0.0)), (5, (1.0, 0.5))]  # of the batch size the mixture knows nothing
    assert [len(timeline.begun(samples)) for samples in (0, 1, 4, 5, 10, 11)] == [0, 1, 1, 2, 2, 3]


def test_a_batch_ramp_of_a_run_of_ten_trillion_tokens() -> None:
    ramp = [{"from_tokens": int(i * 1e12), "global_batch_size": 1280 + 320 * i} for i in range(1, 9)]
    timeline = Timeline(config_of(4096, 1280, 10**13, [*ramp, {"from_tokens": int(9e12), "sequence_length": 8192}]))
    assert len(timeline.phases) == 10
    end = timeline.tokens(timeline.end_samples)
    assert 0 <= end - 10**13 < timeline.phases[-1].tokens_per_step
    last = timeline.locate(timeline.end_samples - 1)
    assert int(last.block) * 8192 + int(last.offset) + int(last.length) == end
    for before, after in zip(timeline.phases, timeline.phases[1:], strict=False):
        border = timeline.locate([after.first_sample - 1, after.first_sample])
        assert (border.block * 8192 + border.offset)[0] + border.length[0] == after.first_token
        assert int(border.block[1]) * 8192 == after.first_token
        assert after.first_token // 10**12 * 10**12 - before.tokens_per_step < after.first_token


@pytest.mark.parametrize(("until", "steps"), [(1, 1), (2048, 1), (2049, 2), (1_000_000, 489)])
def test_a_run_is_rounded_up_to_whole_steps(until: int, steps: int) -> None:
    assert Timeline(config_of(128, 16, until, [])).end_samples == steps * 16


def test_a_recorded_past_knows_nothing_of_corpora_added_since() -> None:
    old = Timeline(config_of(4, 2, 100, [], (1.0,)))
    new = Timeline(config_of(4, 2, 100, [], (1.0, 0.0)), old.begun(6), 6)
    assert new.phases == [old.phases[0].model_copy(update={"weights": (1.0, 0.0)})]
    later = [{"from_tokens": 30, "weights": {"b": 1.0}}]
    new = Timeline(config_of(4, 2, 100, later, (1.0, 0.0)), old.begun(6), 6)
    assert new.mixtures == [(0, (1.0, 0.0)), (8, (1.0, 1.0))]
