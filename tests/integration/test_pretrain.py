"""`llada-train pretrain` in fresh processes: however it is started, what it writes, and where its weights begin."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from llada_train.checkpoint.store import FOLDER, checkpoints
from llada_train.cli import app
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.convert.from_hf import from_hf
from llada_train.convert.load import loaded
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.text import continue_prompts
from llada_train.training.metrics import CURVES_FILE, TENSORBOARD_FOLDER, read_metrics

Run = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 10
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ninja", "nvcc")


def start(config: Path, *arguments: str, launcher: list[str] | None = None, **settings: Any) -> str:
    """Run pretrain to its end; nothing but the log may be said. Returns stdout."""
    command = [*(launcher or [sys.executable]), "-m", "llada_train.cli", "pretrain", str(config), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def train_records(config: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(load_config(config).run_dir) if record["kind"] == "train"]


def losses_and_norms(config: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in train_records(config)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def finished(tiny_data: Path, folder: Path) -> tuple[Path, str]:
    """The config of a run of 2 processes, on a machine without a compiler, and what the run said."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX", "CUDA_HOME")}
    environment["PATH"] = str(tools)
    assert not any(shutil.which(compiler, path=str(tools)) for compiler in COMPILERS)
    (folder / "finished").mkdir()
    config = write_config(tiny_data, folder / "finished")
    return config, start(config, "--processes", "2", env=environment)


def test_two_processes_without_a_compiler_log_each_step_once(finished: tuple[Path, str]) -> None:
    config, output = finished
    run = load_config(config).run_dir
    records = [(record["kind"], record["step"]) for record in read_metrics(run)]
    expected = [("train", step) for step in range(1, STEPS + 1)]
    assert [record for record in records if record[0] == "train"] == expected
    assert [record for record in records if record[0] == "validation"] == [("validation", 5), ("validation", 10)]
    plan, *lines, end = output.splitlines()
    assert plan.startswith("corpus ") and plan.endswith("in the run: 100.00%, 0.372 epochs")
    assert len(lines) == len(records)  # one line each, and nothing else
    assert end.startswith(f"complete at step {STEPS}; checkpoint ")

    assert load_config(run / "config.yaml") == load_config(config)
    assert (run / CURVES_FILE).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run / TENSORBOARD_FOLDER)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in train_records(config)]


def test_finished_run_has_nothing_to_go_on_with(finished: tuple[Path, str]) -> None:
    config, _ = finished
    run = load_config(config).run_dir
    before = [read_metrics(run), checkpoints(run / FOLDER)]
    newest = before[1][-1]
    assert start(config) == f"resuming from {newest} at step {STEPS}\ncomplete at step {STEPS}; checkpoint {newest}\n"
    assert [read_metrics(run), checkpoints(run / FOLDER)] == before


@pytest.mark.parametrize("layout", [[], ["--processes", "2", "--tensor-parallel", "2"]], ids=["whole", "TP2"])
def test_evaluate_gives_the_last_validation_bound(
    layout: list[str], finished: tuple[Path, str], run_command: Run
) -> None:
    config, _ = finished
    run = load_config(config).run_dir
    done = run_command("llada_train.cli", "evaluate", run, "--json", *layout)
    assert (done.returncode, done.stderr) == (0, "")
    bound = next(r["bound"] for r in read_metrics(run) if r["kind"] == "validation" and r["step"] == STEPS)
    assert json.loads(done.stdout)["bound"]["nats_per_token"] == pytest.approx(bound, rel=1e-5)


def test_torchrun_is_the_same_run_and_texts_on_the_way_change_nothing(
    tiny_data: Path, tmp_path: Path, finished: tuple[Path, str]
) -> None:
    samples = {"prompts": ["the of", "and"], "interval_steps": 4, "gen_length": 6, "temperature": 1.0}
    config = write_config(tiny_data, tmp_path, validation__samples=samples)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = start(config, launcher=torchrun, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert losses_and_norms(config) == losses_and_norms(finished[0])

    run = load_config(config).run_dir
    written = {r["step"]: r["samples"] for r in read_metrics(run) if r["kind"] == "samples"}
    assert list(written) == [4, 8, STEPS] and len({str(some) for some in written.values()}) == 3
    assert 'step      10  sample after "the of": ' in told
    with loaded(run) as model:  # what the finished run writes is what `sample` writes
        prompts, ends = model.tokenizer.encode_batch(samples["prompts"]), [model.tokenizer.eos_id]
        options = SamplingOptions(temperature=1.0, seed=load_config(config).seed)
        answers = continue_prompts(model.sampler, prompts, 6, options, model.tokenizer.mask_id, ends)
        texts = [model.tokenizer.decode(answer) for answer in answers]
    assert written[STEPS] == [
        {"prompt": prompt, "text": text} for prompt, text in zip(samples["prompts"], texts, strict=True)
    ]
    events = EventAccumulator(str(run / TENSORBOARD_FOLDER)).Reload()
    assert events.PluginTagToContent("text").keys() == {"samples/0", "samples/1"}
    shown = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/1")}
    assert shown[STEPS].split("\n")[0].startswith(("    and" + texts[1]).split("\n")[0])


def test_a_run_is_sampled_from_in_another_layout(tmp_path: Path, finished: tuple[Path, str], run_command: Run) -> None:
    run, inputs = load_config(finished[0]).run_dir, tmp_path / "in.jsonl"
    rows = [{"prompt": "the of and"}, {"infill": "in <|mdm_mask|><|mdm_mask|> is"}, {"prompt": "-"}]
    inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--input", inputs, "--gen-length", "8", "--temperature", "0.7", "--no-eos"]
    whole = run_command("llada_train.cli", "sample", run, *options)
    layout = ["--processes", "4", "--tensor-parallel", "2", "--pipeline-parallel", "2"]
    split = run_command("llada_train.cli", "sample", run, *options, *layout, "--output", tmp_path / "out.jsonl")
    assert (split.returncode, split.stdout, split.stderr) == (0, "", "")
    assert (tmp_path / "out.jsonl").read_text() == whole.stdout and whole.stdout.count("\n") == 3

    (damaged,) = checkpoints(shutil.copytree(run / FOLDER, tmp_path / FOLDER))[-1:]
    file = next(iter(damaged.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    done = run_command("llada_train.cli", "sample", damaged, *options, "--processes", "2", "--tensor-parallel", "2")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {file}") and "its checksum differs" in line


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["--tensor-parallel", "2"], "takes 2 processes for each row, but 1 was started"),
        (["--processes", "3", "--tensor-parallel", "3"], "--tensor-parallel: model.num_heads 4"),
        (["--processes", "5", "--pipeline-parallel", "5"], "--pipeline-parallel: 5 stages, but the model has 4 layers"),
        (["--processes", "2", "--cache", "dual"], "--cache dual: keys and values are kept on one process only"),
    ],
)
def test_layouts_that_cannot_be_are_told_before_anything_starts(
    layout: list[str], message: str, finished: tuple[Path, str]
) -> None:
    with pytest.raises(UserError, match=message):
        run = str(load_config(finished[0]).run_dir)
        CliRunner().invoke(app, ["sample", run, "--prompt", "a", "--gen-length", "8", *layout], catch_exceptions=False)


def test_one_process_alone_is_the_same_run(tiny_data: Path, tmp_path: Path, finished: tuple[Path, str]) -> None:
    config = write_config(tiny_data, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    start(config, env=environment)
    assert losses_and_norms(config) == [pytest.approx(pair, rel=1e-4) for pair in losses_and_norms(finished[0])]


def test_initial_weights_from_a_checkpoint_or_a_hugging_face_folder(
    tiny_data: Path, tmp_path: Path, finished: tuple[Path, str], run_command: Run
) -> None:
    source = load_config(finished[0]).run_dir
    assert (
        run_command("llada_train.cli", "convert", "to-hf", source, tmp_path / "hf", "--dtype", "fp32").returncode == 0
    )
    one_step = [{"until_tokens": 16 * 32, "end": 0.0}]
    first = {}
    from_hf(tmp_path / "hf", tmp_path / "imported")
    for name, path in [("run", source), ("hf", tmp_path / "hf"), ("imported", tmp_path / "imported")]:
        folder = tmp_path / f"from-{name}"
        folder.mkdir()
        config = write_config(tiny_data, folder, init_from=str(path), optimizer__learning_rate=one_step)
        start(config)
        first[name] = losses_and_norms(config)
    assert first["run"] == first["hf"] == first["imported"]
    assert first["hf"][0][0] < 0.7 * losses_and_norms(finished[0])[0][0]
