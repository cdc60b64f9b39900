import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from llada_train.config.errors import UserError
from llada_train.config.load import differences, load_config, save_config
from llada_train.config.schema import Config, check_world_size, cross_section_problems

GOOD = """\
run_dir: runs/x
model:
  num_layers: 4
  hidden_size: 64
  num_heads: 4
  num_kv_heads: 2
  ffn_hidden_size: 160
  vocab_size: 500
  max_sequence_length: 128
data:
  tokenizer: tok
  sequence_length: 128
  corpora:
    - path: a
    - path: b
      weight: 2
optimizer:
  learning_rate:
    - until_tokens: 100_000
      end: 1e-4
    - until_tokens: 1e+6
      end: 0
training:
  global_batch_size: 16
  micro_batch_size: 4
"""


GOOD_TREE = YAML(typ="safe", pure=True).load(GOOD)


def line_of(text: str, needle: str) -> int:
    return text[: text.index(needle)].count("\n") + 1


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def problems(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    """The lines of the one error, less its heading, without the folder's name."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, world_size)
    heading, *lines = str(caught.value).replace(f"{path.parent}/", "").splitlines()
    count = re.search(r"(\d+) problems? in the config:$", heading)
    assert count is not None
    assert int(count[1]) == len(lines)
    return [line.strip() for line in lines]


def changed(**sections: dict[str, Any]) -> Config:
    """GOOD with some settings replaced."""
    replaced = {name: GOOD_TREE.get(name, {}) | values for name, values in sections.items()}
    return Config.model_validate(GOOD_TREE | replaced)


def told(config: Config, world_size: int | None = None) -> list[str]:
    """The messages about `config`, and if there are none those about the processes it is started on."""
    found = cross_section_problems(config)
    if not found and world_size is not None:
        found = check_world_size(config, world_size)
    return [message for _, message in found]


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
        ("data.corpora={a: 1}", "valid list (got a section)"),
        ("model=[1, 2]", "got a list"),
        ("model=", "got None"),
        ("objective.epsilon=0", "greater than 0"),
        ("objective.random_length_probability=1.1", "less than or equal to 1"),
        ("parallel.zero_stage=4", "Input should be"),
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


@pytest.mark.parametrize(
    ("overrides", "key", "message", "mends"),
    [
        (
            ["model.hidden_size=66"],
            "model.num_heads",
            "hidden_size 66 is not divisible by num_heads 4",
            ["model.hidden_size=64"],
        ),
        (
            ["model.num_kv_heads=3"],
            "model.num_kv_heads",
            "num_heads 4 is not divisible by num_kv_heads 3",
            ["model.num_kv_heads=2"],
        ),
        (["model.hidden_size=4"], "model.num_heads", "head size 1 is odd", ["model.hidden_size=8"]),
        (["data.corpora.1.path=a"], "data.corpora", "a is listed more than once", ["data.corpora=[{path: a}]"]),
        (
            ["optimizer.learning_rate.1.until_tokens=9"],
            "optimizer.learning_rate.1.until_tokens",
            "9 does not come after the phase before, which ends at 100,000",
            ["optimizer.learning_rate.1.until_tokens=100001"],
        ),
        (
            ["parallel.tensor_parallel=4"],
            "parallel.tensor_parallel",
            "model.num_kv_heads 2 is not divisible by 4; it can be 1, 2",
            ["parallel.tensor_parallel=1", "parallel.tensor_parallel=2"],
        ),
        (
            ["parallel.tensor_parallel=2", "model.ffn_hidden_size=161"],
            "parallel.tensor_parallel",
            "model.ffn_hidden_size 161 is not divisible by 2; it can be 1",
            ["parallel.tensor_parallel=1"],
        ),
        (
            [
                "parallel.tensor_parallel=3",
                "model.hidden_size=48",
                "model.num_heads=6",
                "model.num_kv_heads=3",
                "model.ffn_hidden_size=159",
            ],
            "parallel.tensor_parallel",
            "model.padded_vocab_size 512 is not divisible by 3; it can be 1",
            ["parallel.tensor_parallel=1", "model.vocab_size=300"],  # the latter is padded to 3 × 128
        ),
        (
            ["parallel.virtual_pipeline_parallel=2"],
            "parallel.virtual_pipeline_parallel",
            "pipeline_parallel is 1; raise it or set this to 1",
            ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=1"],
        ),
        (
            ["parallel.pipeline_parallel=5"],
            "parallel.pipeline_parallel",
            "5 × virtual_pipeline_parallel 1 = 5 stages, but the model has 4 layers; lower one of the two",
            ["parallel.pipeline_parallel=4"],
        ),
        (
            ["parallel={pipeline_parallel: 3, virtual_pipeline_parallel: 2}"],
            "parallel.pipeline_parallel",
            "3 × virtual_pipeline_parallel 2 = 6 stages, but the model has 4 layers; lower one of the two",
            ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=1"],
        ),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel",
            "tensor_parallel is 1; raise it or set this to false",
            ["parallel.tensor_parallel=2", "parallel.sequence_parallel=false"],
        ),
        (
            ["parallel={tensor_parallel: 2, sequence_parallel: true}", "data.sequence_length=127"],
            "parallel.sequence_parallel",
            "data.sequence_length 127 is not divisible by tensor_parallel 2; "
            "make the length a multiple of 2, or set this to false",
            ["data.sequence_length=126", "parallel.sequence_parallel=false"],
        ),
        (
            ["parallel={tensor_parallel: 2, context_parallel: 2, sequence_parallel: true}", "data.sequence_length=126"],
            "parallel.sequence_parallel",
            "data.sequence_length 126 ÷ context_parallel 2 is not divisible by tensor_parallel 2; "
            "make the length a multiple of 4, or set this to false",
            ["data.sequence_length=124", "parallel.sequence_parallel=false"],
        ),
        (
            ["parallel={tensor_parallel: 2, context_parallel: 3, sequence_parallel: true}", "data.sequence_length=124"],
            "parallel.context_parallel",  # and nothing about a slice that there is not
            "data.sequence_length 124 is not divisible by 3; lower this, or make the length a multiple of it",
            ["parallel.context_parallel=2", "data.sequence_length=126"],
        ),
        *(
            (
                [f"parallel={{pipeline_parallel: 2, zero_stage: {stage}}}"],
                "parallel.zero_stage",
                f"{stage} splits gradients that pipeline stages still add to; with pipeline_parallel 2 use "
                "zero_stage 1, or set pipeline_parallel to 1",
                ["parallel.zero_stage=1", "parallel.pipeline_parallel=1"],
            )
            for stage in (2, 3)
        ),
        (
            ["data.sequence_length=129"],
            "data.sequence_length",
            "129 is more than model.max_sequence_length 128",
            ["data.sequence_length=128", "model.max_sequence_length=129"],
        ),
        (
            ["training.micro_batch_size=5"],
            "training.global_batch_size",
            "16 is not divisible by training.micro_batch_size 5",
            ["training.micro_batch_size=2", "training.global_batch_size=15"],
        ),
    ],
)
def test_settings_that_contradict_each_other(
    good: Path, overrides: list[str], key: str, message: str, mends: list[str]
) -> None:
    """The one problem is told where it can be mended; each setting that the message names mends it."""
    (line,) = problems(good, *overrides)
    assert line.startswith(f"{key} (")
    assert message in line
    for mend in mends:
        load_config(good, [*overrides, mend])


@pytest.mark.parametrize(
    "parallel",
    [
        "{tensor_parallel: 2, context_parallel: 4, sequence_parallel: true, zero_stage: 3}",
        "{pipeline_parallel: 3}",  # 4 layers: 2, 1, 1
        "{pipeline_parallel: 4, context_parallel: 2}",
        "{tensor_parallel: 2, pipeline_parallel: 2, virtual_pipeline_parallel: 2, sequence_parallel: true}",
    ],
)
def test_layouts_that_fit(good: Path, parallel: str) -> None:
    load_config(good, [f"parallel={parallel}"])


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(1, 6), st.integers(1, 200), st.integers(1, 2000))
def test_the_tensor_parallel_sizes_that_a_refusal_lists_are_those_that_fit(
    tp: int, kv_heads: int, queries: int, ffn: int, vocab: int
) -> None:
    heads = kv_heads * queries
    model = {"num_heads": heads, "num_kv_heads": kv_heads, "hidden_size": 8 * heads, "ffn_hidden_size": ffn}
    refused = told(changed(model={**model, "vocab_size": vocab}, parallel={"tensor_parallel": tp}))
    if refused:
        listed = {tuple(map(int, line.partition("; it can be ")[2].split(", "))) for line in refused}
        fitting = [
            size
            for size in range(1, heads + 1)
            if not told(changed(model={**model, "vocab_size": vocab}, parallel={"tensor_parallel": size}))
        ]
        assert listed == {tuple(fitting)}
        assert tp not in fitting


def test_contradictions_are_told_together(good: Path) -> None:
    overrides = ["parallel={pipeline_parallel: 5, zero_stage: 2, context_parallel: 3}", "training.micro_batch_size=5"]
    lines = problems(good, *overrides, "data.sequence_length=130", world_size=4)
    assert [re.split("[ :]", line)[0] for line in lines] == [
        "parallel.pipeline_parallel",
        "parallel.zero_stage",
        "parallel.context_parallel",
        "data.sequence_length",
        "training.global_batch_size",
        "parallel",  # 15 processes work on a row, and 4 were started
    ]


def test_a_size_that_fits_nothing_is_told_for_each_reason(good: Path) -> None:
    lines = problems(good, "parallel.tensor_parallel=3")
    assert [line.partition(": ")[2] for line in lines] == [
        f"model.{name} {size} is not divisible by 3; it can be 1, 2"
        for name, size in [
            ("num_heads", 4),
            ("num_kv_heads", 2),
            ("ffn_hidden_size", 160),
            ("padded_vocab_size", 512),
        ]
    ]


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["parallel={tensor_parallel: 2, pipeline_parallel: 2}"],
            6,
            "tensor_parallel 2 × pipeline_parallel 2 = 4 processes work on a row together, but 6 were started; "
            "start a multiple of 4 (for example 4)",
        ),
        (
            ["parallel={tensor_parallel: 2, context_parallel: 2}"],
            11,
            "tensor_parallel 2 × context_parallel 2 = 4 processes work on a row together, but 11 were started; "
            "start a multiple of 4 (for example 8)",
        ),
        (
            ["parallel={tensor_parallel: 2, pipeline_parallel: 3, context_parallel: 2}"],
            4,
            "tensor_parallel 2 × pipeline_parallel 3 × context_parallel 2 = 12 processes work on a row together, "
            "but 4 were started; start a multiple of 12 (for example 12)",
        ),
        (["parallel.pipeline_parallel=4"], 3, "(for example 4)"),
        (
            [],
            3,
            "16 is not a multiple of micro_batch_size 4 × data-parallel 3 (3 processes ÷ 1) = 12; "
            "lower micro_batch_size, or raise this: the next larger one is 24",
        ),
        (["parallel.tensor_parallel=2", "training.global_batch_size=8"], 6, "(6 processes ÷ 2) = 12"),
        (["parallel.context_parallel=2"], 6, "micro_batch_size 4 × data-parallel 3 (6 processes ÷ 2) = 12"),
        (
            ["parallel={pipeline_parallel: 2, virtual_pipeline_parallel: 2}", "training.global_batch_size=24"],
            4,
            "24 is not a multiple of micro_batch_size 4 × data-parallel 2 (4 processes ÷ 2) × pipeline_parallel 2 "
            "(the interleaved schedule takes that many micro-batches at a time) = 16; lower micro_batch_size, or "
            "raise this: the next larger one is 32",
        ),
    ],
)
def test_the_world_size_message_does_the_sum(good: Path, overrides: list[str], world_size: int, message: str) -> None:
    (line,) = problems(good, *overrides, world_size=world_size)
    assert message in line


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        ([], 2),
        ([], 4),
        (["parallel.context_parallel=2"], 8),  # columns are shared, so that 4 read other rows
        (["parallel={tensor_parallel: 2, pipeline_parallel: 3, context_parallel: 2}"], 24),
        (["parallel.pipeline_parallel=2", "training.global_batch_size=24"], 4),  # not interleaved: any number
    ],
)
def test_world_sizes_that_fit(good: Path, overrides: list[str], world_size: int) -> None:
    load_config(good, overrides, world_size)


@settings(deadline=None)
@given(
    parallel=st.fixed_dictionaries(
        {
            "tensor_parallel": st.sampled_from([1, 2]),
            "pipeline_parallel": st.integers(1, 3),
            "virtual_pipeline_parallel": st.integers(1, 2),
            "context_parallel": st.sampled_from([1, 2, 4]),
        }
    ),
    micro=st.integers(1, 5),
    micro_batches=st.integers(1, 40),
    data_parallel=st.integers(0, 8),
    over=st.sampled_from([0, 0, 1, 5]),
)
def test_what_a_refusal_of_the_world_size_proposes_is_accepted(
    parallel: dict[str, int], micro: int, micro_batches: int, data_parallel: int, over: int
) -> None:
    together = parallel["tensor_parallel"] * parallel["pipeline_parallel"] * parallel["context_parallel"]
    world_size = together * data_parallel + over
    interleaved = parallel["virtual_pipeline_parallel"] > 1
    assume(world_size > 0 and (parallel["pipeline_parallel"] > 1 or not interleaved))

    def config(batch: int) -> Config:
        training = {"global_batch_size": batch, "micro_batch_size": micro}
        return changed(model={"num_layers": 6}, parallel=parallel, training=training)

    def fits(batch: int) -> bool:
        """Whole micro-batches on each rank, and for the interleaved schedule whole groups of pipeline_parallel."""
        each, rest = divmod(batch, world_size // together * micro)
        return rest == 0 and not (interleaved and each % parallel["pipeline_parallel"])

    batch = micro * micro_batches
    refused = told(config(batch), world_size)
    if world_size % together:
        (line,) = refused
        proposed = re.search(r"start a multiple of (\d+) \(for example (\d+)\)", line)
        assert proposed is not None
        assert int(proposed[1]) == together
        assert not [line for line in told(config(batch), int(proposed[2])) if "were started" in line]
    elif fits(batch):
        assert refused == []
    else:
        (line,) = refused
        larger = int(line.rpartition("the next larger one is ")[2])
        assert told(config(larger), world_size) == []
        assert larger > batch
        assert not any(fits(between) for between in range(batch, larger))


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


def test_a_run_is_rounded_up_to_whole_steps(good: Path) -> None:
    config = load_config(good)  # 1,000,000 tokens in steps of 16 × 128
    assert config.train_samples == 489 * 16
    assert config.model.padded_vocab_size == 512
