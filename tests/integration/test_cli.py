"""The command line as a user meets it."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("module", ["llada_train.cli", "data_tools.cli"])
def test_help_imports_nothing_heavy_and_answers_at_once(module: str) -> None:
    heavy = {"torch", "megatron", "deepspeed", "transformers"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    best = float("inf")
    for _ in range(3):  # the quickest of three: a busy machine is not the program's fault
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", module, "--help"], check=True, capture_output=True, text=True)
        assert "Usage" in done.stdout
        best = min(best, time.perf_counter() - started)
    assert best < 1.0


@pytest.mark.parametrize(
    "command",
    ["pretrain", "convert to-hf", "convert from-hf", "sample", "evaluate"],
)
def test_every_command_explains_itself(run_command: Run, command: str) -> None:
    done = run_command("llada_train.cli", *command.split(), "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "no-such.yaml"], "no-such.yaml: no such config file"),
        (["convert", "to-hf", "nowhere", "out"], "nowhere: no such folder"),
        (["convert", "from-hf", "nowhere", "out"], "nowhere: no such folder"),
        (["sample", "nowhere", "--prompt", "a"], "nowhere: no such folder"),
        (["sample", "nowhere"], "give either --prompt or --infill"),
        (["evaluate", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(run_command: Run, arguments: list[str], message: str) -> None:
    done = run_command("llada_train.cli", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
