"""Running lm-evaluation-harness, and what it found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_train.config.errors import UserError
from llada_train.evaluation.suite import Suite

BOOTSTRAPS = 1000  # for the errors of metrics that are no means
_INSTALL = "install it: pip install 'llada-train[eval]' -c constraints.txt"


@dataclass(frozen=True)
class TaskResult:
    task: str
    metric: str
    value: float
    standard_error: float | None
    documents: int
    published: float | None
    settings: dict[str, Any]


def check_tasks(suite: Suite, include: Path | None) -> Any:
    """lm_eval's task manager, once it knows all the tasks.

    Raises:
        UserError: lm_eval is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(f"evaluate: lm-evaluation-harness is not installed; {_INSTALL}") from None
    if include is not None and not include.is_dir():
        raise UserError(f"{include}: no such folder of tasks")
    names = [task.task for task in suite.tasks]
    if include is not None:  # without the thousands of others, which take long to list
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        import difflib

        close = [match for name in unknown for match in difflib.get_close_matches(name, manager.all_tasks, 2)]
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `lm_eval ls tasks` lists them"
        raise UserError(f"evaluate: unknown task {', '.join(unknown)}{hint}")
    return manager


def run_tasks(
    model: Any,
    suite: Suite,
    manager: Any,
    limit: int | None = None,
    run_code: bool = False,
    on_task: Callable[[str], None] = lambda name: None,
) -> list[TaskResult]:
    """The results of a HarnessModel.

    Raises:
        UserError: a task's data cannot be had, or it runs code that models write and `run_code` is not given.
    """
    from lm_eval import simple_evaluate

    found: list[TaskResult] = []
    for task in suite.tasks:
        on_task(task.task)
        model.settings = suite.settings_of(task)
        try:
            results = simple_evaluate(
                model,
                tasks=[task.task],
                num_fewshot=task.shots,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=task.chat,
                task_manager=manager,
                confirm_run_unsafe_code=run_code,
                random_seed=model.settings.seed,
                numpy_random_seed=model.settings.seed,
                torch_random_seed=model.settings.seed,
                fewshot_random_seed=model.settings.seed,
            )
        except (OSError, ConnectionError) as error:
            raise UserError(f"evaluate: {task.task}: its data cannot be had: {error}") from None
        except ValueError as error:
            if "larger than population" in str(error):  # random.sample's, of the examples shown before a question
                raise UserError(
                    f"evaluate: {task.task}: {task.shots} shots are more than its documents; take fewer"
                ) from None
            if "unsafe" not in str(error):
                raise
            raise UserError(
                f"evaluate: {task.task} runs code that the model writes; allow it with --run-code"
            ) from None
        assert results is not None
        found += _results(results, task.task, task.published, model.settings.model_dump())
    return found


def _results(results: Any, asked: str, published: float | None, settings: dict[str, Any]) -> list[TaskResult]:
    found = []
    for name, metrics in results["results"].items():
        documents = results["n-samples"].get(name, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, float | int) or key in ("alias", "sample_len"):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            label = metric if filter_name in ("", "none") else f"{metric} ({filter_name})"
            error = float(error) if isinstance(error, float | int) else None
            found.append(
                TaskResult(name, label, float(value), error, documents, published if name == asked else None, settings)
            )
    return found
