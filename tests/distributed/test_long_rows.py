"""Context parallelism is there for rows that do not fit one process: 32,768 tokens over four of them."""

import random
from pathlib import Path

import processes
import pytest
import training_run
from conftest import WORDS, write_config

from data_tools.sources import Sources
from data_tools.tokenize import tokenize
from llada_train.config.load import load_config
from llada_train.objective.forward_process import training_noise

S = 32_768


def test_a_32k_token_row_costs_the_same_on_four_processes(tiny_data: Path, tmp_path: Path) -> None:
    """One whole row and one cut row: loss, bound on held-out text, gradient norm."""
    pick = random.Random(0)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(" ".join(pick.choices(WORDS, k=S)))
    tokenize(Sources(sorted(tmp_path.glob("*.txt"))), tiny_data / "tokenizer", tmp_path / "corpus")
    model = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "num_kv_heads": 1, "max_sequence_length": S}
    config = write_config(
        tiny_data,
        tmp_path,
        **{f"model__{key}": value for key, value in model.items()},
        data__sequence_length=S,
        data__corpora=[{"path": str(tmp_path / "corpus"), "validation_documents": 1}],
        objective__random_length_probability=0.5,
        training__global_batch_size=2,
        training__micro_batch_size=1,
        validation__sequences=1,
        seed=2,
    )
    resolved = load_config(config)
    noise = training_noise(resolved.seed, 0, 2, S, resolved.objective)
    assert noise.lengths.tolist() == [23_222, S]
    runs = {}
    for ranks in (1, 4):
        layout = [f"parallel.context_parallel={ranks}"]
        runs[ranks] = processes.run(ranks, training_run.train, config, layout, 1, tmp_path / str(ranks), None)
    whole, sliced = runs[1][0], runs[4][0]
    assert [sum(part[sample] for part in (r.digests[0] for r in runs[4])) % 2**64 for sample in (0, 1)] == [
        whole.digests[0][sample] for sample in (0, 1)
    ]
    assert sliced.losses == pytest.approx(whole.losses, rel=1e-5)
    assert sliced.norms == pytest.approx(whole.norms, rel=1e-5)
    assert sliced.validation == pytest.approx(whole.validation, rel=1e-5)
