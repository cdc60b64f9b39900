"""Dialogues to rows: what is read, what is learnt, what is cut, and that the order is the run's."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import sft_settings, write_config

from data_tools.trace import find, open_run, trace
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.data.loader import TrainingLoader
from llada_train.data.place import Place
from llada_train.data.sft import SftData

PAIRS = [{"prompt": f"the {'of ' * (i % 3)}and", "response": f"to {'in ' * (i % 5)}is"} for i in range(24)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": "the"},
            {"role": "assistant", "content": "of"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "to"},
        ]
    }
    for _ in range(24)
]
HEADER = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
ASKED = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

Make = Callable[..., SftData]


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def make(tiny_data: Path, tmp_path: Path) -> Make:
    """SftData over a file, with settings as `write_config` takes them."""

    def build(path: Path, columns: dict[str, str] | None = None, **settings: Any) -> SftData:
        corpora = [{"path": str(path), "validation_documents": 2, "columns": columns}]
        given = {**sft_settings(tiny_data), "data__corpora": corpora, "sft__cache": str(tmp_path / "cache"), **settings}
        return SftData(load_config(write_config(tiny_data, tmp_path, **given)))

    return build


def rendered(data: SftData) -> list[str]:
    """One epoch of examples."""
    return [data.rendered(example) for example in data.examples(range(sum(data.blocks_per_corpus)))]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "the", "response": "of", "more": 1}, f"{HEADER}the{ASKED}⟦of<|eot_id|><|endoftext|>⟧"),
        ({"question": "the", "answer": "of"}, f"{HEADER}the{ASKED}⟦of<|eot_id|><|endoftext|>⟧"),
        (
            {"instruction": "the", "input": "and", "output": "of"},
            f"{HEADER}the\n\nand{ASKED}⟦of<|eot_id|><|endoftext|>⟧",
        ),
        ({"instruction": "the", "input": "", "output": "of"}, f"{HEADER}the{ASKED}⟦of<|eot_id|><|endoftext|>⟧"),
        (
            {"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "of"}]},
            f"{HEADER}the{ASKED}⟦of<|eot_id|><|endoftext|>⟧",
        ),
        (
            {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "of"}]},
            f"{HEADER}the{ASKED}⟦of<|eot_id|><|endoftext|>⟧",
        ),
    ],
)
def test_the_fields_shapes_are_recognised(make: Make, tmp_path: Path, record: Any, expected: str) -> None:
    assert set(rendered(make(lines(tmp_path / "set.jsonl", [record] * 24)))) == {expected}


@pytest.mark.parametrize("kind", ["json", "parquet", "folder", "gz"])
def test_every_format_gives_the_same_rows(make: Make, tmp_path: Path, kind: str) -> None:
    expected = rendered(make(lines(tmp_path / "set.jsonl", MESSAGES[:12] + MESSAGES[:12])))
    path = tmp_path / f"other.{kind}"
    if kind == "json":
        path.write_text(json.dumps(MESSAGES))
    elif kind == "gz":
        import gzip

        path = tmp_path / "other.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "set.jsonl").read_bytes()))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MESSAGES), path)
    else:
        import datasets

        datasets.Dataset.from_list(MESSAGES).save_to_disk(str(path))
    assert rendered(make(path)) == expected


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "hub"])
def test_one_split_of_a_data_set_is_read(make: Make, tmp_path: Path, saved: bool) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list(PAIRS) for name in ("train", "test")}
    folder = tmp_path / "set"
    if saved:
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    else:
        folder.mkdir()
        for name, split in splits.items():
            split.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    with pytest.raises(UserError, match="holds the splits test, train; give one"):
        make(folder)
    assert sum(make(folder / "train" if saved else folder / "train*").blocks_per_corpus) == 22


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"corpora\.0: .*set\.jsonl: no such file or folder; give"),
        (b"", r"corpora\.0: .*set\.jsonl: no record in it \(empty\)"),
        (b"\xff\n", r"no record in it \(.*set\.jsonl, line 1: not valid UTF-8\)"),
        (b"[1, 2]\n", r"no record in it \(.*set\.jsonl, line 1: "),
    ],
)
def test_a_set_without_records_is_told(tiny_data: Path, tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "set.jsonl"
    if content is not None:
        path.write_bytes(content)
    settings = {**sft_settings(tiny_data), "data__corpora": [{"path": str(path)}]}
    with pytest.raises(UserError, match=told):
        SftData(load_config(write_config(tiny_data, tmp_path, **settings)))


def test_columns_are_told_where_they_are_not_known(make: Make, tmp_path: Path) -> None:
    records = [{"q": "the", "a": "of", "s": "in"} for _ in range(24)]
    path = lines(tmp_path / "set.jsonl", records)
    with pytest.raises(UserError, match=r"set.jsonl: its records have the keys q, a, s; say which is which"):
        make(path)
    data = make(path, {"prompt": "q", "response": "a", "system": "s"})
    assert "<|start_header_id|>system<|end_header_id|>\n\nin<|eot_id|>" in rendered(data)[0]
    assert data.description[0].startswith("set.jsonl: prompt=q, response=a, system=s; 24 dialogues")
    assert data.description[1] == rendered(data)[0]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("{", "broken JSON"),
        ({"prompt": "the"}, "no text under the key 'response'"),
        ({"prompt": "the", "response": " "}, "has an empty response"),
        ({"prompt": 1, "response": "of"}, "no text under the key 'prompt'"),
    ],
)
def test_an_unusable_record_is_told_or_counted(make: Make, tmp_path: Path, record: Any, told: str) -> None:
    path = lines(tmp_path / "set.jsonl", PAIRS)
    broken = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{path.read_text()}{broken}\n")
    with pytest.raises(UserError, match=f"set.jsonl, line 25: {told}; mend it, or count"):
        make(path)
    assert not list((tmp_path / "cache").glob("*.partial")) and not list((tmp_path / "cache").glob("set-*/"))
    data = make(path, sft={"unusable": "drop", "cache": str(tmp_path / "cache")})
    assert f"1 left out: {told}" in data.description[0]
    assert sum(data.blocks_per_corpus) == 22


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        (["user"], "does not end with a response"),
        (["user", "tool", "assistant"], "unknown role 'tool'"),
        (["assistant", "user", "assistant"], "do not take turns"),
        (["system"], "does not end with a response"),
    ],
)
def test_a_dialogue_out_of_order_is_told(make: Make, tmp_path: Path, roles: list[str], told: str) -> None:
    record = {"messages": [{"role": role, "content": "the"} for role in roles]}
    with pytest.raises(UserError, match=f"line 2: .*{told}"):
        make(lines(tmp_path / "set.jsonl", [MESSAGES[0], record]))


def test_of_a_dialogue_one_response_is_drawn_or_all_are_learnt(make: Make, tmp_path: Path) -> None:
    path = lines(tmp_path / "set.jsonl", MESSAGES)
    first = f"{HEADER}the{ASKED}⟦of<|eot_id|><|endoftext|>⟧"
    between = "<|start_header_id|>user<|end_header_id|>\n\nand"
    second = f"{HEADER}the{ASKED}of<|eot_id|>{between}{ASKED}⟦to<|eot_id|><|endoftext|>⟧"
    model = {"model__max_sequence_length": 128, "data__sequence_length": 128}
    data = make(path, **model)
    epochs = [data.examples(range(22 * epoch, 22 * (epoch + 1))) for epoch in range(20)]
    counts = Counter(data.rendered(example) for epoch in epochs for example in epoch)
    assert counts.keys() == {first, second}
    assert abs(counts[first] - 220) < 5 * 220**0.5  # a fair coin, and another one in each epoch
    everything = make(path, sft={"dialogues": "all_responses", "cache": str(tmp_path / "cache")}, **model)
    assert set(rendered(everything)) == {f"{HEADER}the{ASKED}⟦of<|eot_id|>⟧{between}{ASKED}⟦to<|eot_id|><|endoftext|>⟧"}


def test_what_is_too_long_is_cut_as_told_and_counted(make: Make, tmp_path: Path) -> None:
    """A prompt that fills the row is left out, since it would leave nothing to learn."""
    records = [*PAIRS, {"prompt": "the", "response": "of " * 70}, {"prompt": "and " * 60, "response": "to"}]
    path = lines(tmp_path / "set.jsonl", records)

    def build(how: str) -> tuple[SftData, list[str]]:
        data = make(path, sft={"too_long": how, "cache": str(tmp_path / "cache")})
        examples = [data._examples[0].example(i, 0) for i in range(data._examples[0].count)]
        assert all(example.learnt > 0 and example.length <= 64 for example in examples)
        return data, [data.rendered(example) for example in examples]

    data, found = build("truncate_response")
    assert "1 cut to 64 tokens (truncate_response), 1 too long and left out" in data.description[0]
    assert len(found) == 25 and found[-1].startswith(f"{HEADER}the{ASKED}⟦of of") and found[-1].endswith("of⟧")
    data, found = build("truncate_prompt")
    assert "1 cut to 64 tokens (truncate_prompt), 1 too long and left out" in data.description[0]
    assert len(found) == 25 and found[-1].endswith(f" and{ASKED}⟦to<|eot_id|><|endoftext|>⟧")
    data, found = build("drop")
    assert "2 too long and left out" in data.description[0] and len(found) == 24
    for how, number, remedy in [
        ("drop", 24, "all are longer; .*truncate_response"),
        ("truncate_response", 25, "the prompts alone fill it; .*truncate_prompt"),
        ("truncate_prompt", 24, "the responses alone fill it; .*truncate_response"),
    ]:
        path = lines(tmp_path / "long.jsonl", [records[number]] * 4)
        with pytest.raises(UserError, match=f"none of its examples fits into data.sequence_length 64: {remedy}"):
            make(path, sft={"too_long": how, "cache": str(tmp_path / "cache")})


def test_prompts_are_never_noised_and_the_padding_of_a_group_is_learnt(make: Make, tmp_path: Path) -> None:
    data = make(lines(tmp_path / "set.jsonl", PAIRS), sft={"eos_pad_group": 4, "cache": str(tmp_path / "cache")})
    size = data.config.training.global_batch_size
    masked: dict[bool, int] = {False: 0, True: 0}
    for first in range(0, 20 * size, size):
        samples = range(first, first + size)
        rows, examples = data.samples(first, samples), data.examples(samples)
        for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
            group = examples[i // 4 * 4 : i // 4 * 4 + 4]
            assert len(row.tokens) == max(one.length for one in group)
            begin = example.responses[0][0]
            assert not row.mask[:begin].any()
            assert (row.tokens[example.length - 1 :] == data.tokenizer.eos_id).all()
            learnt = len(row.tokens) - begin
            assert row.loss_weight == pytest.approx(1 / (row.mask_probability * learnt * size))
            masked[True] += int(row.mask[example.length :].sum())
            masked[False] += int(row.mask[begin : example.length].sum())
    assert masked[True] > 0 < masked[False]


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_the_batch_is_the_same_for_any_ranks_and_micro_batches(
    make: Make, tmp_path: Path, ranks: int, rows: str
) -> None:
    """Tokens, targets and weights of each sample, wherever it lies; only what rows are filled up with is the layout's.

    Packed ones are those of padded rows.
    """

    def of(size: int, ranks: int, rows: str) -> dict[int, tuple[Any, ...]]:
        sft = {"rows": rows, "cache": str(tmp_path / "cache")}
        data = make(path, training__micro_batch_size=size, sft=sft, **wide)
        found: dict[int, tuple[Any, ...]] = {}
        micro_batches = set()
        for rank in range(ranks):
            batches = TrainingLoader(data, data.config, Place(rank, ranks)).global_batch(16)
            micro_batches.add(len(batches))
            for batch in batches:
                ids, positions, S = batch.input_ids.flatten(), batch.position_ids.flatten(), batch.input_ids.shape[1]
                assert len(batch.input_ids) == size
                assert (rows == "packed") or len(batch.t) == size
                borders = batch.segments.cu_seqlens_q if batch.segments else torch.arange(0, size * S + 1, S)
                for e, (sample, t) in enumerate(zip(batch.sample_index.tolist(), batch.t.tolist(), strict=True)):
                    here = (batch.masked_samples == e) & (batch.loss_weight > 0)
                    places = batch.masked_positions[here]
                    assert sample >= 0 or not here.any()
                    if not here.any():
                        continue
                    (segment,) = torch.searchsorted(borders, places, right=True).unique().tolist()
                    whole = slice(int(borders[segment - 1]), int(borders[segment]))
                    assert positions[whole].tolist() == list(range(whole.stop - whole.start))
                    told = (ids[whole], positions[places], batch.targets[here], batch.loss_weight[here])
                    assert sample not in found
                    found[sample] = (t, *(tuple(part.tolist()) for part in told))
        assert len(micro_batches) == 1
        return found

    path = lines(tmp_path / "set.jsonl", PAIRS)
    wide = {"model__max_sequence_length": 128, "data__sequence_length": 128}
    expected = of(16, 1, "padded")
    assert of(2, ranks, rows) == expected and set(expected) <= set(range(16, 32)) and len(expected) > 10


def test_packed_samples_fit_with_the_padding_that_they_learn(make: Make, tmp_path: Path) -> None:
    sft = {"rows": "packed", "eos_pad_group": 4, "cache": str(tmp_path / "cache")}
    data = make(lines(tmp_path / "set.jsonl", PAIRS), sft=sft)
    for first in range(0, 160, 16):
        lengths = [len(sample.tokens) for sample in data.samples(first, range(first, first + 16))]
        filled = [sum(lengths[g - first] for g in row) for row in data.packing(first)]
        assert max(filled) <= 64 and sum(filled) == sum(lengths)


def test_a_batch_is_packed_as_large_as_when_it_was_trained_on(make: Make, tmp_path: Path) -> None:
    """A run of batches of 16 that went on with batches of 8: what a step reads follows from its place alone."""
    path, sft = lines(tmp_path / "set.jsonl", PAIRS), {"rows": "packed", "cache": str(tmp_path / "cache")}
    before = make(path, sft=sft)
    now = make(path, sft=sft, training__global_batch_size=8)
    data = now.at(now.timeline_after(before.timeline.begun(16), 16))
    for first, size in [(0, 16), (16, 8), (24, 8)]:
        numbers = range(first, first + size)
        assert sorted(chain.from_iterable(data.packing(first))) == list(numbers)
        alone = before if size == 16 else now
        assert data.packing(first) == alone.packing(first)
        weights = [sample.loss_weight for sample in data.samples(first, numbers)]
        assert weights == [sample.loss_weight for sample in alone.samples(first, numbers)]


def test_packed_rows_are_few_and_told(make: Make, tmp_path: Path) -> None:
    """More ranks than rows are left with rows that only fill up; what the user is told is what the loader does."""
    wide = {"model__max_sequence_length": 256, "data__sequence_length": 256}
    sft = {"rows": "packed", "cache": str(tmp_path / "cache")}
    data = make(lines(tmp_path / "set.jsonl", PAIRS), training__micro_batch_size=1, sft=sft, **wide)
    lengths = [len(sample.tokens) for sample in data.samples(0, range(16))]
    rows = -(-sum(lengths) // 256)
    assert 1 < rows < 8
    told = f"packed: the first 16 examples share {rows} rows of 256 tokens, {sum(lengths) / (rows * 256):.0%} of which"
    assert told in data.description[-1]
    ranks = [TrainingLoader(data, data.config, Place(rank, 8)).global_batch(0) for rank in range(8)]
    assert [len(batches) for batches in ranks] == [1] * 8
    found = [batch.sample_index.tolist() for (batch,) in ranks]
    assert [sorted(part) for part in found[rows:]] == [[-1]] * (8 - rows)
    assert sorted(chain.from_iterable(found[:rows])) == list(range(16))
    assert all(float(batch.loss_weight.sum()) == 0 for (batch,) in ranks[rows:])


def test_each_example_comes_once_in_an_epoch_and_held_out_ones_never(make: Make, tmp_path: Path) -> None:
    records = [{"prompt": f"{i}", "response": "the"} for i in range(24)]
    data = make(lines(tmp_path / "set.jsonl", records))
    for epoch in range(3):
        texts = [data.rendered(e) for e in data.examples(range(22 * epoch, 22 * epoch + 22))]
        numbers = [int(text.split("\n\n")[1].split("<")[0]) for text in texts]
        assert sorted(numbers) == list(range(22))
    held_out = [data.rendered(example) for example in data.validation_examples]
    assert [text.split("\n\n")[1].split("<")[0] for text in held_out] == ["22", "23"]


def test_phases_by_steps_and_epochs_become_tokens(make: Make, tmp_path: Path) -> None:
    path = lines(tmp_path / "set.jsonl", PAIRS)
    phases = [{"until_steps": 2, "end": 1e-3}, {"until_epochs": 2.7, "end": 1e-3}, {"until_epochs": 3, "end": 1e-4}]
    data = make(path, optimizer__learning_rate=phases)  # 22 examples, 16 in a step
    assert [phase.until // (16 * 64) for phase in data.config.optimizer.learning_rate] == [2, 4, 5]
    assert data.timeline.end_samples == 5 * 16
    with pytest.raises(UserError, match=r"learning_rate.1: ends after 3 steps, no later than the phase before"):
        make(path, optimizer__learning_rate=[{"until_steps": 3, "end": 1e-3}, {"until_epochs": 2, "end": 1e-4}])


def test_a_changed_set_is_tokenized_again_and_an_old_one_is_not(make: Make, tmp_path: Path) -> None:
    path = lines(tmp_path / "set.jsonl", PAIRS)
    first = make(path)
    made = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "cache").glob("set-*/")}
    assert make(path).identities == first.identities
    assert {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "cache").glob("set-*/")} == made
    lines(path, [*PAIRS[:-1], {"prompt": "new", "response": "new"}])
    assert make(path).identities != first.identities


def test_those_that_start_together_make_the_cache_once(tiny_data: Path, tmp_path: Path) -> None:
    """A file lock is an open file's, so threads are kept apart as processes are. One was killed here before."""
    config = load_config(write_config(tiny_data, tmp_path, **sft_settings(tiny_data)))
    cache = tmp_path / "run/examples"
    SftData(config)
    (folder,) = cache.glob("pairs-*/")
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: SftData(config).identities, range(4)))
    assert all(one == found[0] for one in found)
    assert list(cache.glob("pairs-*/")) == [folder]


def test_settings_of_the_other_kind_are_told(tiny_data: Path, tmp_path: Path) -> None:
    settings = {**sft_settings(tiny_data), "data__rows": "document_attention", "data__block_length": 128}
    config = write_config(tiny_data, tmp_path, **settings)
    with pytest.raises(UserError, match=r"data.rows .*is for pre-training; leave it out") as told:
        load_config(config)
    assert "data.block_length" in str(told.value)
    phases = [{"until_epochs": 3, "end": 1e-3}]
    with pytest.raises(UserError, match="ends at steps or epochs, which SFT alone can count"):
        load_config(write_config(tiny_data, tmp_path, optimizer__learning_rate=phases))


def test_sets_are_mixed_by_weight(tiny_data: Path, tmp_path: Path) -> None:
    paths = [lines(tmp_path / f"{name}.jsonl", PAIRS) for name in "ab"]
    corpora = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)]
    settings = {**sft_settings(tiny_data), "data__corpora": corpora}
    data = SftData(load_config(write_config(tiny_data, tmp_path, **settings)))
    counts = np.bincount([example.corpus for example in data.examples(range(40))])
    assert counts.tolist() == [30, 10]


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_a_step_can_be_looked_at(tiny_data: Path, tmp_path: Path, rows: str) -> None:
    config = write_config(tiny_data, tmp_path, **{**sft_settings(tiny_data), "sft__rows": rows})
    settings, data = open_run(config)
    assert isinstance(data, SftData)
    found = list(trace(settings, data, 3))
    packing = {g: row for row, samples in enumerate(data.packing(32)) for g in samples}
    assert {row.sample: row.row for row in found} == packing and sorted(packing) == list(range(32, 48))
    assert (len(set(packing.values())) == 16) == (rows == "padded")
    numbers = [row.sample for row in found]
    assert [row.masked for row in found] == [int(sample.mask.sum()) for sample in data.samples(32, numbers)]
    of_ranks = [list(trace(settings, data, 3, Place(rank, 8))) for rank in range(8)]
    assert list(chain.from_iterable(of_ranks)) == found and ([] in of_ranks) == (rows == "packed")
    lines = (tiny_data / "pairs.jsonl").read_text().splitlines()
    for row in found:
        pair = json.loads(lines[row.documents[0].number])
        assert row.text == f"{HEADER}{pair['prompt']}{ASKED}⟦{pair['response']}<|eot_id|><|endoftext|>⟧"
    with pytest.raises(UserError, match="only pre-training is searched"):
        list(find(settings, data, "the"))
