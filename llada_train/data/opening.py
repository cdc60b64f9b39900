"""The data of a run, of whatever kind."""

from llada_train.config.schema import Config
from llada_train.data.rows import PretrainingData
from llada_train.data.sft import SftData
from llada_train.data.training_data import TrainingData


def open_data(config: Config) -> TrainingData:
    """What the config names, opened and checked.

    Raises:
        UserError: something of it is missing or at fault.
    """
    return PretrainingData(config) if config.sft is None else SftData(config)
