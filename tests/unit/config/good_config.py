"""A config that is right, and what is said of ways to get it wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.config.rules import check_world_size, cross_section_problems
from llada_train.config.schema import Config

GOOD = """\
run_dir: runs/x
model:
  num_layers: 4
  hidden_size: 64
  num_heads: 4
  num_kv_heads: 2
  ffn_hidden_size: 160
  vocab_size: 500
  max_sequence_length: 128
data:
  tokenizer: tok
  sequence_length: 128
  corpora:
    - path: a
    - path: b
      weight: 2
optimizer:
  learning_rate:
    - until_tokens: 100_000
      end: 1e-4
    - until_tokens: 1e+6
      end: 0
training:
  global_batch_size: 16
  micro_batch_size: 4
"""


GOOD_TREE = YAML(typ="safe", pure=True).load(GOOD)


def line_of(text: str, needle: str) -> int:
    return text[: text.index(needle)].count("\n") + 1


def problems(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    """The lines of the one error, less its heading, without the folder's name."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, world_size)
    heading, *lines = str(caught.value).replace(f"{path.parent}/", "").splitlines()
    count = re.search(r"(\d+) problems? in the config:$", heading)
    assert count is not None
    assert int(count[1]) == len(lines)
    return [line.strip() for line in lines]


def changed(**sections: dict[str, Any]) -> Config:
    """GOOD with some settings replaced."""
    replaced = {name: GOOD_TREE.get(name, {}) | values for name, values in sections.items()}
    return Config.model_validate(GOOD_TREE | replaced)


def told(config: Config, world_size: int | None = None) -> list[str]:
    """The messages about `config`, and if there are none those about the processes it is started on."""
    found = cross_section_problems(config)
    if not found and world_size is not None:
        found = check_world_size(config, world_size)
    return [message for _, message in found]
