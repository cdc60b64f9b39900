"""Started processes get the command as it was given."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from llada_train.cli import app
from llada_train.commands.layout import _arguments

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
NUMBERS = st.floats(allow_nan=False)


def given_again(name: str, arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a command, and those of the processes that it starts."""
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, [*arguments])
    again, *others = _arguments(context, leave_out="processes")
    assert again == name
    return context.params, command.make_context(name, others).params


@given(
    model=WORDS, prompt=WORDS, output=WORDS, temperature=NUMBERS, cfg=NUMBERS, seed=st.integers(), chat=st.booleans()
)
def test_what_sample_is_given(
    model: str, prompt: str, output: str, temperature: float, cfg: float, seed: int, chat: bool
) -> None:
    """Options of any text, also with a dash, spaces or equals signs, given in one word or two; the last one counts."""
    options = ["--processes", "2", "--prompt", "another", "--prompt", prompt, f"--output={output}", f"--seed={seed}"]
    options += ["--temperature", str(temperature), f"--cfg={cfg}", "--remasking", "random", *["--chat"] * chat]
    first, again = given_again("sample", [*options, "--", model])
    assert (first["processes"], str(first["prompt"]), first["chat"]) == (2, prompt, chat)
    assert again == {**first, "processes": None}


@given(model=WORDS, settings=st.lists(WORDS, max_size=3), limit=st.integers(1))
def test_what_evaluate_is_given(model: str, settings: list[str], limit: int) -> None:
    """An option given several times is given several times."""
    options = [f"--set={one}" for one in settings]
    first, again = given_again("evaluate", [*options, f"--limit={limit}", "--json", "--processes=3", "--", model])
    assert list(first["setting"] or []) == settings and first["as_json"]
    assert again == {**first, "processes": None}
