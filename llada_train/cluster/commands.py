"""The commands around a cluster: submit, array, status, doctor, and what a job's own script calls."""

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from llada_train.config.errors import UserError

WATCH_SECONDS = 2.0

ConfigFile = Annotated[Path, typer.Argument(help="YAML config file, for example configs/pretrain/llada_8b.yaml.")]
ClusterFile = Annotated[
    Path,
    typer.Option("--cluster", envvar="LLADA_CLUSTER", help="The site's facts: a file as those in configs/cluster."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the sbatch file; data need not be there yet.")]
DEFAULT_CLUSTER = Path("configs/cluster/h100.yaml")
array = typer.Typer(no_args_is_help=True, help="SLURM arrays: tokenize text, evaluate many checkpoints.")
job = typer.Typer(hidden=True, help="What the script of a submitted job calls.")


def submit(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train; spares come on top.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings to change; those of the site as cluster.slurm.partition=…"
        ),
    ] = None,
    cluster: ClusterFile = DEFAULT_CLUSTER,
    chain: Annotated[
        int,
        typer.Option(min=1, help="So many jobs, each after the one before, instead of one that queues itself again."),
    ] = 1,
    dry_run: DryRun = False,
    accept_config_changes: Annotated[
        bool, typer.Option("--accept-config-changes", help="Go on with settings that the run was not begun with.")
    ] = False,
) -> None:
    """Submit a run, of pre-training or SFT, to SLURM. It saves and queues itself again until it is complete.

    Example: llada-train submit configs/pretrain/llada_8b.yaml --nodes 40 cluster.slurm.partition=gpu
    """
    from llada_train.cluster import submit as submission

    files = submission.prepare(config, overrides or [], cluster, nodes, accept_config_changes, chain, not dry_run)
    if dry_run:
        typer.echo(files.script, nl=False)
        typer.echo("data and tokenizer were not looked at; without --dry-run they are", err=True)
        return
    jobs = submission.submit(files, nodes, chain)
    run = files.folder.parents[1]
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    typer.echo(f"job {', '.join(map(str, jobs))}")
    typer.echo(f"script  {files.folder / 'job.sbatch'}")
    typer.echo(
        f"logs    {files.folder / 'job.log'}; of the processes attempt-JOB-RESTART/rank-0.log and NODE.log there"
    )
    typer.echo(f"watch   llada-train status {shlex.quote(str(shown))} --watch")
    typer.echo(f"end     scancel {' '.join(map(str, jobs))}   (saves a checkpoint; submit again to go on)")


@array.command("tokenize")
def array_tokenize(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Files and folders, as llada-data takes them.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Prefix of the corpus.", show_default=False)],
    shards: Annotated[int, typer.Option(min=1, help="Jobs that share the work.", show_default=False)],
    text_key: Annotated[str, typer.Option(help="The key of the text in .jsonl files.")] = "text",
    workers: Annotated[int, typer.Option(min=1, help="Processes of each job.")] = 1,
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the site.")] = None,
    cluster: ClusterFile = DEFAULT_CLUSTER,
    dry_run: DryRun = False,
) -> None:
    """Tokenize text into a corpus: an array of `llada-data tokenize --shard`, then `llada-data merge`."""
    from llada_train.cluster import submit as submission

    site, _ = submission.load_cluster(cluster, [f"{submission.CLUSTER_PREFIX}{text}" for text in setting or []])
    options = ["--text-key", text_key]
    tokenize, merge = submission.tokenize_array(site, inputs, tokenizer, output, shards, workers, options)
    if dry_run:
        typer.echo(tokenize.script, nl=False)
        return
    first, last = submission.submit_arrays(tokenize, merge)
    typer.echo(f"job {first}, {shards} parts; then job {last} joins them to {output}.bin and .idx")
    typer.echo(f"logs    {tokenize.folder}; if a part fails nothing is joined: give the same command again, to go on")


@array.command("evaluate")
def array_evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the site.")] = None,
    cluster: ClusterFile = DEFAULT_CLUSTER,
    dry_run: DryRun = False,
) -> None:
    """`llada-train evaluate` of every checkpoint of a run, one job for each."""
    from llada_train.cluster import submit as submission

    site, _ = submission.load_cluster(cluster, [f"{submission.CLUSTER_PREFIX}{text}" for text in setting or []])
    files = submission.evaluate_array(site, run)
    if dry_run:
        typer.echo(files.script, nl=False)
        return
    typer.echo(f"job {submission.submit_array(files)}")
    typer.echo(f"reports {files.folder}/step-*.json, logs beside them")


def status(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until nothing works on the run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Where a run is: step, loss, speed, time left, last checkpoint, restarts, slow ranks."""
    from llada_train.cluster.status import AT_WORK, table, told_at
    from llada_train.cluster.status import status as read

    if as_json and watch:
        raise UserError("status: give either --json or --watch")
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(read(run)), indent=2))
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def shown(note: str = "") -> tuple[Table, bool]:
        one = read(run)
        grid = Table.grid(padding=(0, 2))
        for name, value in table(one):
            grid.add_row(f"[bold]{name}", value.replace("[", r"\["))
        if note:
            grid.add_row("", f"[dim]{note}")
        return grid, not (one.jobs or one.state in AT_WORK)

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if not watch:
        console.print(shown()[0])
        return
    with Live(console=console, auto_refresh=False) as live:
        over = False
        while not over:
            grid, over = shown(f"{told_at()}; Ctrl-C ends the watching, not the run")
            live.update(grid, refresh=True)
            if not over:
                time.sleep(WATCH_SECONDS)


def doctor(
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster", help="The site's facts, which say what a sound node has; this machine's if left out."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A shared folder to write the report to.")] = None,
    links: Annotated[
        bool, typer.Option("--links", help="As tasks of srun or torchrun: the network between the nodes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """What is installed, what a run will use, what is missing; is this node fit to train? Exit code 1: it is not.

    With --output, as jobs do before each start, only the node's health: disk, clock, CPU, GPUs and their rates.
    """
    from llada_train.cluster.environment import findings
    from llada_train.cluster.health import LINKS_FILE, measure
    from llada_train.config.cluster import ClusterConfig, NodeConfig
    from llada_train.config.load import load

    if cluster is not None:
        site = load(ClusterConfig, cluster)
    else:
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
        site = ClusterConfig(node=NodeConfig(gpus=gpus, processes=None if gpus else 1))
    if links:
        if output is None:
            raise UserError("doctor --links: give --output, a folder that all nodes share")
        from llada_train.cluster.links import measure_links
        from llada_train.parallel.launch import adopt_place

        adopt_place()
        measure_links(site, output)
        typer.echo(f"wrote {output / LINKS_FILE}")
        return
    found = [] if output is not None else findings(site.node.gpus)
    report = measure(site, output)
    problems = [f"{one.subject}: {one.found}" for one in found if one.fault] + report.problems
    if as_json:
        told = {"environment": [dataclasses.asdict(one) for one in found], "node": dataclasses.asdict(report)}
        typer.echo(json.dumps({**told, "problems": problems}, indent=2))
        raise typer.Exit(int(bool(problems)))
    for one in found:
        typer.echo(f"{one.subject:28}  {one.found}" + (f"  → {one.remedy}" if one.remedy else ""))
    versions = {} if found else report.versions
    for name, value in (*versions.items(), *report.facts.items(), *report.per_gpu.items()):
        rates = ", ".join(f"{v:.0f}" for v in value) if isinstance(value, list) else value
        typer.echo(f"{name:28}  {rates}")
    for problem in problems:
        typer.echo(f"{report.node}: AT FAULT: {problem}")
    if not problems:
        limits = "by the site's limits" if cluster is not None else "but rates have no limits without --cluster"
        typer.echo(f"{report.node}: no fault found, {limits}")
    raise typer.Exit(int(bool(problems)))


Folder = Annotated[Path, typer.Argument(help="Of the submission.")]
JobId = Annotated[int, typer.Option("--job")]
Restart = Annotated[int, typer.Option("--restart")]
Hosts = Annotated[str, typer.Option("--hosts", help="Joined by commas.")]


@job.command("begin")
def job_begin(folder: Folder, job: JobId, restart: Restart, hosts: Hosts) -> None:
    """Note a start; exit code 3: the run has started often enough, 5: it is complete."""
    from llada_train.cluster.job import Job

    raise typer.Exit(Job(folder, job, restart).begin(hosts.split(",")))


@job.command("nodes")
def job_nodes(
    folder: Folder,
    job: JobId,
    restart: Restart,
    hosts: Hosts,
    need: int = typer.Option(),
    links: bool = typer.Option(False),
) -> None:
    """Judge the nodes and write those that train; exit code 4: too few are sound."""
    from llada_train.cluster.job import TOO_FEW_NODES_EXIT_CODE, Job

    enough = Job(folder, job, restart).choose_nodes(hosts.split(","), need, links)
    raise typer.Exit(0 if enough else TOO_FEW_NODES_EXIT_CODE)


@job.command("end")
def job_end(
    folder: Folder,
    job: JobId,
    restart: Restart,
    code: int = typer.Option(),
    state: str = typer.Option(),
    no_requeue: bool = typer.Option(False, "--no-requeue"),
) -> None:
    """Note an end; says whether the job is to be queued again."""
    from llada_train.cluster.job import Job

    typer.echo("requeue" if Job(folder, job, restart).end(code, state, not no_requeue) else "end")


@job.command("refused")
def job_refused(folder: Folder, job: JobId, restart: Restart) -> None:
    """Note that SLURM would not queue the job again."""
    from llada_train.cluster.job import Job

    Job(folder, job, restart).refused()
