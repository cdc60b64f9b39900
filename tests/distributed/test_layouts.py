"""The layout matrix: same seed, data and noise give the same losses, gradient norms and weights in every layout."""

from collections.abc import Iterator
from datetime import date

import pytest
from conftest import ROOT
from layouts import CHOSEN, SFT_CHOSEN, Layout, every_layout
from matrix import TOLERANCE, Matrix, report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "precision" in metafunc.fixturenames and "layout" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_layout")
        runs = [
            pytest.param(precision, layout, id=f"{precision}-{layout.name}")
            for layout in (every_layout() if every else CHOSEN)
            for precision in TOLERANCE
            if every or precision == "fp32" or layout.processes <= 4  # else they take too long for every change
        ]
        metafunc.parametrize(("precision", "layout"), runs)


@pytest.fixture(scope="module", autouse=True)
def table(matrices: dict[str, Matrix], request: pytest.FixtureRequest) -> Iterator[None]:
    """What was compared is written as a table in the end."""
    yield
    path = ROOT / "runs/layout_matrix.md"
    if request.config.getoption("every_layout"):
        path = ROOT / f"benchmarks/results/layout_matrix_{date.today().isoformat()}.md"
    if any(matrix.deviations for matrix in matrices.values()):
        path.parent.mkdir(exist_ok=True)
        path.write_text(report(matrices), encoding="utf-8")


def test_layout_trains_as_one_process(matrices: dict[str, Matrix], precision: str, layout: Layout) -> None:
    """Losses, gradient norms, bound by t, validation, final weights; noise, targets and loss weights bit for bit."""
    matrices[precision].check(matrices[precision].run(layout))


@pytest.mark.parametrize(
    ("layout", "overrides"), SFT_CHOSEN, ids=["-".join([layout.name, *rows]) for layout, rows in SFT_CHOSEN]
)
def test_layout_fine_tunes_as_one_process(sft_matrix: Matrix, layout: Layout, overrides: tuple[str, ...]) -> None:
    """The same of dialogues: rows of many lengths or packed, each with an unmasked prompt and a response's weight."""
    sft_matrix.check(sft_matrix.run(layout, *overrides))


@pytest.mark.parametrize(
    ("precision", "repeated"),
    [
        ("fp32", Layout(tensor_parallel=2, pipeline_parallel=2, context_parallel=2, sequence_parallel=True)),
        ("bf16", Layout(pipeline_parallel=2, virtual_pipeline_parallel=2, recompute="selective")),
        ("bf16", Layout(2, tensor_parallel=2, zero_stage=3, recompute="full")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_same_layout_is_repeated_bit_for_bit(matrices: dict[str, Matrix], precision: str, repeated: Layout) -> None:
    """To the last bit of every rank's masters and moments."""
    assert matrices[precision].run(repeated) == matrices[precision].run(repeated)


def test_documents_attend_to_themselves_in_any_layout(matrices: dict[str, Matrix]) -> None:
    """Their borders cross the slices of columns; what one process does is held against a plain loop elsewhere."""
    matrix = matrices["fp32"]
    layout = Layout(tensor_parallel=2, pipeline_parallel=2, context_parallel=2, sequence_parallel=True)
    matrix.check(matrix.run(layout, "data.rows=document_attention"))


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("fp32", Layout(tensor_parallel=2, sequence_parallel=True)),
        ("bf16", Layout(tensor_parallel=2, data_parallel=2, zero_stage=3)),
    ],
)
def test_the_head_may_work_in_pieces(matrices: dict[str, Matrix], kind: str, split: Layout) -> None:
    """Logits that are more than memory is to hold; against one process that has them whole."""
    matrix = matrices[kind]
    matrix.check(matrix.run(split, fault="head_in_pieces"))
