"""DeepSpeed's settings as the engine gives them (llada_train/parallel/engine.py), where the arithmetic needs them."""

from dataclasses import dataclass

from llada_train.config.schema import Config


@dataclass(frozen=True)
class ZeroSettings:
    overlaps: bool  # gradients are reduced while backward goes on
    reduce_bucket: int  # elements
    max_live_parameters: int  # of ZeRO 3: elements that are gathered at once
    offloads_optimizer: bool


def zero_settings(config: Config) -> ZeroSettings:
    return ZeroSettings(
        overlaps=config.parallel.zero_stage == 3,  # DeepSpeed's default for `overlap_comm`
        reduce_bucket=50_000_000,
        max_live_parameters=1_000_000_000,  # DeepSpeed's default for `stage3_max_live_parameters`
        offloads_optimizer=False,
    )
