"""A real SLURM of two nodes on this machine, up in two seconds: Debian's packages, no systemd, as root.

The controller and each node have a network namespace of their own, joined by a bridge, so that nothing leans on a
loopback interface that all share; nodes also have their own mounts, host names and process ids. A node claims 96 CPUs,
2 TB and 8 GPUs of type h100 (links to /dev/null): scripts which ask for whole GPU nodes are accepted as they are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llada_train.training.journal import read_history

ROOT = Path(__file__).parents[2]
NODES = {"n1": "10.73.0.11", "n2": "10.73.0.12"}
CONTROLLER = "10.73.0.1"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter", "setpriv", "ip")
ENDED = ("COMPLETED", "FAILED", "CANCELLED")
PATIENCE = 300.0  # seconds for anything that has to happen, on a machine with other things to do

CONF = """\
ClusterName=lab
SlurmctldHost=localhost({controller})
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=20
NodeName=DEFAULT CPUs=96 RealMemory=2000000 TmpDisk=1000000 Gres=gpu:h100:8 Feature=h100
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=2 PreemptMode=OFF
"""


class CannotBeHadError(Exception):
    """Why there can be no SLURM here."""


class Cluster:
    def __init__(self, folder: Path) -> None:
        """Start it, with its state in `folder`, to be made in a folder of its own, which other users may enter then.

        Raises:
            CannotBeHadError: programs are missing, or this machine allows no namespaces.
        """
        if os.getuid() != 0:
            raise CannotBeHadError("only root may make the namespaces of its nodes")
        missing = [program for program in PROGRAMS if _found(program) is None]
        if missing:
            raise CannotBeHadError(f"not installed: {', '.join(missing)} (Debian: munge slurmctld slurmd slurm-client)")
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._waiting_since: dict[int, float] = {}
        self._write_files()
        try:
            self._start_network()
            self._start_controller()
            for node in NODES:
                self.start_node(node)
            self.wait_for(
                lambda: self.output("sinfo", "-h", "-N", "-n", "n1,n2", "-p", "main", "-o", "%T") == "idle\nidle"
            )
        except BaseException:
            self.stop()
            raise

    def _write_files(self) -> None:
        folder = self.folder
        for name in ("state", "dev", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        for own in (folder, folder.parent):
            own.chmod(0o755)  # munge wants to reach its socket
        for i in range(8):
            (folder / f"dev/nvidia{i}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu Type=h100 File={folder}/dev/nvidia[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        hosts = "".join(f"{address} {node}\n" for node, address in NODES.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        lines = [f"NodeName={node} NodeHostname=localhost NodeAddr={address}" for node, address in NODES.items()]
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        conf = CONF.format(folder=folder, controller=CONTROLLER, user=user, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(conf)

    @property
    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
        return {**inherited, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def inside(self) -> list[str]:
        """What comes before a command to run it where the controller can be reached: on the login node, as it were."""
        return ["nsenter", "-n", "-t", str(self._processes["network"].pid)]

    def run(self, *command: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.inside(), *map(str, command)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            **options,
        )
        assert not check or done.returncode == 0, done
        return done

    def llada_train(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """The command as a user types it on the login node, in a checkout."""
        return self.run(sys.executable, "-m", "llada_train.cli", *arguments, check=False, **{"cwd": ROOT, **options})

    def output(self, *command: object) -> str:
        return self.run(*command).stdout.strip()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                # Whatever ends the tests, nothing is left behind.
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _start_network(self) -> None:
        ready = self.folder / "network.ready"
        script = (
            "ip link set lo up && ip link add name lan address 02:00:00:00:00:01 type bridge && ip link set lan up && "
            f"ip address add {CONTROLLER}/24 dev lan && touch {ready} && exec sleep infinity"
        )
        self._start("network", ["unshare", "-n", "bash", "-c", script])
        while not ready.exists():
            if self._processes["network"].poll() is not None:
                told = (self.folder / "network.out").read_text().strip()
                raise CannotBeHadError(f"no network namespace with a bridge can be made here: {told}")
            time.sleep(0.02)

    def _start_controller(self) -> None:
        folder, socket = self.folder, self.folder / "munge.sock"
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={folder / name}" for option, name in {**files, "seed-file": "munge.seed"}.items()]
        self._start("munged", [*self.inside(), "munged", "-F", *options])
        self.wait_for(socket.exists)
        self._start("slurmctld", [*self.inside(), "slurmctld", "-D"])

    def start_node(self, node: str) -> None:
        """Start a node, or one that was killed again."""
        link, peer = f"to-{node}", f"lan-{node}"
        script = (
            f"hostname {node}; mount --bind {self.folder}/hosts /etc/hosts; ip link set lo up; "
            f"until ip link show {peer}; do sleep 0.02; done; "
            f"ip address add {NODES[node]}/24 dev {peer}; ip link set {peer} up; exec slurmd -D -N {node}"
        )
        namespaces = ["-n", "-m", "-u", "-p", "-f", "--mount-proc", "--kill-child=KILL"]
        self._start(node, [*self.inside(), "unshare", *namespaces, "bash", "-c", script])
        process = self._processes[node].pid
        ours = Path(f"/proc/{self._processes['network'].pid}/ns/net").readlink()
        self.wait_for(
            lambda: Path(f"/proc/{process}/ns/net").readlink() not in (ours, Path("/proc/self/ns/net").readlink())
        )
        self.run("ip", "link", "delete", link, check=False)
        self.run("ip", "link", "add", "name", link, "type", "veth", "peer", "name", peer, "netns", process)
        self.run("ip", "link", "set", link, "master", "lan", "up")

    def kill_node(self, node: str) -> None:
        """The machine loses power: its slurmd, all steps and all tasks die at once."""
        self._processes[node].kill()
        self._processes[node].wait()

    def on_node(self, node: str, *command: object) -> list[str]:
        """A command that runs with the mounts, network and processes of a node."""
        return ["nsenter", "-n", "-m", "-u", "-p", "-t", self.child(node).name, *map(str, command)]

    def processes_on(self, node: str, word: str) -> list[int]:
        """Python processes on a node whose command has the word: their ids, as seen here."""
        namespace = (self.child(node) / "ns/pid").readlink()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if word.encode() in command and b"python" in command[0] and (entry / "ns/pid").readlink() == namespace:
                    found.append(int(entry.name))
        return found

    def child(self, node: str) -> Path:
        """/proc of the process that is the first in a node's namespaces."""
        process = self._processes[node].pid
        return Path("/proc", Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])

    def job(self, number: int, field: str) -> str:
        """A field of `scontrol show job`, as JobState or Restarts."""
        words = self.output("scontrol", "-o", "show", "job", number).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{field}="))

    def wait_for_job(self, number: int, *states: str) -> str:
        """Until it is in one of these states, which is returned; a job that waits after a requeue is told to begin."""

        def there() -> bool:
            if (state := self.job(number, "JobState")) not in states:
                self.hurry(number)
            return state in states

        self.wait_for(there, 0.3)
        return self.job(number, "JobState")

    def hurry(self, number: int) -> None:
        """A job that was queued again waits for a while; not here.

        But for two seconds: SLURM tells its new credential from the one that was revoked by the second of each.
        """
        if self.job(number, "Reason") != "BeginTime":
            self._waiting_since.pop(number, None)
        elif time.monotonic() - self._waiting_since.setdefault(number, time.monotonic()) > 2:
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)

    def wait_for(self, condition: Callable[[], object], interval: float = 0.05) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.told()
            time.sleep(interval)

    def told(self) -> str:
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def stop(self) -> None:
        for name in (*NODES, "slurmctld", "munged", "network"):
            if name in self._processes:
                self._processes[name].send_signal(signal.SIGKILL if name in NODES else signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _found(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]))


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.stop()


class SubmittedRun:
    """A run that `llada-train submit` has queued."""

    def __init__(self, cluster: Cluster, config: Path, nodes: int = 2, *arguments: str) -> None:
        self.cluster, self.config, self.folder = cluster, config, config.parent / "run"
        site = ("--cluster", "configs/cluster/cpu.yaml", "cluster.slurm.partition=main")
        done = cluster.llada_train("submit", config, "--nodes", nodes, *site, *arguments)
        assert done.returncode == 0 and not done.stderr, done
        self.told = done.stdout
        self.jobs = [int(word) for word in done.stdout.splitlines()[0].removeprefix("job ").split(", ")]
        self.job = self.jobs[0]
        self.submission = max((self.folder / "slurm").glob("[0-9]*"))

    def over(self) -> bool:
        """Has the job ended for good? (One that is queued again is FAILED for a moment.)"""
        ends = [event for event in self.events("job_ended") if event["job"] == self.job]
        return any(not event["requeue"] for event in ends) and self.cluster.job(self.job, "JobState") in ENDED

    def end(self) -> str:
        """Wait until the job has ended for good; its state."""

        def ended() -> bool:
            self.cluster.hurry(self.job)
            return self.over()

        try:
            self.cluster.wait_for(ended, 0.3)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        return self.cluster.job(self.job, "JobState")

    def held(self, restart: int) -> dict[str, int]:
        """Wait until this start of the job has done a step, and stop its processes there: node → process."""
        due = time.monotonic()

        def stepped() -> bool:
            nonlocal due
            if time.monotonic() > due:
                assert not self.over()
                self.cluster.hurry(self.job)
                due = time.monotonic() + 1
            return any((e["job"], e["restart"]) == (self.job, restart) for e in self.events("first_step"))

        try:
            self.cluster.wait_for(stepped, 0.01)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        found = {node: process for node in NODES for process in self.cluster.processes_on(node, "pretrain")}
        for process in found.values():
            os.kill(process, signal.SIGSTOP)
        return found

    def signalled(self, processes: dict[str, int], number: signal.Signals) -> None:
        """Wait until the signal has reached the processes that were held, and let them go on."""

        def pending(process: int) -> int:
            status = Path(f"/proc/{process}/status").read_text().splitlines()
            sets = (int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd")))
            return sum(1 << (number - 1) & one for one in sets)

        self.cluster.wait_for(lambda: all(map(pending, processes.values())))
        for process in processes.values():
            os.kill(process, signal.SIGCONT)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_history(self.folder) if event["event"] == kind]

    def status(self) -> dict[str, Any]:
        done = self.cluster.llada_train("status", self.folder, "--json")
        assert done.returncode == 0, done
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def logs(self) -> str:
        files = [self.submission / "job.log", *sorted(self.submission.glob("attempt-*/*.log"))]
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.exists())
