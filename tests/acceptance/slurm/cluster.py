"""A real SLURM on this machine: munged, slurmctld and two slurmd, all files in one folder.

The nodes are loopback addresses, so that ranks find each other by the nodes' names. An installed
SLURM is left alone: configuration (SLURM_CONF), key, sockets and ports are this cluster's own.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("127.0.0.2", "127.0.0.3")
GPUS = (
    "/dev/null",
    "/dev/zero",
)  # what SLURM hands out as a node's GPUs; torch looks for none there
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
SETTLED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
OverTimeLimit=0
KillWait=20
MinJobAge=3600
InactiveLimit=0
GresTypes=gpu
NodeName={nodes[0]} Port={ports[1]} CPUs=2 Gres=gpu:2 State=UNKNOWN
NodeName={nodes[1]} Port={ports[2]} CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=10:00 State=UP
"""


def lacking() -> list[str]:
    """The programs that a cluster needs and this machine does not have."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


class Cluster:
    """A running SLURM; `environment` holds what its clients need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        self.environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))
            },
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs. Raises RuntimeError."""
        (self.folder / "state").mkdir(parents=True)
        text = CONFIGURATION.format(
            ports=free_ports(3), user=getpass.getuser(), folder=self.folder, nodes=NODES
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(
            "".join(f"Name=gpu File={device}\n" for device in GPUS)
        )
        self.start_munge()
        self.spawn("slurmctld", "-D")
        for node in NODES:
            self.spawn("slurmd", "-D", "-N", node)
        self.wait_for(
            lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2,
            "the nodes are not idle",
            60,
        )

    def start_munge(self) -> None:
        """munged with a key and a socket of this cluster's own."""
        key, folder = self.folder / "munge.key", self.folder
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # --force: the folders above may be writable by others, as /tmp is
        files = {
            "key-file": key,
            "socket": folder / "munge.socket",
            "pid-file": folder / "munge.pid",
        }
        files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        self.spawn(
            "munged",
            "--foreground",
            "--force",
            *(f"--{name}={path}" for name, path in files.items()),
        )
        self.wait_for((folder / "munge.socket").exists, "munged has no socket", 20)

    def spawn(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as output:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )

    def stop(self) -> None:
        """Cancel all jobs, end the daemons."""
        self.run("scancel", "--state=PENDING", "--me")
        self.run("scancel", "--signal=KILL", "--full", "--me")
        self.run("scancel", "--me")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, **options) -> str:
        """What the command prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, **options
        )
        return done.stdout

    def check(
        self, *command: str, extra: dict[str, str] | None = None, status: int = 0, **options
    ) -> str:
        """What the command prints; fails if it exits otherwise. extra: environment variables."""
        environment = {**self.environment, **(extra or {})}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def wait_for(self, condition, what: str, seconds: float, every: float = 0.1) -> None:
        """Wait for the condition. Raises RuntimeError with the ends of the daemons' logs."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise RuntimeError(f"{what} after {seconds} s\n{self.last_words()}")
            time.sleep(every)

    def last_words(self) -> str:
        """The ends of the logs."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)

    def field(self, job: str, name: str) -> str:
        """A field of scontrol's description of a job, empty if it has none."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait_until_settled(self, job: str, seconds: float) -> str:
        """The state in which the job ended for good."""
        self.wait_for(
            lambda: self.state(job) in SETTLED, f"job {job} has not ended", seconds, every=0.3
        )
        return self.state(job)
