"""Small real inputs that many tests share: a tokenizer, a corpus, and a config over them."""

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from ruamel.yaml import YAML

if TYPE_CHECKING:
    from cluster import Cluster
    from matrix import Matrix

    from llada_train.config.schema import Config
    from llada_train.data.training_data import TrainingData

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-layout", action="store_true", help="the layout matrix over all layouts, not a choice")
    parser.addoption("--kills", type=int, help="kill a run so many times, and report; the suite does it three times")


WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they"]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/`, `corpus.{bin,idx,json}`: 300 documents of random words, and `pairs.jsonl`.

    Those are 200 prompts of one to four words and, as responses, the words backwards.
    """
    from data_tools.sources import Sources
    from data_tools.tokenize import tokenize
    from data_tools.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    pick = random.Random(0)
    texts = [" ".join(pick.choices(WORDS, k=pick.randrange(10, 90))) for _ in range(300)]
    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:04d}.txt").write_text(text)
    lines = [
        {"prompt": " ".join(words := pick.choices(WORDS, k=pick.randrange(1, 5))), "response": " ".join(words[::-1])}
        for _ in range(200)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer(iter(texts), 300, folder / "tokenizer")
    tokenize(Sources([folder / "text"]), folder / "tokenizer", folder / "corpus")
    return folder


def copy_corpus(data: Path, folder: Path) -> Path:
    """A corpus like that of `tiny_data`, to be damaged; its prefix."""
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"corpus{suffix}").write_bytes((data / f"corpus{suffix}").read_bytes())
    return folder / "corpus"


def record_checkpoint(config: "Config", data: "TrainingData", steps: int) -> None:
    """A checkpoint without tensors: what a run would have recorded of its data after so many steps."""
    from llada_train.checkpoint.manifest import FORMAT, Manifest, Progress, write_manifest
    from llada_train.checkpoint.store import FOLDER, folder_name

    consumed = data.timeline.first_sample(steps + 1)
    folder = config.run_dir / FOLDER / folder_name(steps)
    folder.mkdir(parents=True)
    manifest = Manifest(
        format=FORMAT,
        saved=datetime.now(UTC),
        progress=Progress(step=steps, consumed_samples=consumed, phases=data.timeline.begun(consumed)),
        optimizer_steps=steps,
        versions={},
        config=config,
        corpora=tuple(data.identities),
        files={},
        tensors={},
    )
    write_manifest(folder, manifest)


def write_config(data: Path, folder: Path, **overrides: Any) -> Path:
    """Write a small pre-training config over `data` into `folder`; `a__b=value` sets a.b."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 96,
            "vocab_size": 300,
            "max_sequence_length": 64,
        },
        "data": {
            "tokenizer": str(data / "tokenizer"),
            "sequence_length": 32,
            "corpora": [{"path": str(data / "corpus"), "validation_documents": 20}],
        },
        # Many cut rows, so that every test of the whole path meets padding and segments.
        "objective": {"random_length_probability": 0.25},
        "optimizer": {"learning_rate": [{"until_tokens": 1024, "end": 1e-2}, {"until_tokens": 5120, "end": 1e-2}]},
        "training": {"global_batch_size": 16, "micro_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"interval_steps": 5},
        "validation": {"interval_steps": 5, "sequences": 8},
        "logging": {"interval_steps": 1},
    }
    for key, value in overrides.items():
        *sections, last = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    path = folder / "config.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(tree, file)
    return path


def sft_settings(data: Path) -> dict[str, Any]:
    """What makes an SFT config of `write_config`'s."""
    return {
        "sft": {},
        "data__sequence_length": 64,
        "data__corpora": [{"path": str(data / "pairs.jsonl"), "validation_documents": 20}],
        "objective__random_length_probability": 0,
    }


@pytest.fixture(scope="session")
def sft_matrix(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> "Matrix":
    """The layout matrix of SFT, in fp32."""
    import processes
    from layouts import GLOBAL_BATCH_SIZE, MODEL
    from matrix import Matrix

    processes.start()
    folder = tmp_path_factory.mktemp("sft-layouts")
    model = {f"model__{key}": value for key, value in MODEL.items()}
    batch = {
        "objective__epsilon": 0.05,
        "training__global_batch_size": GLOBAL_BATCH_SIZE,
        "validation__answers": 5,
    }
    return Matrix(write_config(tiny_data, folder, **model, **sft_settings(tiny_data), **batch), "fp32", folder / "fp32")


@pytest.fixture(scope="session")
def matrices(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Matrix"]:
    """The layout matrix of each precision."""
    import processes
    from layouts import GLOBAL_BATCH_SIZE, MODEL, OBJECTIVE
    from matrix import TOLERANCE, Matrix

    processes.start()
    folder = tmp_path_factory.mktemp("layouts")
    model = {f"model__{key}": value for key, value in MODEL.items()}
    config = write_config(
        tiny_data, folder, objective=OBJECTIVE, training__global_batch_size=GLOBAL_BATCH_SIZE, **model
    )
    return {precision: Matrix(config, precision, folder / precision) for precision in TOLERANCE}


@pytest.fixture(scope="session")
def slurm() -> Iterator["Cluster"]:
    """A SLURM of two nodes; its tests are skipped where it cannot be had, and say why."""
    from cluster import CannotBeHadError, running

    # Not under pytest's own folders: munge's socket needs a short path that others may enter.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        try:
            with running(Path(folder) / "cluster") as cluster:
                yield cluster
        except CannotBeHadError as reason:
            pytest.skip(f"no SLURM here: {reason}")


@pytest.fixture
def make_config(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """`write_config` over `tiny_data` into this test's folder."""
    return functools.partial(write_config, tiny_data, tmp_path)


@pytest.fixture
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_command("llada_train.cli", "pretrain", …)`: the command in a fresh process, output captured."""

    def run(module: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **environment},
        )

    return run
