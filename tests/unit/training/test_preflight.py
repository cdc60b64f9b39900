"""What is found at fault before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_corpus, record_checkpoint, sft_settings, write_config
from hf_folders import MODELS, exported_folder

from llada_train.commands.train import sft
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.convert.from_hf import from_hf
from llada_train.data.corpus import Corpus
from llada_train.data.corpus_writer import CorpusWriter
from llada_train.data.rows import PretrainingData
from llada_train.data.sft import CACHE
from llada_train.data.timeline import Timeline
from llada_train.training.initial import check_initial_weights
from llada_train.training.preflight import check_corpora, check_phases, open_inputs


def check(config: Path, *overrides: str) -> None:
    inputs = open_inputs(load_config(config, overrides, 1))
    check_corpora(inputs.run, inputs.data)


def rewritten(prefix: Path, documents: list[np.ndarray]) -> None:
    with CorpusWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)


def test_a_run_goes_on_with_the_corpora_that_it_began_with(
    make_config: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    prefix, moved = copy_corpus(tiny_data, tmp_path), tmp_path / "elsewhere"
    path = make_config(data__corpora=[{"path": str(prefix), "validation_documents": 20}])
    config = load_config(path)
    record_checkpoint(config, PretrainingData(config), steps=2)
    check(path)
    for suffix in (".bin", ".idx", ".json"):
        prefix.with_suffix(suffix).rename(moved.with_suffix(suffix))
    at_new_place = f"data.corpora.0.path={moved}"
    check(path, at_new_place)

    corpus = Corpus(moved)
    documents = [corpus.document(i).copy() for i in range(300)]
    cases = [
        (documents[:-1], r"300 documents with [\d,]+ tokens then, 299 documents with [\d,]+ tokens now"),
        ([documents[1], documents[0], *documents[2:]], "as large as before, but with other tokens"),
    ]
    for others, differs in cases:
        rewritten(moved, others)
        with pytest.raises(UserError, match=rf"elsewhere: not the corpus that the run in .*/run was .*\({differs}\)"):
            check(path, at_new_place)
    rewritten(moved, documents)
    check(path, at_new_place)


def test_imported_weights_have_to_fit_model_and_tokenizer(
    make_config: Callable[..., Path], tiny_data: Path, tmp_path: Path
) -> None:
    """Both are told at once, and no longer when the run has a checkpoint."""
    from_hf(exported_folder(tmp_path, tiny_data / "tokenizer"), tmp_path / "base")
    sizes = {f"model__{key}": value for key, value in MODELS[1].model_dump().items()}
    path = make_config(**sizes, init_from=str(tmp_path / "base"))
    check_initial_weights(load_config(path))
    names = tmp_path / "base" / "tokenizer" / "tokenizer_config.json"
    names.write_text(json.dumps(json.loads(names.read_text()) | {"mask_token": "<|eot_id|>"}))
    other = load_config(path, ["model.ffn_hidden_size=64"])
    with pytest.raises(UserError) as caught:
        check_initial_weights(other)
    assert "model.ffn_hidden_size: 48 → 64\n  the tokenizer's mask id: 5 → 2" in str(caught.value)
    record_checkpoint(other, PretrainingData(other), steps=2)
    check_initial_weights(other)


def test_initial_weights_are_found_at_fault_before_data_sets_are_tokenized(tiny_data: Path, tmp_path: Path) -> None:
    """What is found later leaves them tokenized, for the next start."""
    path, run = write_config(tiny_data, tmp_path, **sft_settings(tiny_data)), tmp_path / "run"
    with pytest.raises(UserError, match=r"init_from: .*nowhere: no such folder"):
        sft(path, [f"init_from={tmp_path}/nowhere"], processes=1)
    assert not run.exists()
    pairs = f"{{path: {tiny_data}/pairs.jsonl, validation_documents: 200}}"
    with pytest.raises(UserError, match="validation_documents 200 leaves nothing to train on"):
        sft(path, [f"data.corpora=[{pairs}]"], processes=1)
    (tokenized,) = (entry for entry in (run / CACHE).iterdir() if entry.is_dir())
    times = {file: file.stat().st_mtime_ns for file in tokenized.iterdir()}
    open_inputs(load_config(path))
    assert times == {file: file.stat().st_mtime_ns for file in tokenized.iterdir()} != {}


def test_a_run_folder_that_is_a_file(make_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"run_dir: .*taken: is a file; give a folder"):
        open_inputs(load_config(make_config(), [f"run_dir={tmp_path}/taken"]))


def test_responses_are_counted_where_a_data_set_is_another(tiny_data: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_bytes((tiny_data / "pairs.jsonl").read_bytes())
    corpora = [{"path": str(pairs), "validation_documents": 20}]
    path = write_config(tiny_data, tmp_path, **{**sft_settings(tiny_data), "data__corpora": corpora})
    inputs = open_inputs(load_config(path))
    record_checkpoint(inputs.config, inputs.data, steps=2)
    check(path)
    pairs.write_text(pairs.read_text().partition("\n")[2])
    with pytest.raises(UserError, match=r"200 responses with [\d,]+ tokens then, 199 responses with [\d,]+ tokens now"):
        check(path)


def test_a_batch_size_still_in_force_has_to_fit_the_processes(make_config: Callable[..., Path]) -> None:
    """16 rows a step until a block of 1,024 tokens ends, then 24: three processes can only share the latter."""
    path = make_config(data__block_length=1024, training__micro_batch_size=1)
    past = Timeline(load_config(path)).begun(16)
    config = load_config(path, ["training.global_batch_size=24"], 3)
    timeline = Timeline(config, past, 16)
    assert [phase.global_batch_size for phase in timeline.phases] == [16, 24]
    with pytest.raises(UserError, match=r"from sample 16 on the run has batches of 16 × 32 tokens(.|\n)*give another"):
        check_phases(config, timeline, 16, world_size=3)
    check_phases(config, timeline, timeline.phases[1].first_sample, world_size=3)
    check_phases(config, timeline, 16, world_size=2)
