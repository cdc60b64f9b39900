"""Shares of the corpora, by weight, tokens or size; what a run reads of each; from a token back to its steps."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.data.corpus import Corpus
from llada_train.data.corpus_writer import CorpusWriter
from llada_train.data.order import Order, permute, unpermute
from llada_train.data.rows import PretrainingData
from llada_train.training.metrics import plan_lines

S = 8
EOS = 1
ROWS = {"a": 400, "b": 100, "c": 25}


@pytest.fixture
def opened(make_config: Callable[..., Path], tmp_path: Path) -> Callable[..., PretrainingData]:
    """`opened(corpus settings by name, key__name=value)`: corpora of 400, 100 and 25 rows; batches of 16 rows of 8."""

    def build(of: dict[str, dict[str, Any]], **overrides: Any) -> PretrainingData:
        corpora = []
        for name, values in of.items():
            with CorpusWriter(tmp_path / name, np.uint16) as writer:
                writer.add_document([*[ord(name)] * (ROWS[name] * S - 1), EOS])
            corpora.append({"path": str(tmp_path / name), **values})
        return PretrainingData(load_config(make_config(data__sequence_length=S, data__corpora=corpora, **overrides)))

    return build


def read_of_each(data: PretrainingData) -> dict[str, int]:
    """Tokens of each corpus in all steps of the run."""
    samples = [
        sample
        for first in data.timeline.steps(0, data.timeline.end_samples)
        for sample in range(first, first + data.timeline.phase(first).global_batch_size)
    ]
    counts = Counter(data.names[stretch.corpus] for stretch in data.training_stretches(samples))
    return {name: counts[name] * S for name in data.names}


@pytest.mark.parametrize(
    ("of", "overrides", "shares"),
    [
        ({"a": {"weight": 3}, "b": {"weight": 1}}, {}, {"a": 0.75, "b": 0.25}),
        ({"a": {}, "b": {}, "c": {}}, {"data__temperature": 1}, {"a": 400 / 525, "b": 100 / 525, "c": 25 / 525}),
        ({"a": {}, "b": {}, "c": {}}, {"data__temperature": 2}, {"a": 20 / 35, "b": 10 / 35, "c": 5 / 35}),
        ({"a": {}, "b": {"weight": 4}}, {"data__temperature": 1}, {"a": 0.5, "b": 0.5}),
        ({"a": {"tokens": 4480}, "b": {"tokens": 640}, "c": {"tokens": 0}}, {}, {"a": 0.875, "b": 0.125, "c": 0}),
    ],
)
def test_shares(opened: Callable[..., PretrainingData], of: Any, overrides: Any, shares: dict[str, float]) -> None:
    """To the last prefix within two rows; 5,120 tokens are 640 rows."""
    data = opened(of, **overrides)
    found = read_of_each(data)
    assert sum(found.values()) == 5120
    for name, share in shares.items():
        assert abs(found[name] - share * 5120) <= 2 * S
    assert {plan.name: plan.run_size for plan in data.plan} == found
    assert sum(plan.share for plan in data.plan) == pytest.approx(1)
    sizes = {plan.name: plan.size for plan in data.plan}
    assert sizes == {name: ROWS[name] * S for name in of}
    assert all(plan.epochs == pytest.approx(found[plan.name] / sizes[plan.name]) for plan in data.plan)


def test_a_run_that_goes_on_keeps_its_temperature(opened: Callable[..., PretrainingData]) -> None:
    """After a restart, and after samples that are passed over, where another phase begins later."""
    schedule = [{"from_tokens": 2000, "global_batch_size": 8}]
    data = opened({"a": {}, "b": {"weight": 3}}, data__temperature=2, schedule=schedule)
    assert [phase.weights for phase in data.timeline.phases] == [(1.0, 1.5)] * 2
    again = data.timeline_after(data.timeline.begun(32), 32)
    assert again.phases == data.timeline.phases
    passing = data.timeline.passing_over(32, 48)
    assert len(passing.phases) == 3
    assert {phase.weights for phase in passing.phases} == {(1.0, 1.5)}


def test_tokens_that_the_mixture_cannot_give_are_refused(opened: Callable[..., PretrainingData]) -> None:
    """In shares of 2^-18: a corpus always gets one of them."""
    until = 2_000_000_000
    of = {"a": {"tokens": until - 1000}, "b": {"tokens": 1000}}
    data = opened(of, optimizer__learning_rate=[{"until_tokens": until, "end": 0.1}])
    with pytest.raises(
        UserError, match=r"b: is to give 1,000 tokens of the run, but the mixture would take [\d,]+: shares"
    ):
        data.check()
    of = {"a": {"tokens": until - 200_000}, "b": {"tokens": 200_000}}
    opened(of, optimizer__learning_rate=[{"until_tokens": until, "end": 0.1}]).check()


def test_no_file_belongs_to_two_corpora(
    opened: Callable[..., PretrainingData], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """What one holds out, the other would train on."""
    opened({"a": {}, "b": {}})
    for other in (f"{tmp_path}/[ab]", f"{tmp_path}/../{tmp_path.name}/a"):
        with pytest.raises(UserError, match=rf"{tmp_path}/a\.bin belongs to .*/a and to .*; give each file once"):
            PretrainingData(load_config(make_config(data__corpora=[{"path": str(tmp_path / "a")}, {"path": other}])))


def test_the_plan_is_told(opened: Callable[..., PretrainingData]) -> None:
    data = opened({"a": {"weight": 3}, "b": {"weight": 1}})
    assert plan_lines(data.plan) == [
        "a    3.20k tokens in the corpus,   3.84k in the run:  75.00%, 1.2 epochs",
        "b      800 tokens in the corpus,   1.28k in the run:  25.00%, 1.6 epochs",
    ]


def test_the_plan_of_a_run_that_changes(opened: Callable[..., PretrainingData], tmp_path: Path) -> None:
    schedule = [
        {"from_tokens": 1000, "weights": {str(tmp_path / "b"): 3.0}},
        {"from_tokens": 2001, "sequence_length": 4, "global_batch_size": 6},
        {"from_tokens": 4001, "weights": {str(tmp_path / "a"): 0}},
    ]
    data = opened(
        {"a": {}, "b": {"weight": 0}}, schedule=schedule, optimizer__learning_rate=[{"until_tokens": 5001, "end": 0.1}]
    )
    expected: Counter[str] = Counter()
    for first in data.timeline.steps(0, data.timeline.end_samples):
        for stretch in data.training_stretches(range(first, first + data.timeline.phase(first).global_batch_size)):
            expected[data.names[stretch.corpus]] += stretch.stop - stretch.start
    assert {plan.name: plan.run_size for plan in data.plan} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__corpora": [{"path": "a", "tokens": 5}, {"path": "b"}]}, "data.corpora.1.tokens.*missing; give tokens"),
        (
            {"data__corpora": [{"path": "a", "tokens": 5}], "data__temperature": 2},
            "data.temperature .*shares are given as tokens already",
        ),
        (
            {"data__corpora": [{"path": "a", "tokens": 5, "weight": 2}]},
            r"corpora.0.weight .*its share is given as",
        ),
        ({"data__corpora": [{"path": "a", "tokens": 5}]}, "their tokens add up to 5, but the run is 5,120 long"),
        ({"data__corpora": [{"path": "a", "tokens": 0}]}, "every weight is 0"),
        ({"data__corpora": [{"path": "a", "tokens": -1}]}, "greater than or equal to 0"),
        ({"data__temperature": 0}, "data.temperature.*greater than or equal to 0.1"),
        ({"data__corpora": [{"path": "a"}, {"path": "./a"}]}, "a is listed more than once"),
        (
            {
                "data__corpora": [{"path": "a", "tokens": 5120}],
                "schedule": [{"from_tokens": 99, "weights": {"a": 2}}],
            },
            "schedule.0.weights .*the corpora's shares are given as data.corpora",
        ),
    ],
)
def test_mixtures_that_make_no_sense(make_config: Callable[..., Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(make_config(**settings))


def test_a_batch_that_would_hold_a_row_twice_is_refused(opened: Callable[..., PretrainingData]) -> None:
    opened({"a": {"weight": 15}, "c": {"weight": 1}}, training__global_batch_size=384).check()  # 24 of 25 rows
    with pytest.raises(UserError, match="c: has 25 rows of 8 tokens, but every batch of 384 takes 48 of them"):
        opened({"a": {"weight": 7}, "c": {"weight": 1}}, training__global_batch_size=384).check()


def test_documents_without_an_end_are_refused(make_config: Callable[..., Path], tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", np.uint16) as writer:
        for i in range(40):
            writer.add_document([5] * 40 if i == 0 else [*[5] * 40, EOS])
    data = PretrainingData(load_config(make_config(data__corpora=[{"path": str(tmp_path / "c")}])))
    assert data.tokenizer.eos_id == EOS
    with pytest.raises(UserError, match=r"c: document 0 does not end in the end-of-text token 1 \(1 of 16 looked at"):
        data.check()


def test_empty_documents_need_no_end(make_config: Callable[..., Path], tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", np.uint16) as writer:
        for document in ([], *[[5] * 40 + [EOS]] * 40, []):
            writer.add_document(document)
    PretrainingData(load_config(make_config(data__corpora=[{"path": str(tmp_path / "c")}]))).check()


def test_the_last_document_of_each_file_is_looked_at(make_config: Callable[..., Path], tmp_path: Path) -> None:
    for i in range(40):
        with CorpusWriter(tmp_path / f"part-{i:02}", np.uint16) as writer:
            writer.add_document([5] * 40 if i == 17 else [5] * 40 + [EOS])
    data = PretrainingData(load_config(make_config(data__corpora=[{"path": str(tmp_path / "part-*")}])))
    with pytest.raises(UserError, match=r"part-\*: document 17 does not end in the end-of-text token 1 \(1 of 40"):
        data.check()


def test_names_are_the_shortest_that_differ(make_config: Callable[..., Path], tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("web/v1/text", "web/v2/text", "code")]
    for path in paths:
        with CorpusWriter(path, np.uint16) as writer:
            writer.add_document([5] * 99)
    corpora = [{"path": str(path)} for path in paths]
    assert PretrainingData(load_config(make_config(data__corpora=corpora))).names == [
        "v1/text",
        "v2/text",
        f"{tmp_path.name}/code",
    ]


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=4), min_size=1, max_size=4)


@given(parts=DOCUMENTS, data=st.data())
def test_files_that_fit_a_pattern_are_one_stream(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]], data: st.DataObject
) -> None:
    parts = [part for part in parts if any(part)] or [[[7]]]
    folder = tmp_path_factory.mktemp("parts")
    for i, part in enumerate(parts):
        with CorpusWriter(folder / f"part-{i}", [np.uint16, np.int32][i % 2]) as writer:
            for document in part:
                writer.add_document(document)
    corpus = Corpus(folder / "part-*")
    documents = [document for part in parts for document in part]
    stream = [token for document in documents for token in document]
    assert corpus.tokens(0, corpus.num_tokens).tolist() == stream
    assert [corpus.document(i).tolist() for i in range(corpus.num_documents)] == documents
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert corpus.tokens(start, stop).tolist() == stream[start:stop]
    if start < len(stream):
        number = corpus.document_at(start)
        assert corpus.document_start(number) <= start < corpus.document_start(number + 1)


@given(size=st.integers(1, 2**62), seed=st.integers(0, 2**63 - 1), data=st.data())
@settings(max_examples=50)
def test_the_permutation_is_undone(size: int, seed: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    assert np.array_equal(unpermute(permute(index, size, seed, (1, 2)), size, seed, (1, 2)), index)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weights=st.lists(st.lists(st.sampled_from([0, 1, 1.7, 5]), min_size=3, max_size=3), min_size=1, max_size=3),
    blocks=st.integers(0, 90),
)
def test_every_block_is_found_where_it_comes(sizes: list[int], weights: list[list[float]], blocks: int) -> None:
    mixtures = [(17 * i, w[: len(sizes)]) for i, w in enumerate(weights) if any(w[: len(sizes)])]
    mixtures = [(17 * i, w) for i, (_, w) in enumerate(mixtures)] or [(0, [1.0] * len(sizes))]
    order = Order(sizes, mixtures, seed=3)
    place = order.locate(np.arange(blocks))
    assert order.counts_before(blocks).tolist() == np.bincount(place.corpus, minlength=len(sizes)).tolist()
    for corpus, size in enumerate(sizes):
        for block in range(size):
            here = np.flatnonzero((place.corpus == corpus) & (place.block == block)).tolist()
            assert list(order.occurrences(corpus, block, blocks)) == here
            assert len({int(place.epoch[b]) for b in here}) == len(here)


def test_the_way_back_at_ten_trillion_tokens() -> None:
    order = Order([10**9, 3 * 10**8], [(0, [3, 1]), (10**9, [1, 2])], seed=3)
    place = order.locate([2_400_000_000, 5, 999_999_999])
    for block, corpus, of in zip([2_400_000_000, 5, 999_999_999], place.corpus, place.block, strict=True):
        assert block in list(order.occurrences(int(corpus), int(of), 2_441_406_250))
