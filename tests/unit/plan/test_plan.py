"""Plans of LLaDA 8B, against its paper and against sums that can be done by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from llada_train.cli import app
from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.config.rules import check_world_size, cross_section_problems
from llada_train.plan.chips import CHIPS, chip_called, chip_of_device
from llada_train.plan.layout import Layout
from llada_train.plan.memory import logits_at_peak, logits_kept, memory
from llada_train.plan.plan import Machine, Plan, make_plan
from llada_train.plan.search import search

CONFIG = ROOT / "configs/pretrain/llada_8b.yaml"
ALONE = ["parallel={}", "training.recompute=selective"]  # TP 1, PP 1
H800S = Machine("h800", chip_called("h800"), nodes=32, gpus_per_node=8)


def planned(*overrides: str, machine: Machine = H800S, mfu: float | None = None) -> Plan:
    return make_plan(load_config(CONFIG, [*ALONE, *overrides], machine.gpus), machine, mfu)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if isinstance(result.exception, UserError):
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_papers_run_takes_the_papers_gpu_hours() -> None:
    """0.13 million H800-hours for 2.3T tokens (§2.2) are an MFU of 25.6 %: 4,915 tokens per second and GPU."""
    plan = planned("training.micro_batch_size=1", mfu=0.256)
    assert plan.gpu_hours == pytest.approx(130_000, rel=5e-3)
    assert plan.tokens_per_second_and_gpu == pytest.approx(4_915, rel=5e-3)
    assert plan.hours == plan.gpu_hours / 256
    assert plan.tokens == plan.steps * 1280 * 4096 and plan.steps == -(-2_300_000_000_000 // (1280 * 4096))


def test_an_8b_on_one_gpu_by_hand() -> None:
    """8,015,581,184 parameters: 2 bytes of weights, 4 of gradients, 12 of master and moments."""
    config = load_config(CONFIG, [*ALONE, "training.micro_batch_size=2"])
    (one,) = memory(Layout(config, 1, 4096, 1280))
    n = 8_015_581_184
    assert (one.weights, one.gradients, one.optimizer) == (2 * n, 4 * n, 12 * n)
    layer = 28 * 4096 + 4 * 32  # bytes of each token: 14·H elements where F = 3·H; a log-normaliser for each head
    ends = 2 * 4096 + 2 * 4096 + 4 + 2 * 4 * 128  # the last norm's input, the head's, a factor; cos and sin
    assert one.activations == 2 * 4096 * (32 * layer + ends)
    pieces = 2**28 // 126_464 * 126_464  # the head's, of 1 GiB of fp32: two of them, as fp32 and as gradients in bf16
    assert one.logits == 2 * pieces * 6 + 126_464 * 4096 * 4  # and its weights' gradient in fp32


def test_what_a_stage_and_a_tensor_rank_hold_add_up_to_the_model() -> None:
    overrides = ["parallel.tensor_parallel=4", "parallel.pipeline_parallel=4", "training.micro_batch_size=1"]
    plan = planned(*overrides)
    norms = 65 * 4096
    held = sum(holding.parameters for holding in plan.main.layout.holdings)
    assert 4 * held == 8_015_581_184 + 3 * norms  # each tensor rank has the norms
    first, *_, last = plan.memory
    assert first.activations > last.activations  # four micro-batches in flight, and one
    assert first.logits == 0 < last.logits


def test_zero_divides_what_it_says() -> None:
    one, two, three = (
        planned(f"parallel.zero_stage={stage}", "training.micro_batch_size=1").memory[0] for stage in (1, 2, 3)
    )
    whole = 8_015_581_184
    assert one.weights == two.weights >= 2 * whole > 200 * three.weights
    assert one.gradients >= 4 * whole > 200 * two.gradients
    assert one.optimizer == two.optimizer == pytest.approx(12 * whole / 256, rel=1e-6)


def test_logits_are_kept_while_they_are_few() -> None:
    """Up to 2**28 of them: 4 ranks have 31,616 of the vocabulary each, of 8,490 positions."""
    overrides = ["parallel.tensor_parallel=4", "training.micro_batch_size=1"]
    one, four = planned(*overrides).main.layout, planned(*overrides, "training.micro_batch_size=4").main.layout
    assert logits_kept(one) == 4096 * 31_616 * 4 and logits_kept(four) == 0
    assert logits_at_peak(one) == 4096 * 31_616 * 6 + 2 * 2 * 31_616 * 4096
    assert logits_at_peak(four) == 2 * (2**28 // 31_616 * 31_616) * 6 + 4 * 31_616 * 4096


def test_a_schedule_changes_steps_and_memory() -> None:
    """Half the tokens at half the length and twice the batch: as many tokens a step; the longer rows set the memory."""
    long = planned("training.micro_batch_size=1")
    ramp = planned(
        "training.micro_batch_size=1",
        "data.sequence_length=2048",
        "training.global_batch_size=2560",
        "data.block_length=4096",
        "schedule=[{from_tokens: 1_150_000_000_000, sequence_length: 4096, global_batch_size: 1280}]",
    )
    first, second = ramp.phases
    assert (first.layout.sequence_length, first.layout.global_batch_size) == (2048, 2560)
    assert second.from_tokens >= 1_150_000_000_000 == pytest.approx(second.from_tokens, rel=1e-4)
    assert ramp.steps == pytest.approx(long.steps, abs=2)
    assert ramp.memory == long.memory
    assert first.model_flops < second.model_flops  # attention is cheaper over shorter rows
    mixture = planned("training.micro_batch_size=1", "schedule=[{from_tokens: 1_000_000_000, weights: {data/code: 1}}]")
    assert [phase.steps for phase in mixture.phases] == [long.steps]


def test_interleaving_makes_the_bubble_smaller() -> None:
    pipeline = ["parallel.pipeline_parallel=4", "training.micro_batch_size=1"]
    plain, chunks = planned(*pipeline), planned(*pipeline, "parallel.virtual_pipeline_parallel=2")
    m = 1280 // 64
    assert plain.main.layout.bubble == pytest.approx(3 / (m + 3))
    assert chunks.main.layout.bubble == pytest.approx(3 / (2 * m + 3))
    assert chunks.main.layout.chunks_in_flight(0) == [4] * (2 * 3 + 4 + 1)
    assert plain.main.layout.chunks_in_flight(3) == [8]


def test_what_is_found_is_legal_fits_and_is_ranked() -> None:
    found = search(load_config(CONFIG, ALONE), H800S, None, 1e10, {"parallel.pipeline_parallel", "parallel.zero_stage"})
    assert 0 < len(found.fitting) < found.layouts
    times = [one.estimated_seconds for one in found.fitting]
    assert times == sorted(times)
    for one in found.fitting[:: len(found.fitting) // 20]:
        assert not cross_section_problems(one.config) and not check_world_size(one.config, 256)
        assert one.memory[one.fullest].total <= H800S.chip.memory_bytes
        assert one.config.parallel.pipeline_parallel == 1 == one.config.parallel.zero_stage
    assert found.best[0] is found.fitting[0]
    assert len({(one.config.parallel.tensor_parallel, one.config.parallel.context_parallel) for one in found.best}) == (
        len(found.best)
    )


def test_searched_layouts_as_a_table_and_as_json() -> None:
    arguments = [CONFIG, "--nodes", 4, "--gpu", "h200", "--search", "parallel.tensor_parallel=1"]
    pinned = [*arguments, "parallel.pipeline_parallel=1", "parallel.context_parallel=1"]
    code, output = run(*pinned, "--json")
    told = json.loads(output)
    assert code == 0 and told["layouts"] >= told["fitting"] >= len(told["best"]) == 3  # ZeRO stages
    assert {one["layout"]["tensor_parallel"] for one in told["best"]} == {1}
    assert f"{told['fitting']:,} of {told['layouts']:,}" in run(*pinned)[1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_fits_a_node_of_h100s_somehow(path: Path) -> None:
    found = search(load_config(path), Machine("h100", chip_called("h100"), 1, 8), None, 1e10)
    assert found.fitting and all(one.fits and one.gpu_hours > 0 for one in found.best)


def test_the_command_says_what_does_not_fit_and_what_would() -> None:
    code, output = run(CONFIG, "--nodes", 1, "--gpu", "h800", *ALONE, "training.micro_batch_size=2")
    assert code == 1
    assert "DOES NOT FIT" in output
    suggested = next(line for line in output.splitlines() if line.startswith("fits, ")).partition(": ")[2].split()
    assert run(CONFIG, "--nodes", 1, "--gpu", "h800", *ALONE, "training.micro_batch_size=2", *suggested)[0] == 0


def test_json_is_the_same_plan() -> None:
    arguments = [CONFIG, "--nodes", 32, "--gpu", "H800", *ALONE, "training.micro_batch_size=1", "--mfu", 0.4]
    code, output = run(*arguments, "--json")
    told, plan = json.loads(output), planned("training.micro_batch_size=1", mfu=0.4)
    assert code == 0 and told["fits"] and told["parameters"] == 8_015_581_184
    assert told["memory"][0]["total"] == plan.memory[0].total
    assert told["gpu_hours"] == plan.gpu_hours
    assert sum(one["sent"] for one in told["sent_per_step"]) > 0
    assert f"{plan.gpu_hours:,.0f} GPU-hours" in run(*arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", 32, "--gpu", "h900"], "--gpu h900: is not known; known are h100 pcie"),
        (["--nodes", 3, "--gpu", "h800", *ALONE], "training.global_batch_size"),
        (["--nodes", 32, "--gpu", "h800", "--mfu", 40], "--mfu 40.0: is a share"),
        (["--nodes", 32, "--gpu", "h800", "training.micro_batch=1"], "did you mean 'micro_batch_size'?"),
        (["--nodes", 32, "--gpu", "h800", "--cluster", ROOT / "configs/cluster/cpu.yaml"], "node.gpus is 0"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[object], message: str) -> None:
    code, output = run(CONFIG, *arguments)
    assert code == 2 and message in output


def test_chips_by_the_names_that_cuda_gives() -> None:
    assert chip_of_device("NVIDIA H100 80GB HBM3") is CHIPS["H100"]
    assert chip_of_device("NVIDIA H100 PCIe") is CHIPS["H100 PCIe"]
    assert chip_of_device("NVIDIA GB200") is CHIPS["GB200"]
    assert chip_of_device("NVIDIA GH200 480GB") is CHIPS["GH200"]
    assert chip_of_device("NVIDIA A800-SXM4-80GB") is CHIPS["A800"]
    assert chip_of_device("cpu") is None is chip_of_device("NVIDIA RTX A1000 Laptop GPU")
    assert chip_called("H100-PCIe") is CHIPS["H100 PCIe"]


def test_a_plan_needs_no_torch(tmp_path: Path) -> None:
    """From a folder that has neither data nor run."""
    code = "import sys, llada_train.cli as c, typer.testing as t; " + (
        f"r = t.CliRunner().invoke(c.app, ['plan', {str(CONFIG)!r}, '--nodes', '8', '--gpu', 'h100']); "
        "print(r.output); assert 'GPU-hours' in r.output; assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=100)
