"""The layout matrix: same seed, data and noise give the same losses, gradient norms and weights in every layout."""

import pytest
from layouts import CHOSEN, Layout, every_layout
from matrix import TOLERANCE, Matrix


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        layouts = list(every_layout()) if metafunc.config.getoption("every_layout") else CHOSEN
        metafunc.parametrize("layout", layouts, ids=lambda layout: layout.name)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_layout_trains_as_one_process(matrices: dict[str, Matrix], precision: str, layout: Layout) -> None:
    """Losses, gradient norms, bound by t, validation, final weights; noise, targets and loss weights bit for bit."""
    matrices[precision].check(layout, matrices[precision].run(layout))


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_same_layout_is_repeated_bit_for_bit(matrices: dict[str, Matrix], precision: str) -> None:
    """To the last bit of every rank's masters and moments."""
    layout = Layout(tensor_parallel=2, pipeline_parallel=2, context_parallel=2, sequence_parallel=True)
    assert matrices[precision].run(layout) == matrices[precision].run(layout)
