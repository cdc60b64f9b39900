"""What a job's own script asks: go on or give up, which nodes train, queue again or end. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from llada_train.checkpoint.store import FOLDER, newest_manifest
from llada_train.cluster.health import judge, read_links, read_reports
from llada_train.config.cluster import ClusterConfig
from llada_train.config.errors import UserError
from llada_train.config.load import load
from llada_train.parallel.launch import HUNG_EXIT_CODE, STOPPED_EXIT_CODE
from llada_train.training.journal import note, read_history

EXCLUDED_FILE = "excluded"  # in a submission's folder: nodes that the job does not want now, as scontrol takes them
GAVE_UP_EXIT_CODE = 3
TOO_FEW_NODES_EXIT_CODE = 4
COMPLETE_EXIT_CODE = 5
USER_ERROR_EXIT_CODE = 2
# How srun tells that a node's tasks died of a signal; a plain exit code is more likely the program's fault, and so is
# "Aborted": NCCL aborts the processes that wait for one that is lost.
_DIED = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: (?:Killed|Bus error|Segmentation fault|Illegal instruction)")
_TOLD = re.compile(r"srun: error: \S+: tasks? ")


class Job:
    """One start of a job: `folder` is that of its submission, RUN/slurm/NNNN."""

    def __init__(self, folder: Path, job: int, restart: int) -> None:
        """Raises UserError: the folder is no submission's."""
        self.folder, self.run_dir = folder, folder.parents[1]
        self.cluster = load(ClusterConfig, folder / "cluster.yaml")
        self.attempt = folder / f"attempt-{job}-{restart}"
        self._place = {"job": job, "restart": restart}

    def begin(self, hosts: Sequence[str]) -> int:
        """Note the start; returns 0, or the exit code that says why there is to be none."""
        if self._complete():  # jobs of a chain that were not needed
            print(f"{self.run_dir}: the run is complete; nothing is left to do")
            return COMPLETE_EXIT_CODE
        consumed = self._consumed_samples()
        without_progress = self._attempts_without_progress(consumed)
        note(self.run_dir, "attempt", **self._place, hosts=list(hosts), consumed_samples=consumed)
        if without_progress >= self.cluster.slurm.max_attempts:
            note(self.run_dir, "gave_up", **self._place, attempts=without_progress)
            print(
                f"{self.run_dir}: {without_progress} starts brought no new checkpoint; the job ends. Its logs are in "
                f"{self.folder}; when the cause is mended, submit the run again"
            )
            return GAVE_UP_EXIT_CODE
        return 0

    def choose_nodes(self, hosts: Sequence[str], need: int, with_links: bool) -> bool:
        """Judge the nodes' reports and write those that train to ATTEMPT/nodes; False: too few are sound."""
        folder = self.attempt / "health"
        links = read_links(folder) if with_links else None
        if with_links and links is None:
            print("the nodes did not reach each other; see links-*.log in", self.attempt)
            return False
        faults = judge(read_reports(folder), hosts, self.cluster.health, links)
        sound = [host for host in hosts if host not in faults]
        for host, problems in faults.items():
            print(f"{host}: left out: {'; '.join(problems)}")
        if faults and (not with_links or any(host in faults for host in self._chosen())):
            self._leave_out(faults, exclude=bool(sound))  # else it is more likely what they share than each of them
        if len(sound) < need:
            print(f"{len(sound)} of {len(hosts)} nodes are sound, but {need} are needed")
            return False
        (self.attempt / "nodes").write_text(",".join(sound[:need]), encoding="utf-8")
        return True

    def end(self, code: int, state: str, requeue: bool) -> bool:
        """Note how a start ended; True: the job is to be queued again."""
        meaning = {
            0: "complete",
            STOPPED_EXIT_CODE: "stopped by a signal",
            HUNG_EXIT_CODE: "hung",
            USER_ERROR_EXIT_CODE: "a mistake that only a person can mend",
            TOO_FEW_NODES_EXIT_CODE: "too few sound nodes",
        }.get(code, "failed")
        if code == USER_ERROR_EXIT_CODE and self._has_trained_before():
            meaning = "failed"  # a lock of a node that died, a disk that is away: the run was sound when it last began
        if meaning == "failed" and (node := self._first_that_died()) is not None:
            self._leave_out({node: ["its processes died of a signal"]})
        # A cancelled job is no longer RUNNING; one that SLURM queues again by itself is not either. "": the controller
        # did not answer, and is asked again.
        again = requeue and state in ("RUNNING", "")
        again = again and meaning not in ("complete", "a mistake that only a person can mend")
        again = again and self._attempts_without_progress(self._consumed_samples()) < self.cluster.slurm.max_attempts
        if again:
            self._write_excluded()
        note(self.run_dir, "job_ended", **self._place, code=code, meaning=meaning, state=state, requeue=again)
        return again

    def _has_trained_before(self) -> bool:
        """Did an earlier start since the run was last submitted come to train, and this one not?"""
        for event in reversed(read_history(self.run_dir)):
            if event["event"] == "submitted":
                break
            if event["event"] == "started":
                return any(event[key] != value for key, value in self._place.items())
        return False

    def refused(self) -> None:
        """SLURM would not queue the job again."""
        note(self.run_dir, "requeue_refused", **self._place)

    def _consumed_samples(self) -> int:
        """Of the newest checkpoint."""
        try:
            found = newest_manifest(self.run_dir / FOLDER)
        except UserError:  # the run itself will tell
            return 0
        return found[1].progress.consumed_samples if found is not None else 0

    def _attempts_without_progress(self, consumed: int) -> int:
        """Starts since the run was last submitted or had another checkpoint."""
        count = 0
        for event in reversed(read_history(self.run_dir)):
            if event["event"] == "submitted" or (event["event"] == "attempt" and event["consumed_samples"] != consumed):
                break
            count += event["event"] == "attempt"
        return count

    def _complete(self) -> bool:
        """Did a start since the run was last submitted bring it to its end?"""
        for event in reversed(read_history(self.run_dir)):
            if event["event"] in ("submitted", "started", "ended"):
                return event["event"] == "ended" and event["outcome"] == "complete"
        return False

    def _chosen(self) -> list[str]:
        return (self.attempt / "nodes").read_text(encoding="utf-8").split(",")

    def _leave_out(self, nodes: Mapping[str, Sequence[str]], exclude: bool = True) -> None:
        note(self.run_dir, "left_out", **self._place, nodes=nodes, exclude=exclude)

    def _write_excluded(self) -> None:
        """The nodes that were left out of late: one that was repaired, or was not at fault, may come back.

        Its health is checked again before it trains.
        """
        since, nodes = datetime.now(UTC) - timedelta(hours=self.cluster.health.exclude_hours), dict[str, None]()
        for event in reversed(read_history(self.run_dir)):
            if event["event"] == "submitted" or datetime.fromisoformat(event["time"]) < since:
                break
            if event["event"] == "left_out" and event["exclude"]:
                nodes |= dict.fromkeys(event["nodes"])
        (self.folder / EXCLUDED_FILE).write_text(",".join(sorted(nodes)), encoding="utf-8")

    def _first_that_died(self) -> str | None:
        """The node of which srun tells first in this start's training, if its processes died of a signal.

        What it tells of the health check comes before, and is judged by the nodes' reports.
        """
        log = (self.folder / "job.log").read_text(encoding="utf-8", errors="replace")
        _, began, here = log.rpartition(f"job {self._place['job']}, restart {self._place['restart']}, trains on")
        first = next((line for line in here.splitlines() if _TOLD.match(line)), "") if began else ""
        found = _DIED.match(first)
        return found[1] if found else None
