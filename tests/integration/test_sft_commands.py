"""Fine-tuning by the commands: from a config to a chat model, and from one model to the next."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import sft_settings, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from llada_train.data.chat import ChatTemplate, Message
from llada_train.data.tokenizer import Tokenizer
from llada_train.training.metrics import read_metrics

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_a_run_from_pairs_to_a_chat_model_and_on_from_there(
    tiny_data: Path, tmp_path: Path, run_command: Command
) -> None:
    phases = [{"until_steps": 4, "end": 1e-2}, {"until_epochs": 2, "end": 1e-2}]
    settings = {**sft_settings(tiny_data), "optimizer__learning_rate": phases, "validation__answers": 6}
    (tmp_path / "first").mkdir()
    config = write_config(tiny_data, tmp_path / "first", **settings)
    wrong = run_command("llada_train.cli", "pretrain", config)
    assert wrong.returncode == 2 and "has a section sft; run it with `llada-train sft`" in wrong.stderr

    done = run_command("llada_train.cli", "sft", config, "--processes", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pairs.jsonl: prompt=prompt, response=response; 200 dialogues, 200 trained on or held out" in done.stdout
    assert "assistant<|end_header_id|>\n\n⟦" in done.stdout and "<|eot_id|><|endoftext|>⟧" in done.stdout
    run = tmp_path / "first/run"
    records = read_metrics(run)
    train = [record for record in records if record["kind"] == "train"]
    assert train[-1]["step"] == 23  # two epochs of 180 in batches of 16
    assert train[-1]["loss"] < 0.5 * train[0]["loss"]
    told = [record["exact_match"] for record in records if record["kind"] == "validation"]
    assert told and all(0 <= share <= 1 for share in told)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert len(events.Scalars("validation/exact_match")) == len(told)

    report = json.loads(run_command("llada_train.cli", "evaluate", run, "--json").stdout)
    assert report["examples"] == 8 and report["bound"] < 3

    exported = run_command("llada_train.cli", "convert", "to-hf", run, tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    assert "fine-tuned on dialogues" in (tmp_path / "hf/README.md").read_text()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = ChatTemplate("llada", Tokenizer.load(tiny_data / "tokenizer"))
    asked = [Message("user", "the of")]
    text = theirs.apply_chat_template([asked[0]._asdict()], tokenize=False, add_generation_prompt=True)
    assert theirs(text, add_special_tokens=False).input_ids == ours.prompt(asked)

    (tmp_path / "second").mkdir()
    parallel = {"tensor_parallel": 2, "sequence_parallel": True}
    one_step = {"optimizer__learning_rate": [{"until_steps": 1, "end": 0.0}], "init_from": str(run)}
    second = write_config(tiny_data, tmp_path / "second", **{**settings, **one_step, "parallel": parallel})
    done = run_command("llada_train.cli", "sft", second, "--processes", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_metrics(tmp_path / "second/run")[0]["loss"] < 0.5 * train[0]["loss"]
