"""`llada-train pretrain` with a fault: the loss of the samples FIRST … END-1 is not a number, always.

python spoilt_pretrain.py FIRST END CONFIG [KEY=VALUE]...
"""

import sys
from dataclasses import replace
from typing import Any

from llada_train import cli
from llada_train.data import loader
from llada_train.data.batch import Batch

_collate = loader.collate
_first, _end = int(sys.argv[1]), int(sys.argv[2])


def _spoilt(*arguments: Any, **settings: Any) -> Batch:
    batch = _collate(*arguments, **settings)
    if not any(_first <= sample < _end for sample in batch.sample_index.tolist()):
        return batch
    return replace(batch, loss_weight=batch.loss_weight * float("nan"))


loader.collate = _spoilt
sys.argv[1:] = ["pretrain", *sys.argv[3:]]
cli.main()
