"""Against a plain loop of the released algorithm, on small random models; and what must not change a result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released_sampling import plain_loop
from torch import Tensor

from llada_train.model.hf.configuration_llada import LLaDAConfig
from llada_train.model.hf.modeling_llada import LLaDAModelLM
from llada_train.sampling import denoiser
from llada_train.sampling.denoiser import Query, Read
from llada_train.sampling.noise import position_seeds, uniforms
from llada_train.sampling.options import SamplingOptions
from llada_train.sampling.plain import PlainDenoiser
from llada_train.sampling.predict import Prediction
from llada_train.sampling.sampler import generate
from llada_train.sampling.text import continue_prompts, fill_rows

V, MASK, EOS, EOT = 24, 23, 1, 2


def random_model(layers: int = 2, seed: int = 0) -> LLaDAModelLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 20, "vocab_size": V}
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
    model = LLaDAModelLM(LLaDAConfig(**sizes, n_layers=layers, **ids)).eval()
    model.model.transformer.ff_out.weight.data *= 4  # as sure of itself, and of its context, as a trained one
    for block in model.model.transformer.blocks:
        for projection in (block.q_proj, block.k_proj, block.attn_out):
            projection.weight.data *= 6
    return model.double()  # so that the order of additions decides nothing


MODEL = random_model()
DENOISER = PlainDenoiser(MODEL, V)


@torch.no_grad()
def all_logits(ids: Tensor) -> Tensor:
    return MODEL(ids).logits


def our_noise(logits: Tensor, step: int, open_: Tensor) -> Tensor:
    """The sampler's own numbers at the positions that may be committed."""
    uniform = torch.full(logits.shape, 0.5, dtype=torch.float64)
    for key, row in enumerate(open_):
        columns = row.nonzero()[:, 0]
        uniform[key, columns] = uniforms(position_seeds(0, key, step, columns - 3), V)  # all prompts have 3 tokens
    return uniform


@given(
    prompts=st.lists(st.lists(st.integers(0, V - 2), min_size=3, max_size=3), min_size=1, max_size=3),
    shape=st.sampled_from([(8, 8, 4), (8, 8, 8), (12, 4, 6), (6, 6, 2), (4, 2, 4)]),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    cfg=st.sampled_from([0.0, 0.0, 1.0]),
    ends=st.sampled_from(["", "", "eos", "confidence"]),
)
@settings(max_examples=40)
def test_tokens_are_those_of_the_released_algorithm(
    prompts: list[list[int]], shape: tuple[int, int, int], temperature: float, cfg: float, ends: str
) -> None:
    steps, length, block = shape
    steps, length = (length, steps) if steps < length else (steps, length)
    length = -(-length // block) * block
    steps = -(-steps // (length // block)) * (length // block)
    wanted = plain_loop(
        all_logits,
        torch.tensor(prompts),
        steps,
        length,
        block,
        MASK,
        temperature,
        cfg,
        eos=EOS,
        eot=EOT,
        logits_eos_inf=ends == "eos",
        confidence_eos_eot_inf=ends == "confidence",
        noise=our_noise,
    )
    options = SamplingOptions(
        steps,
        block,
        temperature,
        cfg=cfg,
        forbidden_ids=(EOS,) if ends == "eos" else (),
        last_ids=(EOS, EOT) if ends == "confidence" else (),
        rules="released",
    )
    assert torch.equal(generate(DENOISER, torch.tensor(prompts), length, options, MASK), wanted)


PROMPTS = [[5, 6], [7, 3, 9, 11, 4], [8], [9, 9, 3, 5], [4, 12, 5, 5, 5, 5, 20]]
MODES = {
    "greedy": SamplingOptions(block_length=4),
    "drawn": SamplingOptions(6, temperature=1.0, block_length=4, seed=3),
    "guided": SamplingOptions(6, temperature=1.0, block_length=4, cfg=0.5),
    "random": SamplingOptions(6, remasking="random", temperature=1.0, seed=2**63),
    "cosine": SamplingOptions(6, timesteps="cosine", temperature=0.5),
    "threshold": SamplingOptions(block_length=6, threshold=0.4),
    "prefix": SamplingOptions(block_length=4, cache="prefix", temperature=1.0),
    "dual": SamplingOptions(block_length=4, cache="dual", temperature=1.0, cfg=0.5),
    "dual threshold": SamplingOptions(block_length=6, cache="dual", threshold=0.4),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_result_does_not_depend_on_its_batch(mode: str) -> None:
    options = MODES[mode]
    rows = [[*prompt, *[MASK] * 12] for prompt in PROMPTS]
    rows[3][0], rows[3][-1] = MASK, 5  # masks anywhere
    alone = [fill_rows(DENOISER, [row], options, MASK, keys=[key])[0] for key, row in enumerate(rows)]
    for batch_size in (2, 5):
        assert fill_rows(DENOISER, rows, options, MASK, batch_size) == alone
    assert not any(MASK in row for row in alone)
    assert len({tuple(row[-12:-1]) for row in alone}) > 2


@pytest.mark.parametrize("mode", ["greedy", "guided", "dual"])
def test_logits_are_held_a_piece_at_a_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At LLaDA's vocabulary those of a thousand positions, and their noise, are gigabytes."""
    rows = [[*prompt, *[MASK] * 12] for prompt in PROMPTS]
    whole = fill_rows(DENOISER, rows, MODES[mode], MASK)
    held: list[int] = []
    read = Prediction.__call__

    def watched(self: Prediction, logits: Tensor, index: Tensor) -> Tensor:
        held.append(logits.numel() * (2 if self.options.cfg else 1))
        return read(self, logits, index)

    monkeypatch.setattr(Prediction, "__call__", watched)
    monkeypatch.setattr(denoiser, "PIECE", 7 * V)
    assert fill_rows(DENOISER, rows, MODES[mode], MASK) == whole
    assert max(held) in (6 * V, 7 * V)


@pytest.mark.parametrize("mode", ["greedy", "drawn", "random", "dual"])
def test_left_padding_changes_nothing(mode: str) -> None:
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    visible = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in PROMPTS])
    out = generate(DENOISER, padded, 12, MODES[mode], MASK, visible)
    for key, prompt in enumerate(PROMPTS):
        alone = generate(DENOISER, torch.tensor([prompt]), 12, MODES[mode], MASK, keys=[key])
        assert torch.equal(out[key, longest:], alone[0, len(prompt) :])


def test_a_cache_is_exact_where_no_key_can_change() -> None:
    """In one layer a position's key depends on its own token; in two layers not, and a cache's text differs."""
    prompt = torch.tensor(PROMPTS[1:2] * 6)
    for layers, exact in ((1, True), (2, False)):
        model = PlainDenoiser(random_model(layers, seed=4), V)
        options = SamplingOptions(block_length=6, temperature=1.0)
        wanted = generate(model, prompt, 12, options, MASK)
        for cache in ("prefix", "dual"):
            found = generate(model, prompt, 12, SamplingOptions(block_length=6, temperature=1.0, cache=cache), MASK)
            # Masks outside the block are not those that were there, but their embeddings are the same.
            assert torch.equal(found, wanted) == exact


def test_thresholds() -> None:
    prompt = torch.tensor(PROMPTS[:1])
    settled: list[list[tuple[int, int, int, float]]] = []
    generate(DENOISER, prompt, 8, SamplingOptions(threshold=0.7), MASK, on_step=settled.append)
    assert 1 < len(settled) < 8
    for some in settled:
        assert len(some) == 1 or all(p >= 0.7 for *_, p in some)
    one_by_one = generate(DENOISER, prompt, 8, SamplingOptions(8), MASK)
    assert torch.equal(generate(DENOISER, prompt, 8, SamplingOptions(threshold=1.0), MASK), one_by_one)
    settled.clear()
    generate(DENOISER, prompt, 8, SamplingOptions(threshold=0.0), MASK, on_step=settled.append)
    assert [len(some) for some in settled] == [8]


def test_ends_come_last_and_cut_the_text() -> None:
    """By the paper an end's confidence is 0; stopping at it saves passes and changes no answer."""
    weight = MODEL.model.transformer.ff_out.weight
    kept = weight.data.clone()
    try:
        weight.data[EOS] = 1.5 * kept[14]
        settled: list[list[tuple[int, int, int, float]]] = []
        options = SamplingOptions(block_length=6, last_ids=(EOS, EOT))
        generate(DENOISER, torch.tensor([[7, 3]]), 12, options, MASK, on_step=settled.append)
        order = [id for some in settled[:6] for _, _, id, _ in some]
        assert EOS in order and order == sorted(order, key=lambda id: id in (EOS, EOT))
        assert all(p == 0 for some in settled for _, _, id, p in some if id == EOS)
        calls: list[int] = []

        def counted(query: Query, read: Read) -> Tensor:
            calls.append(1)
            return DENOISER(query, read)

        plain = SamplingOptions(block_length=4)
        answers = continue_prompts(counted, PROMPTS, 12, plain, MASK, [EOS])
        whole = fill_rows(DENOISER, [[*prompt, *[MASK] * 12] for prompt in PROMPTS], plain, MASK)
        assert len(calls) <= 12
        for prompt, answer, row in zip(PROMPTS, answers, whole, strict=True):
            row = row[len(prompt) :]
            assert answer == (row[: row.index(EOS)] if EOS in row else row)
        assert any(len(answer) < 12 for answer in answers)
    finally:
        weight.data = kept
