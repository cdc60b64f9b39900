"""`llada-train evaluate` and `sample` as a user runs them, lm-evaluation-harness on tasks of files of our own."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hf_folders import checkpoint, released_folder
from typer.testing import CliRunner

from llada_train.cli import app
from llada_train.config.errors import UserError
from llada_train.config.schema import ModelConfig
from llada_train.convert.load import load_plain
from llada_train.evaluation.likelihood import log_likelihoods
from llada_train.evaluation.suite import Suite, Task, read_suite
from llada_train.evaluation.tasks import check_tasks
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.plain import PlainDenoiser
from llada_train.sampling.text import continue_prompts

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    {"question": "the sky is", "choices": [" blue", " green and old"], "answer": 0},
    {"question": "one and one", "choices": [" is two", " is"], "answer": 1},
    {"question": "a", "choices": [" b", " c"], "answer": 0},
]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "local_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "hf"
    released_folder(folder)
    return folder


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def in_process(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return done


@pytest.fixture(scope="module")
def offline() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_tasks_of_the_harness_are_scored_as_by_hand(
    model: Path, local_tasks: Path, tmp_path: Path, offline: dict[str, str]
) -> None:
    """Two processes hold the model together; they find what the estimators and the sampler give by themselves."""
    from llada_train.evaluation.harness import request_keys

    suite, output = tmp_path / "suite.yaml", tmp_path / "results.json"
    suite.write_text(
        "settings: {samples: 4, cfg: 0.5, seed: 7}\ntasks: [{task: local_choice}, {task: local_answer, chat: true}, "
        "{task: local_text, settings: {cfg: 0, estimator: chain}}]\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "llada_train.cli", "evaluate", model, "--suite", suite, "--include", local_tasks]
    environment = {**os.environ, **offline, "HF_HOME": str(tmp_path / "home")}
    arguments = [*torchrun, *map(str, command), "--output", str(output), "--tensor-parallel", "2"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {one["task"]: one for one in json.loads(output.read_text())}
    assert set(results) == set(TASKS) and {one["documents"] for one in results.values()} == {3}

    plain, tokenizer = load_plain(model)
    scorer = PlainDenoiser(plain, plain.config.embedding_size)
    right = 0
    for one in DOCUMENTS:
        pairs = []
        for choice in one["choices"]:  # type: ignore[attr-defined]
            whole, context = tokenizer.encode_batch([one["question"] + choice, one["question"]])  # type: ignore[list-item,operator]
            pairs.append((context, whole[len(context) :]))
        keys = request_keys([[*context, -1, *answer] for context, answer in pairs])
        scores = log_likelihoods(scorer, pairs, tokenizer.mask_id, samples=4, seed=7, cfg=0.5, keys=keys)
        right += max(range(2), key=lambda i: scores[i].value) == one["answer"]
    assert results["local_choice"]["value"] == pytest.approx(right / 3)
    assert results["local_choice"]["standard_error"] is not None
    texts = [tokenizer.encode_batch([str(one["question"])])[0] for one in DOCUMENTS]
    nats = sum(
        log_likelihoods(scorer, [([tokenizer.eos_id], ids)], tokenizer.mask_id, "chain")[0].value for ids in texts
    )
    size = sum(len(str(one["question"])) for one in DOCUMENTS)
    assert results["local_text"]["value"] == pytest.approx(-nats / size / 0.6931472, rel=1e-4)


def test_the_registered_class_answers_as_the_sampler(model: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from llada_train.evaluation.harness import request_keys

    with pytest.raises(UserError, match="cgf"):
        get_model("llada-train").create_from_arg_string(f"pretrained={model},cgf=1")
    made = get_model("llada-train").create_from_arg_string(f"pretrained={model},temperature=1.0", {"batch_size": 2})
    request = [("say", {"until": [], "max_gen_toks": 5}), ("so", {"until": "e", "max_gen_toks": 5})]
    instances = [Instance("generate_until", {}, one, i) for i, one in enumerate([*request, request[0]])]
    first, second, again = made.generate_until(instances)
    assert first != again and "e" not in second  # repeats are drawn anew
    assert made.generate_until(instances[:1]) == [first]
    plain, tokenizer = load_plain(model)
    options = SamplingOptions(temperature=1.0, seed=1234)
    ids = tokenizer.encode_batch(["say"])
    answer = continue_prompts(
        PlainDenoiser(plain, tokenizer.vocab_size),
        ids,
        5,
        options,
        tokenizer.mask_id,
        [tokenizer.eos_id],
        keys=request_keys(ids),
    )
    assert tokenizer.decode(answer[0]) == first
    chat = made.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert made.tok_encode(chat)[:2] == [126080, 126346]
    scorer = PlainDenoiser(plain, plain.config.embedding_size)
    (greedy,) = continue_prompts(scorer, ids, 3, SamplingOptions(), tokenizer.mask_id, ())
    made.settings = made.settings.model_copy(update={"check_greedy": True, "samples": 2})
    asked = [(("", ""), ids[0], answer) for answer in (greedy, [5, 5, 5])]
    assert [is_greedy for _, is_greedy in made._loglikelihood_tokens(asked)] == [True, False]


def test_text_spans_and_reversal(tiny_data: Path, tmp_path: Path) -> None:
    """Of a run's checkpoint."""
    model = tmp_path / "step-00000001"
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 16}
    checkpoint(model, ModelConfig(**sizes, vocab_size=300, max_sequence_length=64), tiny_data / "tokenizer")
    text, pairs, plot = tmp_path / "text.txt", tmp_path / "pairs.jsonl", tmp_path / "curve.png"
    text.write_text("the of and to in is that it was for on are as with his they " * 20)
    pairs.write_text(json.dumps({"first": "the of and", "second": " to in is"}) + "\n")
    report = json.loads(in_process("evaluate", model, "--text", text, "--plot", plot, "--json").stdout)
    assert report["tokens"] % 64 == 0 and 0 < report["text_bytes"] <= 1200 and len(report["buckets"]) == 10
    mean = sum(one["bits_per_byte"] for one in report["buckets"]) / 10
    assert report["bits_per_byte"] == pytest.approx(mean, rel=0.02)
    # A random model knows nothing: about log2 of the vocabulary for each token.
    bits = report["bits_per_byte"] * report["text_bytes"] / report["tokens"]
    assert math.log2(300) - 1 < bits < math.log2(300) + 3
    assert plot.read_bytes().startswith(b"\x89PNG")
    spans = json.loads(in_process("evaluate", model, "--spans", text, "--json").stdout)
    assert [one["what"] for one in spans] == [f"span of {n}" for n in (1, 2, 4, 8, 16)]
    reversal = json.loads(in_process("evaluate", model, "--reversal", pairs, "--json").stdout)
    assert [(one["what"], one["exact"]) for one in reversal] == [("second from first", 0), ("first from second", 0)]


def test_many_prompts_and_a_trace(model: Path, tmp_path: Path) -> None:
    inputs, output, trace = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "trace.html"
    rows = [
        {"prompt": "the sky", "id": 4},
        {"infill": "a<|mdm_mask|>c"},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--gen-length", 4, "--temperature", 0.7, "--seed", 3]
    in_process("sample", model, "--input", inputs, "--output", output, *options, "--trace", trace)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: one[key] for key in row} for one, row in zip(found, rows, strict=True)] == rows
    assert found[1]["text"].startswith("a") and found[1]["text"].endswith("c")
    assert all(found[i]["answer"] for i in (0, 2))
    alone = in_process("sample", model, "--prompt", "the sky", *options)
    assert alone.stdout == f"the sky{found[0]['answer']}\n"
    page = trace.read_text()
    assert "http" not in page and page.count("</script>") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--prompt", "a", "--steps", 5, "--block-length", 32], "the next larger number is 6"),
        (["sample", "--prompt", "a", "--gen-length", 4096], "4097 tokens"),
        (["sample", "--prompt", ""], "the prompt is empty"),
        (["sample", "--prompt", "a", "--temperature", -1], "temperature is -1"),
        (["sample", "--infill", "abc"], "no <|mdm_mask|>"),
        (["sample", "--infill", "a", "--chat"], "no conversation"),
        (["sample", "--input", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["sample", "--prompt", "a", "--output", "no/where.jsonl"], "no folder no"),
        (["evaluate", "--tasks", "piqa", "--set", "cgf=1"], "--set: cgf"),
        (["evaluate", "--tasks", "piqa", "--set", "steps=3", "--set", "threshold=0.9"], "leave out the steps"),
        (["evaluate", "--tasks", "piqa", "--text", "a"], "--tasks and --text"),
        (["evaluate", "--set", "cfg=0.5", "--chat"], "--set and --chat: for tasks alone; give --tasks or --suite, too"),
        (["evaluate", "--suite", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["evaluate", "--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    model: Path, arguments: list[object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("llada_train.convert.load.load_plain", never)
    with pytest.raises(UserError, match=re.escape(message)):
        in_process(arguments[0], model, *arguments[1:])


def test_more_shots_than_documents(model: Path, local_tasks: Path) -> None:
    with pytest.raises(UserError, match="local_choice: 40 shots are more than its documents"):
        in_process("evaluate", model, "--tasks", "local_choice", "--include", local_tasks, "--shots", 40)


def test_messages_of_another_shape(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": [{"text": "a"}]}))
    with pytest.raises(UserError, match="each message has a role and a content"):
        in_process("sample", model, "--input", tmp_path / "in.jsonl")
    with pytest.raises(UserError, match="is the --input; give another file"):
        in_process("sample", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "." / "in.jsonl")


def test_the_shipped_suites_name_tasks_that_there_are() -> None:
    """All but one, which is added here."""
    suites = [read_suite(path) for path in sorted((ROOT / "configs" / "evaluation").glob("*.yaml"))]
    tasks = [task for suite in suites for task in suite.tasks]
    assert len(suites) == 2 and len(tasks) == 22 and all(task.published for task in tasks)
    with pytest.raises(UserError, match="unknown task hellaswg; did you mean hellaswag"):
        check_tasks(Suite(tasks=(*tasks, Task(task="hellaswg"))), None)


def test_a_suite_with_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("tasks: [{task: piqa, shot: 3}, {task: mbpp, settings: {}}]\nsettings: {samples: 0}\n")
    with pytest.raises(UserError, match=r"tasks.0.shot: (.|\n)*settings.samples|settings.samples(.|\n)*tasks.0.shot"):
        read_suite(path)
    path.write_text("tasks: [{task: piqa, settings: {cgf: 1}}]\n")
    with pytest.raises(UserError, match="cgf"):
        read_suite(path)


def test_a_model_without_a_mask_token(model: Path, tmp_path: Path) -> None:
    maskless = tmp_path / "maskless"
    shutil.copytree(model, maskless)
    tokenizer = json.loads((maskless / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["content"] != "<|mdm_mask|>"]
    (maskless / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="no mask token"):
        in_process("sample", maskless, "--prompt", "a")
