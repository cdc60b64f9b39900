import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_train.config.load import load_config
from llada_train.config.schema import Config
from llada_train.data.batch import Batch
from llada_train.data.loader import TrainingLoader, collate, validation
from llada_train.data.place import Place
from llada_train.data.rows import PretrainingData
from llada_train.data.timeline import Timeline
from llada_train.data.training_data import Row, Sample
from llada_train.objective.forward_process import training_noise

N, S, MASK_ID, PADDING_ID = 16, 32, 98, 99
LAYOUTS = [(dp, micro) for dp in (1, 2, 4) for micro in (1, 2, 4)]


def row(length: int, masked: list[int], **values: Any) -> Row:
    """One sample of tokens 10, 11, …, masked at the given positions."""
    return (sample(length, masked, **values),)


def sample(length: int, masked: list[int], **values: Any) -> Sample:
    mask = np.isin(np.arange(length), masked)
    return Sample(
        **{
            "sample_index": 0,
            "mask_probability": 0.5,
            "loss_weight": 1.0,
            "document_lengths": (length,),
            **values,
        },
        tokens=np.arange(10, 10 + length),
        mask=mask,
    )


def contents(batches: list[Batch]) -> Counter[tuple[Any, ...]]:
    """Every row that is not filling: (sample, p, inputs, ((position, target, weight), …)), to the bit."""
    found: Counter[tuple[Any, ...]] = Counter()
    for batch in batches:
        rows, columns = batch.masked_positions // S, batch.masked_positions % S
        for b in range(len(batch.sample_index)):
            here = (rows == b) & (batch.loss_weight > 0)
            masked = zip(*(x[here].tolist() for x in (columns, batch.targets, batch.loss_weight)), strict=True)
            if batch.sample_index[b] >= 0:
                sample, p = int(batch.sample_index[b]), float(batch.t[b])
                found[sample, p, tuple(batch.input_ids[b].tolist()), tuple(masked)] += 1
    return found


def equal(a: Batch, b: Batch) -> bool:
    ours, others = ([*(getattr(batch, f.name) for f in fields(Batch) if f.name != "segments")] for batch in (a, b))
    lengths = [None if batch.segments is None else batch.segments.lengths for batch in (a, b)]
    return all(map(torch.equal, ours, others)) and lengths[0] == lengths[1]


@pytest.fixture
def config_of(make_config: Callable[..., Path]) -> Callable[..., Config]:
    return lambda **overrides: load_config(make_config(**overrides))


@pytest.fixture
def loader(config_of: Callable[..., Config]) -> TrainingLoader:
    config = config_of(data__prefetch=2)
    return TrainingLoader(PretrainingData(config), config)


def test_collate_by_hand() -> None:
    rows = [
        row(4, [0, 2], sample_index=7, mask_probability=0.25, loss_weight=0.125),
        row(2, [1], sample_index=8, mask_probability=0.75, loss_weight=0.5),
    ]
    batch = collate(rows, 4, MASK_ID, PADDING_ID)
    assert batch.input_ids.tolist() == [[98, 11, 98, 13], [10, 98, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.segments is not None
    for cu_seqlens in (batch.segments.cu_seqlens_q, batch.segments.cu_seqlens_kv):
        assert cu_seqlens.tolist() == [0, 4, 6, 8]
        assert cu_seqlens.dtype == torch.int32
    assert batch.masked_positions.tolist() == [0, 2, 5] + [0] * 253
    assert batch.targets.tolist() == [10, 12, 11] + [0] * 253
    assert batch.loss_weight.tolist() == [0.125, 0.125, 0.5] + [0] * 253
    assert batch.loss_weight.dtype == batch.t.dtype == torch.float32
    assert batch.sample_index.tolist() == [7, 8]
    assert batch.t.tolist() == [0.25, 0.75]


def test_collate_of_half_the_columns_by_hand() -> None:
    """Row 1 ends before the second half: its padding is all that there is of it, and its tokens' segment is empty."""
    rows = [row(4, [0, 2], loss_weight=0.125), row(1, [0], loss_weight=0.5), row(3, [1, 2], loss_weight=0.25)]
    batch = collate(rows, 4, MASK_ID, PADDING_ID, Place(context_parallel_rank=1, context_parallel_size=2))
    assert batch.input_ids.tolist() == [[98, 13], [99, 99], [98, 99]]
    assert batch.position_ids.tolist() == [[2, 3], [1, 2], [2, 0]]
    assert batch.masked_positions.tolist() == [0, 4] + [0] * 254
    assert batch.targets.tolist() == [12, 12] + [0] * 254
    assert batch.loss_weight.tolist() == [0.125, 0.25] + [0] * 254
    assert batch.segments is not None
    assert batch.segments.lengths == ((2, 4), (0, 1), (2, 3), (1, 3), (1, 1))
    assert batch.segments.cu_seqlens_kv.tolist() == [0, 4, 5, 8, 11, 12]
    assert batch.segments.cu_seqlens_q.tolist() == [0, 2, 2, 4, 5, 6]
    assert batch.segments.cu_seqlens_q.dtype == batch.segments.cu_seqlens_kv.dtype == torch.int32


def test_full_rows_need_no_segments() -> None:
    for place in (Place(), Place(context_parallel_rank=1, context_parallel_size=2)):
        batch = collate([row(4, [0]), row(4, [])], 4, MASK_ID, PADDING_ID, place)
        assert batch.segments is None


@st.composite
def rows_and_slices(draw: st.DrawFn) -> tuple[list[Row], int]:
    """Rows of 24 columns and the number of slices.

    Some are not filled, or hold several samples, masked anywhere, of different weights and documents.
    """
    lengths = st.sampled_from([24, 24, *range(1, 24)])
    rows: list[Row] = []
    for length in draw(st.lists(lengths, min_size=1, max_size=4)):
        samples: Row = ()
        for of_sample in np.diff(sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))})).tolist():
            masked = draw(st.lists(st.integers(0, of_sample - 1), unique=True))
            borders = sorted({0, of_sample, *draw(st.lists(st.integers(0, of_sample), max_size=3))})
            e = sum(map(len, rows)) + len(samples)
            values = {"sample_index": 40 + e, "loss_weight": 2.0**-e, "mask_probability": 2.0 ** -(e + 1)}
            documents = tuple(np.diff(borders).tolist())
            samples += (sample(of_sample, masked, document_lengths=documents, **values),)
        rows.append(samples)
    return rows, draw(st.sampled_from([1, 2, 3, 4, 6, 24]))


def length_of(part: Sample) -> int:
    return len(part.tokens)


def documents_of(one: Row) -> list[int]:
    return list(chain.from_iterable(part.document_lengths for part in one))


def slices_of(rows: list[Row], sequence_length: int, count: int) -> list[Batch]:
    """The batches of the `count` ranks that share the rows' columns."""
    places = [Place(context_parallel_rank=rank, context_parallel_size=count) for rank in range(count)]
    return [collate(rows, sequence_length, MASK_ID, PADDING_ID, place) for place in places]


def masked_tokens(slices: list[Batch]) -> list[tuple[int, int, int, float]]:
    """(row, column of the whole row, target, weight) of each masked token, in order."""
    found, first = [], 0
    for batch in slices:
        real, width = batch.loss_weight > 0, batch.input_ids.shape[1]
        rows, columns = batch.masked_positions // width, batch.masked_positions % width + first
        first += width
        found += zip(*(x[real].tolist() for x in (rows, columns, batch.targets, batch.loss_weight)), strict=True)
    return sorted(found)


@settings(deadline=None)
@given(rows_and_slices())
def test_slices_of_the_columns_put_together_are_the_batch(drawn: tuple[list[Row], int]) -> None:
    rows, count = drawn
    slices = slices_of(rows, 24, count)
    ids, positions = (
        torch.cat([getattr(batch, name) for batch in slices], dim=1) for name in ("input_ids", "position_ids")
    )
    pieces = [[*documents_of(one), 24 - sum(documents_of(one))] for one in rows]
    assert positions.tolist() == [list(chain(*map(range, lengths))) for lengths in pieces]
    for one, found in zip(rows, ids.tolist(), strict=True):
        tokens = chain.from_iterable(zip(part.tokens, part.mask, strict=True) for part in one)
        noised = [MASK_ID if masked else token for token, masked in tokens]
        assert found == noised + [PADDING_ID] * (24 - len(noised))
    assert masked_tokens(slices) == [
        (b, first + place, part.tokens[place], part.loss_weight)
        for b, one in enumerate(rows)
        for first, part in zip(accumulate(map(length_of, one), initial=0), one, strict=False)
        for place in np.flatnonzero(part.mask)
    ]
    for batch in slices:
        assert batch.input_ids.shape == (len(rows), 24 // count)
        assert batch.sample_index.tolist() == [part.sample_index for one in rows for part in one]
        assert batch.t.tolist() == [part.mask_probability for one in rows for part in one]
        # Each sample has a weight of its own.
        real = batch.loss_weight > 0
        assert torch.equal(batch.loss_weight[real], 2.0 ** -batch.masked_samples[real].float())
        of_masked = (batch.masked_positions, batch.targets, batch.loss_weight, batch.masked_samples)
        assert all(x.shape == (256,) for x in of_masked)


def segment(cu_seqlens: torch.Tensor, token: int) -> int:
    """The number of the segment that holds a flattened token: attention's own reading of the borders."""
    (found,) = (i for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())) if a <= token < b)
    return found


@settings(deadline=None)
@given(rows_and_slices())
def test_a_token_asks_in_the_segment_where_its_row_is(drawn: tuple[list[Row], int]) -> None:
    """Through both borders a slice's token is in the same segment, and only those of its document, or padding, are."""
    rows, count = drawn
    S = 24 // count
    members: dict[int, set[tuple[int, int]]] = {}
    for rank, batch in enumerate(slices_of(rows, 24, count)):
        if batch.segments is None:
            assert all(documents_of(one) == [24] for one in rows)
            continue
        cu_q, cu_kv = batch.segments.cu_seqlens_q, batch.segments.cu_seqlens_kv
        assert batch.segments.lengths == tuple(zip(cu_q.diff().tolist(), cu_kv.diff().tolist(), strict=True))
        assert (int(cu_q[-1]), int(cu_kv[-1])) == (len(rows) * S, len(rows) * 24)
        for token in range(len(rows) * S):
            b, column = token // S, rank * S + token % S
            number = segment(cu_q, token)
            assert number == segment(cu_kv, b * 24 + column)
            document = bisect_right(list(accumulate(documents_of(rows[b]))), column)
            members.setdefault(number, set()).add((b, document))
    assert all(len(of) == 1 for of in members.values())
    if members:
        every = [of for found in members.values() for of in found]
        assert len(set(every)) == len(every)
        assert len(every) == sum(len(documents_of(one)) + (sum(documents_of(one)) < 24) for one in rows)


@pytest.mark.parametrize(("masked", "padded"), [(0, 256), (1, 256), (256, 256), (257, 512)])
def test_masked_positions_are_padded_to_a_multiple_of_256(masked: int, padded: int) -> None:
    batch = collate([row(300, list(range(masked)))], 300, MASK_ID, PADDING_ID)
    assert batch.masked_positions.shape == batch.targets.shape == batch.loss_weight.shape == (padded,)
    assert int((batch.loss_weight > 0).sum()) == masked


@pytest.mark.parametrize(("normalization", "t_sampling"), [("sequence", "uniform"), ("token", "stratified")])
def test_every_layout_sees_the_same_global_batch(
    config_of: Callable[..., Config], normalization: str, t_sampling: str
) -> None:
    seen = []
    for dp, micro in LAYOUTS:
        config = config_of(
            objective={"loss_normalization": normalization, "t_sampling": t_sampling, "random_length_probability": 0.5},
            training__micro_batch_size=micro,
        )
        data = PretrainingData(config)
        ranks = [TrainingLoader(data, config, Place(rank, dp)).global_batch(3 * N) for rank in range(dp)]
        assert [len(batches) for batches in ranks] == [N // dp // micro] * dp
        assert {batch.input_ids.shape for batches in ranks for batch in batches} == {(micro, S)}
        seen.append(contents(list(chain(*ranks))))
    assert sorted(sample for sample, *_ in seen[0]) == list(range(3 * N, 4 * N))
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_weights_are_normalised_over_the_global_batch(config_of: Callable[..., Config], normalization: str) -> None:
    """Rank 1 of 2, from the batches alone: 1/(p·L_b·N), or 1/(p·ΣL) with the sum over both ranks."""
    config = config_of(objective={"loss_normalization": normalization, "random_length_probability": 0.5})
    data = PretrainingData(config)
    ranks = [TrainingLoader(data, config, Place(rank, 2)).global_batch(0) for rank in range(2)]

    def length(batch: Batch, b: int) -> int:
        """Where the row's first segment ends."""
        if batch.segments is None:
            return S
        borders = batch.segments.cu_seqlens_kv
        return int(borders[borders > b * S].min()) - b * S

    total = sum(length(batch, b) for batch in chain(*ranks) for b in range(2))
    assert total < N * S
    for batch in ranks[1]:
        for position, weight in zip(batch.masked_positions.tolist(), batch.loss_weight.tolist(), strict=True):
            b = position // S
            tokens = total if normalization == "token" else N * length(batch, b)
            assert weight == 0 or weight == pytest.approx(1 / (float(batch.t[b]) * tokens))


@pytest.mark.parametrize("read", ["training", "validation"])
def test_context_parallel_ranks_read_the_columns_of_the_same_rows(config_of: Callable[..., Config], read: str) -> None:
    config = config_of(objective={"random_length_probability": 0.5}, validation__sequences=7)
    data = PretrainingData(config)

    def batches(place: Place) -> list[Batch]:
        if read == "validation":
            return validation(data, config, place).batches
        return TrainingLoader(data, config, place).global_batch(2 * N)

    for dp_rank in range(2):
        whole = batches(Place(dp_rank, 2))
        for count in (2, 4):
            ranks = [batches(Place(dp_rank, 2, rank, count)) for rank in range(count)]
            for one, slices in zip(whole, zip(*ranks, strict=True), strict=True):
                assert torch.equal(torch.cat([batch.input_ids for batch in slices], dim=1), one.input_ids)
                assert masked_tokens(list(slices)) == masked_tokens([one])
                assert all(torch.equal(batch.sample_index, one.sample_index) for batch in slices)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_a_rank_reads_its_rows_of_the_global_batch(config_of: Callable[..., Config], dp: int) -> None:
    config = config_of()
    data = PretrainingData(config)
    read: list[int] = []
    for rank in range(dp):
        for cp_rank in range(2):
            loader = TrainingLoader(data, config, Place(rank, dp, cp_rank, 2))
            samples = torch.cat([batch.sample_index for batch in loader.global_batch(3 * N)]).tolist()
            own, missing = Place(rank, dp, cp_rank, 2).rows(N, config)
            assert (missing, [3 * N + row for row in own]) == (0, samples)
        read += samples
    assert read == list(range(3 * N, 4 * N))


def test_inputs_are_the_clean_rows_but_for_the_masks(config_of: Callable[..., Config]) -> None:
    config = config_of(objective={"random_length_probability": 0})
    data = PretrainingData(config)
    for batch in TrainingLoader(data, config).global_batch(N):
        clean = torch.from_numpy(data.training_rows(batch.sample_index.numpy()))
        masked = batch.input_ids == data.tokenizer.mask_id
        real = batch.masked_positions[batch.loss_weight > 0]
        assert torch.equal(masked.flatten().nonzero().squeeze(1), real)
        restored = batch.input_ids.flatten().scatter(0, real, batch.targets[batch.loss_weight > 0]).view(-1, S)
        assert torch.equal(restored, clean)


def test_a_row_gets_other_noise_in_the_next_epoch(config_of: Callable[..., Config]) -> None:
    config = config_of(objective={"random_length_probability": 0})
    data = PretrainingData(config)
    loader = TrainingLoader(data, config)
    epoch = data.blocks_per_corpus[0]  # of one row each
    noised: dict[bytes, list[tuple[float, bytes]]] = {}
    for first in range(0, 2 * epoch, N):
        for batch in loader.global_batch(first):
            for sample, t, ids in zip(batch.sample_index, batch.t, batch.input_ids, strict=True):
                clean = data.training_rows(sample.numpy()[None]).tobytes()
                noised.setdefault(clean, []).append((float(t), ids.numpy().tobytes()))
    twice = [draws for draws in noised.values() if len(draws) == 2]
    assert len(twice) >= epoch - N
    assert all(a[0] != b[0] for a, b in twice)


def test_resuming_goes_on_as_if_nothing_had_happened(loader: TrainingLoader) -> None:
    whole = list(loader.iterate(0, 6 * N))
    resumed = list(loader.iterate(2 * N, 6 * N))
    assert (len(whole), len(resumed)) == (6, 4)
    for a, b in zip(whole[2:], resumed, strict=True):
        assert (a.first_sample, a.end_sample) == (b.first_sample, b.end_sample)
        assert all(equal(x, y) for x, y in zip(a.batches, b.batches, strict=True))
    assert whole[3].batches[0].sample_index.tolist() == [3 * N, 3 * N + 1]
    assert list(loader.iterate(6 * N, 6 * N)) == []


def test_passed_over_samples_are_left_out_and_nothing_else(
    loader: TrainingLoader, config_of: Callable[..., Config]
) -> None:
    timeline = Timeline(config_of()).passing_over(N, 3 * N).passing_over(4 * N, 5 * N)
    found = list(loader.at(timeline).iterate(0, 6 * N))
    assert [(batch.first_sample, batch.end_sample) for batch in found] == [(0, N), (3 * N, 4 * N), (5 * N, 6 * N)]
    for batch in found:
        same = loader.global_batch(batch.first_sample)
        assert all(equal(x, y) for x, y in zip(batch.batches, same, strict=True))


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_are_made_ahead_off_the_training_thread(
    loader: TrainingLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    ahead = threading.Event()

    def global_batch(first: int) -> list[Batch]:
        assert threading.current_thread() is not threading.main_thread()
        made.append(first)
        if first == 2 * N:
            ahead.set()
        return []

    monkeypatch.setattr(loader, "global_batch", global_batch)
    with closing(loader.iterate(0, 100 * N)) as batches:
        next(batches)
        assert ahead.wait(10)  # two batches beyond the one in hand, without being asked
        assert loader_threads()
    assert made == [0, N, 2 * N]
    assert not loader_threads()


def test_errors_of_the_thread_surface_at_their_batch(loader: TrainingLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def global_batch(first: int) -> list[Batch]:
        if first == 2 * N:
            raise OSError("disk is gone")
        return []

    monkeypatch.setattr(loader, "global_batch", global_batch)
    batches = loader.iterate(0, 100 * N)
    assert len(list(islice(batches, 2))) == 2
    with pytest.raises(OSError, match="disk is gone"):
        next(batches)
    assert not loader_threads()


def test_validation_is_the_same_in_every_layout_and_every_time(config_of: Callable[..., Config]) -> None:
    seen = []
    for dp, micro in [*LAYOUTS, (1, 1)]:
        config = config_of(validation__sequences=7, training__micro_batch_size=micro)
        data = PretrainingData(config)
        ranks = [validation(data, config, Place(rank, dp)).batches for rank in range(dp)]
        assert len({len(batches) for batches in ranks}) == 1
        assert {batch.input_ids.shape for batches in ranks for batch in batches} == {(micro, S)}
        assert all(batch.segments is None for batches in ranks for batch in batches)
        batches = list(chain(*ranks))
        fillers = torch.cat([batch.sample_index for batch in batches]) < 0
        assert int(fillers.sum()) == -7 % (dp * micro)
        seen.append(contents(batches))
        assert seen[-1].total() == 7
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("sequences", [1, 7, 12])
@pytest.mark.parametrize(("pipeline", "chunks", "multiple"), [(2, 2, 2), (3, 2, 3), (3, 1, 1)])
def test_validation_fills_up_the_groups_of_the_interleaved_schedule(
    config_of: Callable[..., Config], pipeline: int, chunks: int, multiple: int, sequences: int
) -> None:
    """The least number of micro-batches that the schedule takes, the same on each rank; nothing is lost."""
    config = config_of(
        model__num_layers=6,
        parallel={"pipeline_parallel": pipeline, "virtual_pipeline_parallel": chunks},
        validation__sequences=sequences,
    )
    data = PretrainingData(config)
    for dp in (1, 2):
        ranks = [validation(data, config, Place(rank, dp)).batches for rank in range(dp)]
        (count,) = {len(batches) for batches in ranks}
        micro_batches = -(-sequences // (dp * config.training.micro_batch_size))
        assert count % multiple == 0
        assert micro_batches <= count < micro_batches + multiple
        samples = torch.cat([batch.sample_index for batches in ranks for batch in batches])
        assert sorted(samples[samples >= 0].tolist()) == list(range(sequences))


def test_validation_of_a_constant_nll_is_that_constant(config_of: Callable[..., Config]) -> None:
    """t is on a grid and nothing is cut: Σ weights is 1 within the masks' own deviation, Σ (1−p)/(p·S·M²)."""
    config = config_of(validation__sequences=50)
    data = PretrainingData(config)
    batches = validation(data, config).batches
    rows = len(data.validation_rows)
    p = torch.cat([batch.t for batch in batches])
    p = p[torch.cat([batch.sample_index for batch in batches]) >= 0].double()
    assert torch.allclose(p.sort().values, (torch.arange(rows) + 0.5).double() / rows * 0.999 + 1e-3)
    deviation = float(((1 - p) / p).sum() / (S * rows**2)) ** 0.5
    assert abs(float(sum(batch.loss_weight.sum() for batch in batches)) - 1) < 3 * deviation


def test_the_bound_of_each_corpus_and_of_each_range_of_t(
    config_of: Callable[..., Config], tiny_data: Path, tmp_path: Path
) -> None:
    """Each corpus has t on a grid of its own, and its own mean of the rows' bounds."""
    corpora = [{"path": str(tiny_data / "corpus"), "validation_documents": 20}]
    for name, held_out in (("a/web", 30), ("b/web", 0), ("c/code", 10)):
        (tmp_path / name).parent.mkdir()
        path = tmp_path / name
        for suffix in (".bin", ".idx", ".json"):
            path.with_suffix(suffix).write_bytes((tiny_data / f"corpus{suffix}").read_bytes())
        corpora.append({"path": str(path), "validation_documents": held_out})
    config = config_of(data__corpora=corpora, validation__sequences=31)
    found = validation(PretrainingData(config), config)
    assert list(found.counts)[1:] == ["a/web", "c/code"]
    assert list(found.counts.values()) == [10, 11, 10]
    bounds = np.concatenate([np.full(n, c) for c, n in enumerate(found.counts.values())]).astype(float)
    assert list(found.by_corpus(bounds).values()) == [0.0, 1.0, 2.0]
    for part in np.split(found.t, [10, 21]):
        u = (part - 1e-3) / (1 - 1e-3)
        assert np.allclose(np.sort(u), (np.arange(len(u)) + 0.5) / len(u))
    assert found.by_t(found.t, 4) == pytest.approx([found.t[(found.t * 4).astype(int) == b].mean() for b in range(4)])
    assert found.by_t(found.t, 400)[0] is None


@pytest.mark.parametrize("rows", ["packed", "document_attention"])
def test_documents_of_a_row_end_in_eos(config_of: Callable[..., Config], rows: str) -> None:
    config = config_of(data__rows=rows, objective={"random_length_probability": 0.5})
    data = PretrainingData(config)
    batches = TrainingLoader(data, config).global_batch(0)
    noise = training_noise(config.seed, 0, N, S, config.objective)
    for batch, first in zip(batches, range(0, N, 2), strict=True):
        expected: list[int] = []
        for b in (first, first + 1):
            length = int(noise.lengths[b])
            tokens = data.training_rows([b])[0][:length].tolist()
            ends = [i + 1 for i, token in enumerate(tokens) if token == data.tokenizer.eos_id]
            inner = [] if rows == "packed" else ends
            expected += [(b - first) * S + place for place in sorted({0, *inner, length})]
        borders = sorted({*expected, 2 * S})
        found = [0, S, 2 * S] if batch.segments is None else batch.segments.cu_seqlens_kv.tolist()
        assert found == borders


def test_without_held_out_documents_there_is_no_validation(config_of: Callable[..., Config], tiny_data: Path) -> None:
    config = config_of(data__corpora=[{"path": str(tiny_data / "corpus")}])
    assert validation(PretrainingData(config), config).batches == []
