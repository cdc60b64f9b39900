"""The model card of an export: what is known of the weights, and how to use them."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from llada_train.checkpoint.manifest import AnyManifest, Manifest
from llada_train.data.timeline import Phase, Timeline
from llada_train.data.training_data import short_names
from llada_train.model.sizes import non_embedding_parameter_count, parameter_count

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- llada
- masked-diffusion
---

# {name}

A LLaDA masked diffusion language model ([paper](https://arxiv.org/abs/2502.09992)), {made}.

| | |
|---|---|
{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
logits = model(tokenizer("a <|mdm_mask|> text", return_tensors="pt").input_ids).logits  # of every position, not shifted
```

Attention is not causal and there is no cache: text is sampled by filling in masks step by step, as
`llada-train sample {name} --prompt …` does, not by `generate`. Given `labels` (the tokens themselves, −100 in a prompt
and in padding), the model draws LLaDA's noise and returns LLaDA's loss.
"""


def model_card(name: str, manifest: AnyManifest, dtype: str) -> str:
    """README.md of an export called `name`."""
    model = manifest.model
    facts = {
        "parameters": f"{parameter_count(model):,}",
        "without embedding and head": f"{non_embedding_parameter_count(model):,}",
        "layers, width, feed-forward": f"{model.num_layers}, {model.hidden_size}, {model.ffn_hidden_size}",
        "heads, key-value heads": f"{model.num_heads}, {model.num_kv_heads}",
        "vocabulary": f"{model.vocab_size:,} ids, {model.padded_vocab_size:,} rows",
        "longest sequence": f"{model.max_sequence_length:,} tokens",
        "weights here": dtype,
    }
    made = "pre-trained with llada_train"
    if isinstance(manifest, Manifest):
        facts |= _training(manifest)
        made = made if manifest.config.sft is None else "fine-tuned on dialogues with llada_train"
    else:
        made = f"imported from `{manifest.imported_from}` and not trained since"
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return _CARD.format(name=name, made=made, facts=rows)


def _each(values: Iterable[int]) -> str:
    """All that were in force, in turn."""
    return ", then ".join(f"{value:,}" for value, _ in groupby(values))


def _percent(phases: Sequence[Phase], samples: int) -> list[float]:
    """Of the tokens so far, what each corpus gave; those that were passed over do not count."""
    ends = [*(phase.first_sample for phase in phases[1:]), samples]
    lengths = [
        (min(end, phase.end_sample or end) - phase.first_sample) * phase.sequence_length
        for phase, end in zip(phases, ends, strict=True)
    ]
    lengths[0] += not any(lengths)  # of a run that has not begun, its first mixture
    given = [
        sum(tokens * phase.weights[i] / sum(phase.weights) for phase, tokens in zip(phases, lengths, strict=True))
        for i in range(len(phases[0].weights))
    ]
    return [100 * tokens / sum(lengths) for tokens in given]


def _training(manifest: Manifest) -> dict[str, str]:
    config, progress = manifest.config, manifest.progress
    samples = progress.consumed_samples
    timeline = Timeline(config, progress.phases, samples)
    phases = timeline.begun(samples) or timeline.phases[:1]
    names = short_names([corpus.path for corpus in config.data.corpora])
    shares = zip(names, _percent(phases, samples), strict=True)
    at_most, sets = ("", "corpora") if config.sft is None else ("at most ", "data sets")
    return {
        "steps": f"{progress.step:,}",
        "tokens (nominal)": f"{timeline.tokens(samples):,}",
        "sequences": f"{samples:,} of {at_most}{_each(phase.sequence_length for phase in phases)} tokens",
        "batch": f"{_each(phase.global_batch_size for phase in phases)} sequences",
        sets: ", ".join(f"{name} {percent:.3g} %" for name, percent in shares),
        "learning rate": f"{max(phase.end for phase in config.optimizer.learning_rate):g} at most, AdamW",
        "weight decay": f"{config.optimizer.weight_decay:g}",
        "precision": config.training.precision,
        "began from": "LLaDA's initialisation" if config.init_from is None else f"`{config.init_from.name}`",
        "seed": str(config.seed),
        "saved": manifest.saved.strftime("%Y-%m-%d %H:%M UTC"),
        "software": ", ".join(f"{package} {number}" for package, number in manifest.versions.items()),
    }
