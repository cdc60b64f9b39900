"""What users do with an exported model in transformers. Run by test_exported_model.py in a process without llada_train.

`python exported_features.py FOLDER`: FOLDER holds `hf`, an fp32 export of two layers, and is written to.
"""

import copy
import sys
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

torch.manual_seed(0)
FOLDER = Path(sys.argv[1])


def load(folder: Path = FOLDER / "hf", **settings: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


model = load()
MASK, EOS = model.config.mask_token_id, model.config.eos_token_id
ids = torch.randint(3, 300, (3, 12))
with torch.no_grad():
    logits = model(ids).logits
torch.save(logits, FOLDER / "logits.pt")
torch.save(ids, FOLDER / "ids.pt")
answers = torch.where(torch.arange(12) < 4, -100, ids)  # four tokens of prompt


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def loss_of(some: torch.nn.Module, rows: int = 16) -> float:
    torch.manual_seed(1)
    with torch.no_grad():
        return some(ids.repeat(rows, 1), labels=answers.repeat(rows, 1)).loss.item()


def tokenizer_and_ids() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "hf", trust_remote_code=True)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (MASK, EOS)
    assert model.config.pad_token_id == EOS
    assert tokenizer.decode(tokenizer("return x").input_ids) == "return x"
    both = tokenizer(["return x", "x"], padding=True, return_tensors="pt")
    alone = model(**tokenizer("x", return_tensors="pt")).logits
    close(model(**both).logits[1, both.attention_mask[1].bool()], alone[0])


def saved_again() -> None:
    model.save_pretrained(FOLDER / "again")
    close(load(FOLDER / "again")(ids).logits, logits, 0)


def devices_and_dtypes() -> None:
    parts = {"wte": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "ln_f": "cpu", "ff_out": "cpu"}
    device_map = {f"model.transformer.{part}": device for part, device in parts.items()}
    close(load(device_map=device_map, offload_folder=FOLDER / "offload")(ids).logits, logits)
    close(load(device_map="auto")(ids).logits.cpu(), logits)
    half = load(dtype=torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - logits).norm() < 0.05 * logits.norm()


def padding() -> None:
    for left, right in ((3, 0), (0, 4), (2, 2)):
        padded = torch.nn.functional.pad(ids, (left, right), value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        close(model(padded, attention_mask=mask).logits[:, left : left + 12], logits)


def checkpointed_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        some = copy.deepcopy(model).train()
        calls = []
        block = some.model.transformer.blocks[0]
        block.q_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            some.gradient_checkpointing_enable()
        torch.manual_seed(2)
        some(ids, labels=answers).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append(block.q_proj.weight.grad)
    assert gradients[0].norm() > 0
    close(*gradients, 1e-6)


def compiled() -> None:
    some = copy.deepcopy(model)
    fast = torch.compile(some, fullgraph=True, backend="aot_eager")  # needs no compiler on the machine
    close(fast(ids).logits, logits)
    torch.manual_seed(2)
    loss = fast(ids, labels=answers).loss
    loss.backward()
    assert loss.item() > 0 and some.model.transformer.wte.weight.grad.norm() > 0


def fine_tuned() -> None:
    some, before = copy.deepcopy(model), loss_of(model)
    rows = [{"input_ids": row, "labels": answer} for row, answer in zip(ids, answers, strict=True)] * 8
    settings = TrainingArguments(
        str(FOLDER / "trainer"),
        max_steps=6,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=12,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(some, settings, train_dataset=rows).train()
    assert loss_of(some.eval()) < 0.9 * before, (loss_of(some), before)


def lora() -> None:
    before = loss_of(model)
    settings = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "ff_proj", "up_proj"])
    some = get_peft_model(copy.deepcopy(model), settings).train()
    trained = [parameter for parameter in some.parameters() if parameter.requires_grad]
    frozen = some.base_model.model.model.transformer.wte.weight.clone()
    assert sum(parameter.numel() for parameter in trained) < 0.3 * sum(p.numel() for p in some.parameters())
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for _ in range(20):
        some(input_ids=ids.repeat(8, 1), labels=answers.repeat(8, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(some.eval()) < 0.8 * before, (loss_of(some), before)
    assert torch.equal(some.base_model.model.model.transformer.wte.weight, frozen)
    some.save_pretrained(FOLDER / "lora")
    assert {path.name for path in (FOLDER / "lora").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def honest_errors() -> None:
    for call, words in (
        (lambda: model(ids, use_cache=True), "cannot be cached"),
        (lambda: model.generate(ids), "left to right"),
        (lambda: model(ids, output_attentions=True), "never formed"),
    ):
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)


for feature in (
    tokenizer_and_ids,
    saved_again,
    devices_and_dtypes,
    padding,
    checkpointed_gradients,
    compiled,
    fine_tuned,
    lora,
    honest_errors,
):
    feature()
    print(feature.__name__, round(time.process_time(), 1), flush=True)
assert not any(name.startswith("llada_train") for name in sys.modules)
print("transformers", transformers.__version__)
