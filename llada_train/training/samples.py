"""What a run asks its model on the way, in whatever layout it lies: answers to held-out prompts, texts to read."""

from collections.abc import Sequence

from llada_train.config.schema import Config, SamplesConfig
from llada_train.data.chat import prompt_ids
from llada_train.data.sft import Example, SftData
from llada_train.data.training_data import TrainingData
from llada_train.evaluation.answers import answer
from llada_train.parallel.engine import Engine
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.split import SplitDenoiser
from llada_train.sampling.text import continue_prompts


class Samples:
    """Nothing here draws from what training draws from, or changes what it reads."""

    def __init__(self, data: TrainingData, config: Config, engine: Engine) -> None:
        self._data, self._config = data, config
        self._denoiser = SplitDenoiser(engine, data.tokenizer.mask_id, data.tokenizer.vocab_size)
        # As many for each copy's stages as in training: with more there may not be memory enough.
        self._rows = config.training.micro_batch_size * config.parallel.pipeline_parallel * self._denoiser.copies

    def exact_match(self) -> float | None:
        """The share of the first `validation.answers` held-out prompts that are answered with the response, token by
        token, up to EOS; None if there are none, and on all ranks but 0. Collective.
        """
        data, count = self._data, self._config.validation.answers
        if not isinstance(data, SftData) or not (examples := data.validation_examples[:count]):
            return None
        return self._denoiser.lead(lambda: self._share(data, examples))

    def texts(self, asked: SamplesConfig) -> list[tuple[str, str]] | None:
        """Each prompt and what comes after it; None on all ranks but 0. Collective."""
        return self._denoiser.lead(lambda: self._continue(asked))

    def _share(self, data: SftData, examples: Sequence[Example]) -> float:
        answered = answer(self._denoiser, data, examples, self._rows)
        return sum(one.exact for one in answered) / len(answered)

    def _continue(self, asked: SamplesConfig) -> list[tuple[str, str]]:
        tokenizer, sft = self._data.tokenizer, self._config.sft
        prompts = prompt_ids(asked.prompts, tokenizer, sft.chat_template if sft else None)
        options = SamplingOptions(asked.steps, temperature=asked.temperature, seed=self._config.seed)
        answers = continue_prompts(
            self._denoiser,
            prompts,
            asked.gen_length,
            options,
            tokenizer.mask_id,
            [tokenizer.eos_id],
            self._rows,
        )
        return list(zip(asked.prompts, map(tokenizer.decode, answers), strict=True))
