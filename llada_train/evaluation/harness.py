"""LLaDA as a model of lm-evaluation-harness, registered as `llada-train`.

Scores are the Monte-Carlo estimates of llada_train.evaluation.likelihood, answers the sampler's; both are keyed by a
request's own tokens, so that results depend neither on batches nor on the number of processes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from pydantic import ValidationError

from llada_train.config.errors import UserError
from llada_train.convert.load import Loaded, loaded
from llada_train.data.chat import ChatTemplate, Message, encode, names_of
from llada_train.data.tokenizer import CHAT_TOKENS
from llada_train.evaluation.likelihood import doubts, log_likelihoods
from llada_train.evaluation.suite import Settings, problems
from llada_train.parallel.launch import world_size
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.text import continue_prompts, fill_rows

_KEY_BITS = 40


@register_model("llada-train")
class HarnessModel(TemplateLM):
    """A Hugging Face folder, run folder or checkpoint, or what has been loaded of one."""

    def __init__(
        self,
        pretrained: str | Loaded,
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """`settings`: as of llada_train.evaluation.suite.Settings; lm_eval gives them as model_args.

        Raises:
            UserError: no model there, an unknown setting, or several processes that have not loaded it together.
        """
        super().__init__()
        try:
            self.settings = Settings.model_validate(settings)
        except ValidationError as error:
            raise UserError(f"llada-train: {problems(error)}") from None
        if not isinstance(pretrained, Loaded):
            if world_size() > 1:
                raise UserError("llada-train: several processes need `llada-train evaluate`; start one")
            pretrained = ExitStack().enter_context(loaded(Path(pretrained), device=device))
        self._batch_size = int(batch_size) * pretrained.copies
        self._tokenizer, self._max_length = pretrained.tokenizer, pretrained.max_sequence_length
        names = {self._tokenizer.bos_token, self._tokenizer.eos_token, *CHAT_TOKENS}
        self._special = names_of(names & self._tokenizer.special_tokens.keys())
        self._scorer, self._sampler = pretrained.scorer, pretrained.sampler
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.on_doubt: Callable[[str], None] = lambda message: None

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"llada-{self._tokenizer.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "llada"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """LLaDA's format; without a generation prompt the last message goes on."""
        messages = [Message(message["role"], message["content"]) for message in chat_history]
        text = ChatTemplate("llada", self._tokenizer).render(messages, answer=add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix(CHAT_TOKENS[-1])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The names of the chat format's tokens, and of end of text, are the tokens; that of the mask is text."""
        return encode(string, self._tokenizer, self._special)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, answer) for _, context, answer in requests]
        settings = self.settings
        scores = log_likelihoods(
            self._scorer,
            pairs,
            self._tokenizer.mask_id,
            settings.estimator,
            settings.samples,
            settings.seed,
            settings.cfg,
            self._batch_size,
            request_keys([[*context, -1, *answer] for context, answer in pairs]),
            self.on_progress,
        )
        if message := doubts(scores, settings.estimator):
            self.on_doubt(message)
        greedy = self._greedy(pairs) if settings.check_greedy else [False] * len(pairs)
        found = [(score.value, is_greedy) for score, is_greedy in zip(scores, greedy, strict=True)]
        for (texts, _, _), one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, one)
        return found

    def _fitting(self, context: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """What the model can read of it: the end."""
        answer = answer[-self._max_length :]
        return context[max(0, len(context) + len(answer) - self._max_length) :], answer

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy sampling, one token a step, gives the very answer."""
        mask = self._tokenizer.mask_id
        options = SamplingOptions(cfg=self.settings.cfg)
        rows = [[*context, *[mask] * len(answer)] for context, answer in pairs]
        filled = fill_rows(self._scorer, rows, options, mask, self._batch_size)
        return [row[len(context) :] == answer for row, (context, answer) in zip(filled, pairs, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows as long as the model reads, each after the last token of the one before."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self._max_length - 1, 1)
            windows += [(number, *make_disjoint_window(pair)) for pair in rolling]
        scores = self._loglikelihood_tokens([(("", ""), context, answer) for _, context, answer in windows])
        found = [0.0] * len(requests)
        for (number, _, _), (score, _) in zip(windows, scores, strict=True):
            found[number] += score
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers of `gen_length` tokens, or of what the task gives, cut at its stop strings."""
        settings, found = self.settings, [""] * len(requests)
        groups: dict[tuple[int, float], list[int]] = {}
        for number, request in enumerate(requests):
            given = request.args[1]
            length = settings.gen_length or int(given.get("max_gen_toks", 256))
            temperature = float(given.get("temperature", 0.0)) if given.get("do_sample") else settings.temperature
            groups.setdefault((length, temperature), []).append(number)
        ends = [self._tokenizer.eos_id, *([eot] if (eot := self._tokenizer.id_of(CHAT_TOKENS[-1])) else [])]
        keys = request_keys([self.tok_encode(request.args[0]) for request in requests])
        for (length, temperature), numbers in groups.items():
            options = replace(settings.sampling(ends), temperature=temperature)
            room = self._max_length - length
            if room < 1:
                raise UserError(f"evaluate: gen_length {length} leaves no room in the {self._max_length} of the model")
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            answers = continue_prompts(
                self._sampler,
                prompts,
                length,
                options,
                self._tokenizer.mask_id,
                ends,
                self._batch_size,
                [keys[number] for number in numbers],
                self.on_progress,
            )
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = _cut(self._tokenizer.decode(answer), requests[number].args[1].get("until", []))
                self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
        return found


def request_keys(requests: Sequence[Sequence[int]]) -> list[int]:
    """A number for each request that its tokens alone decide, and how often they have come before."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for tokens in requests:
        content = json.dumps([*tokens, seen[tuple(tokens)]]).encode()
        seen[tuple(tokens)] += 1
        keys.append(int.from_bytes(hashlib.sha256(content).digest()[: _KEY_BITS // 8]))
    return keys


def _cut(text: str, until: str | Sequence[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text
