"""`llada-train sample`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llada_train.commands.console import counted_progress
from llada_train.commands.inputs import check_length, json_lines, write_whole
from llada_train.commands.layout import PipelineParallel, Processes, TensorParallel, checked_layout, start_processes
from llada_train.config.errors import UserError

if TYPE_CHECKING:
    from llada_train.data.tokenizer import Tokenizer
    from llada_train.sampling.denoiser import Denoiser
    from llada_train.sampling.options import SamplingOptions


class Remasking(StrEnum):
    low_confidence = "low_confidence"
    random = "random"


class Timesteps(StrEnum):
    uniform = "uniform"
    cosine = "cosine"


class Rules(StrEnum):
    paper = "paper"
    released = "released"


class Cache(StrEnum):
    none = "none"
    prefix = "prefix"
    dual = "dual"


def sample(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, a run folder or a checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    infill: Annotated[
        str | None, typer.Option(help="Text with <|mdm_mask|> wherever a token is to be filled in.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--input", help="Many: JSON lines with prompt, infill, or messages (role and content) each."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON lines here: the inputs with their answer, or their text.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are what a user says, in LLaDA's chat format.")] = False,
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens to generate after a prompt.")] = 64,
    steps: Annotated[
        int | None, typer.Option(help="Forward passes for each prompt; as many as masks if left out.")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="Fill blocks of so many tokens from left to right; one block if left out.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    remasking: Annotated[
        Remasking, typer.Option(help="Which predictions are kept at each step.")
    ] = Remasking.low_confidence,
    timesteps: Annotated[Timesteps, typer.Option(help="How much is still masked after each step.")] = Timesteps.uniform,
    threshold: Annotated[
        float | None, typer.Option(help="Keep all predictions at least so probable, in as many steps as it takes.")
    ] = None,
    cfg: Annotated[float, typer.Option(help="Weight of classifier-free guidance.")] = 0.0,
    no_eos: Annotated[bool, typer.Option("--no-eos", help="Never predict the end of text.")] = False,
    eos_last: Annotated[
        bool, typer.Option("--eos-last", help="Commit ends of text and of turn after all else of a block.")
    ] = False,
    rules: Annotated[
        Rules, typer.Option(help="Where the two differ: the paper's definition, or the released code's.")
    ] = Rules.paper,
    cache: Annotated[
        Cache, typer.Option(help="Keep keys and values in a block: of what is before it, or of all else. Approximate.")
    ] = Cache.none,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time; results do not depend on it.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the temperature's noise and of random remasking.")] = 0,
    trace: Annotated[
        Path | None, typer.Option(help="Write a page here that plays how the first text came about.")
    ] = None,
    processes: Processes = None,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
) -> None:
    """Fill in masks: continue prompts, answer messages, or complete texts with masks anywhere.

    A model that one GPU cannot hold is split: --processes 4 --tensor-parallel 2 --pipeline-parallel 2 takes a
    checkpoint of any layout as it is, and writes the same.

    Example: llada-train sample runs/demo/hf --infill 'import <|mdm_mask|><|mdm_mask|>'
    """
    jobs = _jobs(prompt, infill, inputs, chat)
    for path in (output, trace):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: no folder {path.parent}; make it first")
    from llada_train.checkpoint.store import check_model

    if output is not None and inputs is not None and output.resolve() == inputs.resolve():
        raise UserError(f"--output {output}: is the --input; give another file")
    check_model(model)  # before the slow imports
    from llada_train.sampling.options import SamplingOptions

    chosen = {"remasking": remasking.value, "timesteps": timesteps.value, "rules": rules.value, "cache": cache.value}
    given: dict[str, Any] = {"temperature": temperature, "threshold": threshold, "cfg": cfg, "seed": seed, **chosen}
    options = SamplingOptions(steps, block_length, **given)
    if any("infill" not in job for job in jobs):
        options.check_length(gen_length)
    from llada_train.convert.load import describe
    from llada_train.data.tokenizer import CHAT_TOKENS
    from llada_train.parallel.launch import world_size

    sizes, tokenizer = describe(model)
    ends = tuple(id for id in (tokenizer.eos_id, tokenizer.id_of(CHAT_TOKENS[-1])) if id is not None)
    options = SamplingOptions(
        steps, block_length, forbidden_ids=ends[:1] if no_eos else (), last_ids=ends if eos_last else (), **given
    )
    rows = [_ids(job, tokenizer) for job in jobs]
    prompts = [i for i, job in enumerate(jobs) if "infill" not in job]
    infills = [i for i, job in enumerate(jobs) if "infill" in job]
    for i in infills:
        options.steps_per_block(rows[i].count(tokenizer.mask_id))
    for i, row in enumerate(rows):
        name = "sample" if inputs is None else f"{inputs}: input {i + 1}"
        check_length(len(row) + (0 if i in infills else gen_length), sizes, name)

    layout = checked_layout(sizes, processes, tensor_parallel, pipeline_parallel)
    if cache is not Cache.none and (processes or world_size()) > 1:
        raise UserError(f"--cache {cache.value}: keys and values are kept on one process only; leave it out")
    start_processes(context, processes)

    from llada_train.convert.load import Loaded, loaded
    from llada_train.sampling.text import continue_prompts, fill_rows

    def write(model: Loaded) -> None:
        denoiser, rows_at_once = model.sampler, batch_size * model.copies
        with counted_progress("sampling", "tokens") as advance:
            some = [rows[i] for i in prompts]
            answers = continue_prompts(
                denoiser, some, gen_length, options, tokenizer.mask_id, ends, rows_at_once, prompts, advance
            )
            some = [rows[i] for i in infills]
            texts = fill_rows(denoiser, some, options, tokenizer.mask_id, rows_at_once, infills, advance)
        found = dict(zip([*prompts, *infills], [*answers, *texts], strict=True))
        results = [
            {**job, "text" if "infill" in job else "answer": tokenizer.decode(found[i])} for i, job in enumerate(jobs)
        ]
        if trace is not None:
            _write_trace(trace, denoiser, tokenizer, rows[0], gen_length if 0 in prompts else 0, options)
        if output is not None:
            write_whole(output, "".join(f"{json.dumps(result, ensure_ascii=False)}\n" for result in results))
        elif inputs is not None:
            for result in results:
                typer.echo(json.dumps(result, ensure_ascii=False))
        else:
            typer.echo(results[0].get("text", (prompt or "" if not chat else "") + results[0].get("answer", "")))

    with loaded(model, layout) as given_model:
        given_model.lead(lambda: write(given_model))


def _jobs(prompt: str | None, infill: str | None, inputs: Path | None, chat: bool) -> list[dict[str, Any]]:
    """What is to be done, as lines of an input file: a prompt, a text with masks, or messages each."""
    if sum(one is not None for one in (prompt, infill, inputs)) != 1:
        raise UserError("sample: give either --prompt or --infill, or --input with many")
    if chat and infill is not None:
        raise UserError("sample: --chat answers a --prompt; an --infill is no conversation")
    if inputs is None:
        jobs = [{"prompt": prompt} if infill is None else {"infill": infill}]
    else:
        jobs = json_lines(inputs, ("prompt", "infill", "messages"))
    for number, job in enumerate(jobs, 1):
        name = "sample" if inputs is None else f"{inputs}: input {number}"
        kinds = [kind for kind in ("prompt", "infill", "messages") if kind in job]
        if len(kinds) > 1:
            raise UserError(f"{name}: {' and '.join(kinds)}; give one of them")
        if not job[kinds[0]]:
            raise UserError(f"{name}: the {kinds[0]} is empty; give some text to go on from")
        if not isinstance(job[kinds[0]], list if kinds == ["messages"] else str):
            raise UserError(f"{name}: {kinds[0]}: expected {'a list' if kinds == ['messages'] else 'text'}")
    return [
        {**job, "messages": [{"role": "user", "content": job["prompt"]}]} if chat and "prompt" in job else job
        for job in jobs
    ]


def _ids(job: dict[str, Any], tokenizer: "Tokenizer") -> list[int]:
    from llada_train.data.chat import ChatTemplate, DialogueError, Message
    from llada_train.sampling.text import with_masks

    if "infill" in job:
        return with_masks(tokenizer, job["infill"])
    if "messages" in job:
        try:
            messages = [Message(message["role"], message["content"]) for message in job["messages"]]
            return ChatTemplate("llada", tokenizer).prompt(messages)
        except (KeyError, TypeError):
            raise UserError(f"chat: each message has a role and a content, not so {job['messages']}") from None
        except DialogueError as error:
            raise UserError(f"chat: a message {error}") from None
    return tokenizer.encode_batch([job["prompt"]])[0]


def _write_trace(
    path: Path,
    denoiser: "Denoiser",
    tokenizer: "Tokenizer",
    row: list[int],
    gen_length: int,
    options: "SamplingOptions",
) -> None:
    from llada_train.sampling.text import fill_rows
    from llada_train.sampling.trace import Recorder

    row = [*row, *[tokenizer.mask_id] * gen_length]
    recorder = Recorder(row, tokenizer)
    fill_rows(denoiser, [row], options, tokenizer.mask_id, on_step=recorder)
    write_whole(path, recorder.page())
