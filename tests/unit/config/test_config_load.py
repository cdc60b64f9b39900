from pathlib import Path

import pytest
from good_config import GOOD, line_of, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_train.config.errors import UserError
from llada_train.config.load import differences, load_config, save_config


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def test_numbers_are_numbers(good: Path) -> None:
    config = load_config(good)
    phases = config.optimizer.learning_rate
    assert phases[0].end == 1e-4  # YAML 1.1 readers make a string of 1e-4
    assert [p.until_tokens for p in phases] == [100_000, 1_000_000]
    assert type(phases[0].end) is float
    assert type(phases[1].until_tokens) is int


def test_an_unknown_key_names_the_nearest_one(good: Path) -> None:
    good.write_text(GOOD.replace("weight: 2", "wieght: 2"))
    assert problems(good) == [
        f"data.corpora.1.wieght (good.yaml, line {line_of(GOOD, 'weight: 2')}): unknown key; did you mean 'weight'?"
    ]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("modle=1", "did you mean 'model'?"),
        ("optimizer.learning_rate.0.untl_tokens=3", "did you mean 'until_tokens'?"),
        ("checkpoint.intervall_steps=3", "did you mean 'interval_steps'?"),
        ("logging.zzz=3", "known keys: interval_steps"),
        ("micro_batch_size=3", "did you mean 'training.micro_batch_size'?"),
    ],
)
def test_unknown_keys_at_any_depth(good: Path, override: str, hint: str) -> None:
    assert problems(good, override) == [f"{override.partition('=')[0]} (override): unknown key; {hint}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=four", "valid integer"),
        ("model.num_layers=4.5", "valid integer"),
        ("model.num_layers=0", "greater than 0"),
        ("model.norm_eps=.inf", "finite"),
        ("optimizer.gradient_clipping=.nan", "finite"),
        ("optimizer.betas=[0.9]", "required"),
        ("optimizer.betas=[0.9, 1.0]", "less than 1"),
        ("optimizer.learning_rate=[]", "at least 1 item"),
        ("training.precision=fp16", "'bf16' or 'fp32'"),
        ("data.corpora={a: 1}", "has to be a valid list of sections with the keys path, "),
        ("optimizer.betas=3", "has to be a valid"),
        ("model=[1, 2]", "got a list"),
        ("model=", "got None"),
        ("objective.epsilon=0", "greater than 0"),
        ("objective.random_length_probability=1.1", "less than or equal to 1"),
        ("parallel.zero_stage=4", "has to be"),
        ("seed=-1", "greater than or equal to 0"),
    ],
)
def test_wrong_types_and_ranges(good: Path, override: str, message: str) -> None:
    (line,) = problems(good, override)
    assert line.startswith(override.partition("=")[0])
    assert message in line


def test_every_problem_is_told_at_once_with_its_line(good: Path) -> None:
    bad = (
        GOOD.replace("num_layers: 4", "num_layers: many")
        .replace("tokenizer: tok\n", "tokeniser: tok\n")
        .replace("      end: 0\n", "")
        .replace("micro_batch_size", "mirco_batch_size")
    )
    good.write_text(bad)
    lines = problems(good, "seed=-1", "nonsense", "model.hidden_size.x=1", "data.corpora.7.path=c")
    found = {line.partition(" (")[0].partition(":")[0]: line for line in lines}
    assert set(found) == {
        "override 'nonsense'",
        "override 'model.hidden_size.x=1'",
        "override 'data.corpora.7.path=c'",
        "seed",
        "model.num_layers",
        "data.tokenizer",
        "data.tokeniser",
        "optimizer.learning_rate.1.end",
        "training.micro_batch_size",
        "training.mirco_batch_size",
    }
    for key, needle in {
        "model.num_layers": "num_layers",
        "data.tokeniser": "tokeniser",
        "data.tokenizer": "data:",  # a missing key: the line of the section that lacks it
        "training.mirco_batch_size": "mirco_batch_size",
    }.items():
        assert f"(good.yaml, line {line_of(bad, needle)})" in found[key]


def test_overrides_reach_lists_and_sections_that_the_file_lacks(good: Path) -> None:
    config = load_config(
        good,
        [
            "data.corpora.1.weight=0.5",
            "optimizer.learning_rate.0.end=3e-4",
            "parallel.tensor_parallel=2",
            "objective={epsilon: 0.01}",
            "init_from=weights/v1.yaml",  # a path, not a section
        ],
    )
    assert config.data.corpora[1].weight == 0.5
    assert config.optimizer.learning_rate[0].end == 3e-4
    assert config.parallel.tensor_parallel == 2
    assert config.objective.epsilon == 0.01
    assert config.init_from == Path("weights/v1.yaml")


@pytest.mark.parametrize("text", ["a", "=1", "training.micro_batch_size=[1", "data.corpora.x.path=1", "run_dir.a.b=1"])
def test_a_bad_override_is_quoted(good: Path, text: str) -> None:
    (line,) = problems(good, text)
    assert line.startswith(f"override {text!r}: ")


def test_a_section_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, end = GOOD.index("model:"), GOOD.index("data:")
    section = "".join(line.removeprefix("  ") for line in GOOD[start:end].splitlines(keepends=True)[1:])
    (tmp_path / "model").mkdir()
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "model" / "m.yaml").write_text(section)
    path = tmp_path / "pretrain" / "p.yaml"
    path.write_text(GOOD[:start] + "model: ../model/m.yaml\n" + GOOD[end:])
    (tmp_path / "good.yaml").write_text(GOOD)
    assert load_config(path) == load_config(tmp_path / "good.yaml")
    assert load_config(path, ["model.num_layers=8"]).model.num_layers == 8

    (tmp_path / "model" / "wide.yaml").write_text(section.replace("64", "128"))
    monkeypatch.chdir(tmp_path)
    assert load_config(path, ["model=model/wide.yaml"]).model.hidden_size == 128  # from where the user stands

    (tmp_path / "model" / "m.yaml").write_text(section.replace("vocab_size: 500\n", "vocab_sise: 500\n"))
    line = line_of(section, "vocab_size")
    unknown, missing = sorted(problems(path), key=lambda text: "required" in text)
    assert unknown == f"model.vocab_sise (../model/m.yaml, line {line}): unknown key; did you mean 'vocab_size'?"
    assert missing == "model.vocab_size (../model/m.yaml, line 1): is required"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2\n", "line 2: not valid YAML"),
        (b"a: 1\na: 2\n", "line 2: not valid YAML: found duplicate key"),
        (b"", "found nothing"),
        (b"- 1\n", "found a list"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: 1\n\x07\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"x.yaml.*{message}"):
        load_config(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


rates = st.floats(0, 1, allow_subnormal=True)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**63 - 1),
            "run_dir": st.text("abc :#'\"{[-yesno.ü/0", min_size=1).map(lambda text: Path(text)),
            "eps": st.floats(0, 1e300, exclude_min=True),
            "ends": st.lists(rates, min_size=1, max_size=4),
            "starts": st.lists(st.none() | rates, min_size=4, max_size=4),
            "sequence_parallel": st.booleans(),
            "init_from": st.none() | st.just(Path("null")),
        }
    )
)
def test_a_saved_config_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, drawn: dict) -> None:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("config", numbered=True)
    (folder / "good.yaml").write_text(GOOD)
    config = load_config(folder / "good.yaml", ["parallel.tensor_parallel=2"])
    phases = [
        {"until_tokens": 10**i + 1, "end": end, "start": start}
        for i, (end, start) in enumerate(zip(drawn["ends"], drawn["starts"], strict=False))
    ]
    values = config.model_dump()
    values |= {key: drawn[key] for key in ("seed", "run_dir", "init_from")}
    values["optimizer"] |= {"eps": drawn["eps"], "learning_rate": phases}
    values["parallel"] |= {"sequence_parallel": drawn["sequence_parallel"]}
    config = type(config).model_validate(values)
    save_config(config, folder / "saved.yaml")
    assert load_config(folder / "saved.yaml") == config
    assert differences(load_config(folder / "saved.yaml"), config) == []


def test_differences_name_each_setting(good: Path) -> None:
    old = load_config(good)
    new = load_config(
        good, ["seed=7", "data.corpora.0.weight=3", "optimizer.learning_rate=[{until_tokens: 9, end: 0}]"]
    )
    assert differences(old, old) == []
    assert sorted(differences(old, new)) == [
        "data.corpora.0.weight: 1.0 → 3.0",
        "optimizer.learning_rate.0.end: 0.0001 → 0.0",
        "optimizer.learning_rate.0.until_tokens: 100000 → 9",
        "optimizer.learning_rate.1.end: 0.0 → None",
        "optimizer.learning_rate.1.until_tokens: 1000000 → None",
        "seed: 1234 → 7",
    ]


def test_the_vocabulary_is_padded(good: Path) -> None:
    assert load_config(good).model.padded_vocab_size == 512
