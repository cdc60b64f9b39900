"""Known ways to get masked diffusion training wrong, planted one by one: each has to fail the layout matrix.

What the matrix holds every layout against, one process, is itself held against a loop of plain PyTorch, which knows no
ranks and reads the formulas off the paper.
"""

from pathlib import Path

import processes
import pytest
import torch
import training_run
from layouts import PACKED, Layout
from matrix import REFERENCE, STEPS, Matrix, no_row_is_0
from torch.nn import functional as F

from llada_train.config.load import load_config
from llada_train.config.schema import Config
from llada_train.convert.plain import plain_model
from llada_train.data.opening import open_data
from llada_train.data.rows import PretrainingData
from llada_train.data.sft import SftData
from llada_train.model.weights import InitialWeights
from llada_train.objective.forward_process import training_noise
from llada_train.objective.keyed import Purpose, position_words, sample_words, uniform

TOLERANCE = 1e-5
BF16_TOLERANCE = 1e-2
TOKEN = "objective.loss_normalization=token"
DOCUMENTS = "data.rows=document_attention"
ANOTHER_RUN, OTHER_NOISE, ROUNDED = "another run", "noise, targets or weights differ", "not summed in fp32"
FAULTS = [
    ("norm_gradients_of_a_slice", "fp32", Layout(tensor_parallel=2, sequence_parallel=True), [], ANOTHER_RUN),
    ("head_gradient_of_a_slice", "fp32", Layout(tensor_parallel=2), [], ANOTHER_RUN),
    ("own_keys_only", "fp32", Layout(context_parallel=2), [], ANOTHER_RUN),
    ("own_key_gradients_only", "fp32", Layout(context_parallel=2), [], ANOTHER_RUN),
    ("shared_noise", "fp32", Layout(2), [], OTHER_NOISE),
    ("local_normalization", "fp32", Layout(2), [TOKEN], OTHER_NOISE),
    ("causal_attention", "fp32", Layout(tensor_parallel=2), [], ANOTHER_RUN),
    ("bf16_on_the_wire", "bf16", Layout(4), [], ROUNDED),
    ("unweighted_loss", "fp32", Layout(), [], OTHER_NOISE),
    ("loss_at_every_position", "fp32", Layout(), [], OTHER_NOISE),
]


@pytest.mark.parametrize(
    ("fault", "precision", "layout", "overrides", "noticed"), FAULTS, ids=[fault[0] for fault in FAULTS]
)
def test_fault_fails_the_matrix(
    matrices: dict[str, Matrix], fault: str, precision: str, layout: Layout, overrides: list[str], noticed: str
) -> None:
    """For the right reason; the same without the fault is in the matrix, but for the overrides."""
    matrix = matrices[precision]
    if overrides:
        matrix.check(matrix.run(layout, *overrides))
    faulty = matrix.run(layout, *overrides, fault=fault)
    with pytest.raises(AssertionError, match=noticed):
        matrix.check(faulty)


@pytest.mark.parametrize("overrides", [[], [TOKEN], [DOCUMENTS]], ids=["sequence", "token", "documents"])
def test_one_process_trains_as_a_plain_loop(matrices: dict[str, Matrix], overrides: list[str]) -> None:
    matrix = matrices["fp32"]
    losses, norms = plain_loop(matrix.config, overrides)
    found = matrix.run(REFERENCE, *overrides).first
    assert found.losses == pytest.approx(losses, rel=TOLERANCE)
    assert found.norms == pytest.approx(norms, rel=TOLERANCE)
    if not overrides:
        rounded = matrices["bf16"].run(REFERENCE).first
        assert rounded.losses == pytest.approx(losses, rel=BF16_TOLERANCE)
        assert rounded.norms == pytest.approx(norms, rel=BF16_TOLERANCE)


def plain_loop(config_file: Path, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of STEPS steps (paper Alg. 1), one row at a time, cut where it is cut.

    With document attention the model is given one document at a time, and knows of no others.
    """
    config = load_config(config_file, overrides)
    data = PretrainingData(config)
    loop, N = PlainLoop(config), config.training.global_batch_size
    for first in range(0, STEPS * N, N):
        noise = training_noise(config.seed, first, N, data.sequence_length, config.objective)
        total = torch.zeros(())
        for i, row in enumerate(data.training_rows(range(first, first + N))):
            L, p = int(noise.lengths[i]), float(noise.mask_probability[i])
            clean, mask = torch.from_numpy(row[:L]), torch.from_numpy(noise.mask(i))
            noised, pieces = clean.masked_fill(mask, data.tokenizer.mask_id), (L,)
            if overrides == [DOCUMENTS]:
                ends = torch.nonzero(clean == data.tokenizer.eos_id).flatten() + 1
                pieces = tuple(torch.tensor(sorted({0, *ends.tolist(), L})).diff().tolist())
            logits = torch.cat([loop.model(piece.unsqueeze(0)).logits[0] for piece in noised.split(pieces)])
            tokens = float(noise.lengths.sum()) if overrides == [TOKEN] else L * N
            total = total + F.cross_entropy(logits[mask], clean[mask], reduction="sum") / (p * tokens)
        loop.step(total)
    return loop.losses, loop.norms


class PlainLoop:
    """Plain PyTorch: a model with the run's initial weights, AdamW as the config says, clipped gradients."""

    def __init__(self, config: Config) -> None:
        self._config, settings = config, config.optimizer
        self.model = plain_model(InitialWeights(config.model, config.seed), config.model).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        norms = [p for p in self.model.parameters() if p.ndim == 1]
        self._adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=training_run.LEARNING_RATE,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, loss: torch.Tensor) -> None:
        self._adam.zero_grad()
        loss.backward()
        clipping = self._config.optimizer.gradient_clipping
        self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clipping).item())
        self._adam.step()
        self.losses.append(loss.item())


def test_one_process_fine_tunes_as_a_plain_loop(sft_matrix: Matrix) -> None:
    """The loss of packed rows is that of padded ones, which is the formula's."""
    losses, norms, predicted = plain_sft_loop(sft_matrix.config)
    padded_run, packed_run = sft_matrix.run(REFERENCE), sft_matrix.run(REFERENCE, PACKED)
    assert packed_run.digests == padded_run.digests
    found, packed = padded_run.first, packed_run.first
    assert packed.losses == pytest.approx(losses, rel=TOLERANCE)
    assert packed.norms == pytest.approx(norms, rel=TOLERANCE)
    for step, bounds in zip(packed.bounds_by_t, found.bounds_by_t, strict=True):
        assert no_row_is_0(step) == pytest.approx(no_row_is_0(bounds), rel=5 * TOLERANCE)
    assert [id for id, _ in found.predicted] == [id for id, _ in predicted]
    assert [log for _, log in found.predicted] == pytest.approx([log for _, log in predicted], rel=1e-4)
    assert found.losses == pytest.approx(losses, rel=TOLERANCE)
    assert found.norms == pytest.approx(norms, rel=TOLERANCE)


def plain_sft_loop(config_file: Path) -> tuple[list[float], list[float], list[tuple[int, float]]]:
    """(1/N)·Σ_b (1/L'_b)·Σ_masked CE/p (paper Alg. 2), one row at a time, padded with EOS to its neighbour's length.

    Losses, gradient norms, and in the end the most probable tokens at the masks after held-out prompts.
    """
    data = open_data(load_config(config_file))
    assert isinstance(data, SftData)
    config, eos = data.config, data.tokenizer.eos_id
    loop, N = PlainLoop(config), config.training.global_batch_size
    for first in range(0, STEPS * N, N):
        u = uniform(sample_words(config.seed, Purpose.MASK_PROBABILITY, first, N)[:, 0])
        total, pairs = torch.zeros(()), []
        for example in data.examples(range(first, first + N)):
            (begin, _) = example.responses[0]
            pairs.append((begin, [*data.corpora[0].tokens(example.start, example.stop).tolist(), eos]))
        for i, (begin, tokens) in enumerate(pairs):
            neighbour = pairs[i ^ 1][1]
            clean = torch.tensor(tokens + [eos] * (len(neighbour) - len(tokens)))
            p = (1 - config.objective.epsilon) * u[i] + config.objective.epsilon
            words = position_words(config.seed, Purpose.MASK, first + i, len(clean))
            mask = torch.from_numpy(uniform(words) < p) & (torch.arange(len(clean)) >= begin)
            logits = loop.model(clean.masked_fill(mask, data.tokenizer.mask_id).unsqueeze(0)).logits[0]
            answer = len(clean) - begin
            total = total + F.cross_entropy(logits[mask], clean[mask], reduction="sum") / (float(p) * answer * N)
        loop.step(total)
    predicted: list[tuple[int, float]] = []
    for row in map(torch.tensor, training_run.rows_after_prompts(data)):
        best = loop.model(row.unsqueeze(0)).logits[0].log_softmax(-1)[row == data.tokenizer.mask_id].max(-1)
        predicted += zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return loop.losses, loop.norms, predicted


MICRO_BATCHES = 512


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradients_of_many_micro_batches_are_added_in_fp32(matrices: dict[str, Matrix], zero_stage: int) -> None:
    assert growth(matrices["bf16"].config, zero_stage) == pytest.approx(MICRO_BATCHES, rel=1e-3)


def test_gradients_added_in_bf16_are_noticed(matrices: dict[str, Matrix]) -> None:
    """bf16 has 8 significant bits: a sum of 256 equal parts takes no more of them."""
    assert growth(matrices["bf16"].config, 1, "bf16_sums") < 0.9 * MICRO_BATCHES


def growth(config: Path, zero_stage: int, fault: str | None = None) -> float:
    """The gradient norm of 512 equal micro-batches ÷ that of one."""
    small = ["training.precision=bf16", "model.num_layers=1", "training.micro_batch_size=2"]
    settings = [*small, f"parallel.zero_stage={zero_stage}"]
    one, many = (
        processes.run(1, training_run.norm_of_equal_micro_batches, config, settings, count, fault)[0]
        for count in (1, MICRO_BATCHES)
    )
    return many / one
