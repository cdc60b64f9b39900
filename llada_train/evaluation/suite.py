"""Tasks of lm-evaluation-harness with their shots and the settings of LLaDA for each. Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llada_train.config.errors import UserError
from llada_train.sampling.options import SamplingOptions


class Settings(BaseModel):
    """How a model is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    estimator: Literal["subset", "bernoulli", "exact", "chain"] = "subset"
    samples: int = Field(default=128, ge=1, description="Monte-Carlo samples of each answer's likelihood.")
    cfg: float = Field(default=0.0, ge=0, description="Classifier-free guidance, of likelihoods and of answers.")
    check_greedy: bool = Field(
        default=False, description="Whether an answer is the greedy one: a pass for each of its tokens."
    )
    gen_length: int | None = Field(default=None, ge=1, description="Tokens of an answer; None: what the task asks for.")
    steps: int | None = Field(default=None, ge=1, description="None: one for each token.")
    block_length: int | None = Field(default=None, ge=1, description="None: all at once.")
    temperature: float = Field(default=0.0, ge=0)
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    threshold: float | None = Field(default=None, ge=0, le=1)
    no_eos: bool = Field(default=False, description="The end of text is never predicted (logits_eos_inf).")
    eos_last: bool = Field(default=False, description="EOS and EoT are committed last (confidence_eos_eot_inf).")
    rules: Literal["paper", "released"] = "paper"
    seed: int = Field(default=1234, ge=0)

    def sampling(self, ends: list[int]) -> SamplingOptions:
        """`ends`: the ids of EOS, and EoT if there is one."""
        return SamplingOptions(
            self.steps,
            self.block_length,
            self.temperature,
            self.remasking,
            threshold=self.threshold,
            cfg=self.cfg,
            forbidden_ids=tuple(ends[:1]) if self.no_eos else (),
            last_ids=tuple(ends) if self.eos_last else (),
            rules=self.rules,
            seed=self.seed,
        )


class Task(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    shots: int | None = Field(default=None, ge=0, description="None: as the task defines it.")
    chat: bool = False
    settings: dict[str, Any] = Field(default_factory=dict, description="What differs from the suite's settings.")
    published: float | None = Field(default=None, description="The paper's result, in percent.")


class Suite(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: Settings = Settings()
    tasks: tuple[Task, ...]

    def settings_of(self, task: Task) -> Settings:
        return Settings.model_validate({**self.settings.model_dump(), **task.settings})


def read_suite(path: Path) -> Suite:
    """
    Raises:
        UserError: it cannot be read, or does not fit; every problem is told.
    """
    try:
        suite = Suite.model_validate(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
        for task in suite.tasks:
            suite.settings_of(task).sampling([0])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {problems(error)}") from None
    return suite


def problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())
