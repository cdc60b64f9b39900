"""What `llada-train submit` and `array` hand to SLURM, and what is wrong told before anything is queued or written."""

import json
from pathlib import Path

import pytest
from cluster import ROOT, Cluster
from conftest import write_config

from llada_train.config.cluster import ClusterConfig
from llada_train.config.load import load

CPU = ("--cluster", "configs/cluster/cpu.yaml")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("cluster.spares=1",), "3 nodes are asked for, spares included, but partition main has 2: the job would wait"),
        (("cluster.slurm.partition=nope",), "SLURM refuses the job: Invalid partition name specified; "),
        (("training.micro_batchsize=2",), "unknown key; did you mean 'micro_batch_size'?"),
        (("data.corpora.0.path=/no/where",), "/no/where"),
        (("parallel.tensor_parallel=4",), "parallel"),
        (("cluster.slurm.partitoin=main",), "slurm.partitoin (override): unknown key; did you mean 'partition'?"),
        (("cluster.environment.path=/no/where",), "environment.path /no/where: no virtual environment"),
        (("cluster.variables.A B=x",), "variables.A B"),
        (("cluster.slurm.constraint=nope",), "SLURM refuses the job: Invalid feature specification"),
    ],
)
def test_mistakes(slurm: Cluster, tiny_data: Path, tmp_path: Path, arguments: tuple[str], told: str) -> None:
    config = write_config(tiny_data, tmp_path)
    done = slurm.llada_train("submit", config, "--nodes", 2, *CPU, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, done
    assert "main" in done.stderr or "partition=nope" not in arguments[0]  # which partitions there are
    assert "Traceback" not in done.stderr and not done.stdout
    assert not (tmp_path / "run").exists() and slurm.output("squeue", "-h", "-n", "run") == ""


def test_without_slurm(tiny_data: Path, tmp_path: Path, run_command) -> None:  # type: ignore[no-untyped-def]
    config = write_config(tiny_data, tmp_path)
    done = run_command("llada_train.cli", "submit", config, "--nodes", 1, *CPU, PATH="/nowhere")
    assert (
        done.returncode == 2 and "not found: this is done on a login node" in done.stderr and "torchrun" in done.stderr
    )
    assert not (tmp_path / "run").exists()
    done = run_command("llada_train.cli", "doctor")
    assert "disk, MB/s" in done.stdout and "no fault found, but rates have no limits" in done.stdout


def test_8b_on_40_nodes(slurm: Cluster, tmp_path: Path) -> None:
    """The shipped recipe and site as they are, before there is data: SLURM takes the script for nodes of 8 GPUs."""
    command = ("submit", "configs/pretrain/llada_8b.yaml", "--nodes", 40, "--dry-run", f"run_dir={tmp_path}/8b")
    site = ("cluster.slurm.account=lab", "cluster.environment.modules=[cuda/12.8]", "cluster.node.gpu_type=h100")
    rendered = slurm.llada_train(*command, *site)
    assert rendered.returncode == 0, rendered
    script = rendered.stdout
    for line in ("--nodes=41", "--ntasks-per-node=8", "--gpus-per-node=h100:8", "--cpus-per-task=12", "--account=lab"):
        assert f"#SBATCH {line}\n" in script
    assert "export NCCL_IB_HCA=mlx5\n" in script and "module load cuda/12.8\n" in script
    assert "learning_rate" not in script and "batch_size" not in script  # nothing of the recipe is in shell
    two = slurm.llada_train(*command[:3], 1, *command[4:], "cluster.spares=1", "cluster.node.gpu_type=h100").stdout
    for text in (script, two):
        assert slurm.run("bash", "-n", input=text).stderr == ""
    accepted = slurm.run("sbatch", "--test-only", input=two)
    assert "to start at" in accepted.stderr and not (tmp_path / "8b").exists()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("apptainer", "apptainer exec --nv --bind "),
        ("pyxis", "everywhere=(srun --container-image={image} --container-mounts="),
    ],
)
def test_containers(slurm: Cluster, tiny_data: Path, tmp_path: Path, kind: str, told: str) -> None:
    """Only the text: neither can be had here. A staged image is run from the node's own disk."""
    image = tmp_path / "image.sqsh"
    image.write_bytes(b"image")
    environment = f"cluster.environment={{kind: {kind}, path: {image}, mounts: [/shared], stage: true}}"
    config = write_config(tiny_data, tmp_path, parallel__tensor_parallel=1)
    done = slurm.llada_train("submit", config, "--nodes", 1, "--dry-run", environment, "cluster.spares=0")
    assert done.returncode == 0, done
    line = next(line for line in done.stdout.splitlines() if told.format(image=image) in line)
    for folder in ("/shared", tmp_path / "run", tiny_data, ROOT, "/tmp"):  # the run's own too, and the launcher's
        seen = {part.partition(":")[0] for part in line.replace("=", " ").replace(",", " ").split()}
        assert any(Path(folder).is_relative_to(path) for path in seen if path.startswith("/")), (folder, line)
    assert f"/launch/stage.sh {image} " in done.stdout and '"$staged"' in done.stdout.splitlines()[-2] + done.stdout
    assert slurm.run("bash", "-n", input=done.stdout).stderr == ""


@pytest.mark.parametrize("path", sorted((ROOT / "configs/cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sites(path: Path) -> None:
    assert load(ClusterConfig, path).node.tasks > 0


def test_tokenizing_and_evaluating_arrays(slurm: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Three jobs tokenize what one process did, to the same bytes; two evaluate the two checkpoints of a run."""
    output, site = tmp_path / "corpus", (*CPU, "--set", "slurm.partition=main")
    what = (tiny_data / "text", "--tokenizer", tiny_data / "tokenizer", "--output", output, "--shards", 3)
    done = slurm.llada_train("array", "tokenize", *what, *site)
    assert done.returncode == 0, done
    merging = int(done.stdout.split("then job ")[1].split()[0])
    run = write_config(tiny_data, tmp_path, checkpoint__interval_steps=5, training__global_batch_size=32)
    assert slurm.llada_train("pretrain", run).returncode == 0
    evaluating = slurm.llada_train("array", "evaluate", tmp_path / "run", *site)
    assert slurm.wait_for_job(merging, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", done.stdout
    for suffix in (".bin", ".idx"):
        assert output.with_suffix(suffix).read_bytes() == (tiny_data / f"corpus{suffix}").read_bytes()

    folder = tmp_path / "run/evaluations/0001"
    steps = [path.name for path in sorted((tmp_path / "run/checkpoints").glob("step-*"))]
    assert evaluating.returncode == 0 and (folder / "parts").read_text().split() == steps
    slurm.wait_for(lambda: len(list(folder.glob("step-*.json"))) == len(steps), 0.3)
    bounds = [json.loads((folder / f"{step}.json").read_text())["bound"]["nats_per_token"] for step in steps]
    assert len(bounds) >= 1 and all(1 < bound < 10 for bound in bounds)
