import os
from pathlib import Path

import numpy as np
import pytest

from llada_train.cluster.health import Links, Report, judge, measure, read_reports
from llada_train.config.cluster import ClusterConfig, HealthConfig, NodeConfig
from llada_train.config.errors import UserError
from llada_train.config.load import load

LIMITS = HealthConfig()


def reports(**rates: list[float]) -> dict[str, Report]:
    return {
        node: Report(node, per_gpu={"matmul": values}, versions={"torch": "2.13"}) for node, values in rates.items()
    }


def test_a_slow_gpu_is_named_and_noise_is_not() -> None:
    noise = {f"n{i}": list(np.random.default_rng(i).normal(700, 10, 8)) for i in range(8)}
    assert judge(reports(**noise), list(noise), LIMITS) == {}
    noise["n3"][5] = 500
    faults = judge(reports(**noise), list(noise), LIMITS)
    assert list(faults) == ["n3"] and faults["n3"][0].startswith("GPU 5: matmul 500, but the median is 7")


def test_silence_and_other_versions_are_faults() -> None:
    found = reports(a=[1.0], b=[1.0], c=[1.0])
    found["b"].versions["torch"] = "2.12"
    faults = judge(found, ["a", "b", "c", "d"], LIMITS)
    assert faults == {"b": ["torch 2.12, but 2.13 elsewhere"], "d": ["told nothing within 180 s"]}


def test_a_node_is_blamed_for_slow_links_only_if_all_of_its_links_are() -> None:
    nodes = ["a", "b", "c", "d", "e"]
    ring = list(zip(nodes, nodes[1:] + nodes[:1], strict=True))
    sound = reports(**{node: [1.0] for node in nodes})
    slow = Links([(one, other, 5.0 if "c" in (one, other) else 20.0) for one, other in ring], 20.0)
    assert list(judge(sound, nodes, LIMITS, slow)) == ["c"]
    cable = Links([(one, other, 5.0 if (one, other) == ("a", "b") else 20.0) for one, other in ring], 20.0)
    assert judge(sound, nodes, LIMITS, cable) == {}
    assert judge(sound, ["a", "b"], LIMITS, Links([("a", "b", 0.1)], 0.1)) == {}  # of two, which?


def test_this_machine(tmp_path: Path) -> None:
    site = ClusterConfig(node=NodeConfig(gpus=0, processes=1), local_scratch=tmp_path)
    report = measure(site, tmp_path / "health")
    assert report.problems == [] and report.facts["CPU matmul, GFLOP/s"] > 0 and report.facts["disk, MB/s"] > 0
    assert read_reports(tmp_path / "health") == {report.node: report}
    lost = measure(site.model_copy(update={"local_scratch": tmp_path / "lost"}), tmp_path / "health")
    assert lost.problems == [f"local disk {tmp_path}/lost: No such file or directory"]
    left = [site.scratch.name, "health", f"{report.node}.json"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(left)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    """What is in it, compiled kernels and a staged environment, is run."""
    site = ClusterConfig(node=NodeConfig(gpus=0, processes=1), local_scratch=tmp_path)
    site.scratch.mkdir()
    os.chown(site.scratch, 12345, -1)
    (problem,) = measure(site).problems
    assert problem == f"local disk: {site.scratch} belongs to somebody else, and is not used"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node: {gpus: 0}", "node.processes"),
        ("node: {gpus: 8, processes: 4}", "node.processes"),
        ("environment: {kind: pyxis}", "environment.path"),
        ("slurm: {partition: 'a b'}", "slurm.partition"),
        ("slurm: {time_limit: soon}", "slurm.time_limit"),
        ("slurm: {time_limit: '6:00'}", "slurm.checkpoint_seconds"),
        ("node: {gpus: 8, memory: '1G)&reboot&x=('}", "node.memory"),  # it becomes a word of a shell's
        ("variables: {'A B': c}", "variables"),
    ],
)
def test_mistakes_in_a_site_have_a_place(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"(?s)1 problem in the config:.*{told}.*line 1"):
        load(ClusterConfig, path)
