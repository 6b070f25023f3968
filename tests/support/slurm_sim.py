"""A real SLURM on this machine: munged, MariaDB, slurmdbd, slurmctld and several slurmd, all on loopback.

    python tests/support/slurm_sim.py up FOLDER    start it, write FOLDER/profile.yaml, print how to use it
    python tests/support/slurm_sim.py down FOLDER  stop it and remove FOLDER

Each node has a hostname and a process tree of its own (a namespace), so that `Simulation.power_loss` is one. There
are two GPU types, which are device files without a GPU behind them, a partition `gpu` and a preemptible one,
`scavenge`. Needs root, and Debian's packages (PACKAGES).
"""

from __future__ import annotations

import fcntl
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PACKAGES = ["slurm-wlm", "munge", "mariadb-server-core", "mariadb-client-core", "slurmdbd", "slurm-wlm-mysql-plugin"]
LOCKS = Path("/tmp/lorvp-ports")
"""Of all simulations on this machine, whichever folder for temporary files they know."""
TYPES = ("rtx8000", "rtx8000", "a100")
PROFILE = """\
kind: slurm
partition: gpu
gres: gpu:rtx8000:1
allow_cpu: true
cpus_per_gpu: 1
memory_gb_per_gpu: 1.5
time_limit_minutes: 30
jobs_in_flight: 2
"""
"""Jobs on it as the tests start them; two at a time suit two cores."""


class Simulation:
    """The daemons of one cluster, in one folder, each with its process id in `run/NAME.pid`."""

    def __init__(self, folder: Path, accounting: bool = True, types: Sequence[str] = TYPES, **options: str) -> None:
        self.folder = folder
        self.accounting = accounting
        self.types = types
        """GPU type of each node."""
        self.options = options
        """Lines of slurm.conf, in place of the usual ones or beside them."""
        self.ports: Ports | None = None
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    @property
    def nodes(self) -> list[str]:
        return [f"node{i}" for i in range(1, len(self.types) + 1)]

    def up(self) -> None:
        """Starts everything and returns when all nodes are idle."""
        for name in ("run", "log", "state", "spool", "munge", "db"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o700)
        self.ports = Ports(len(self.nodes))
        self._write_configs()
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        arguments = [f"--key-file={munge}/key", f"--socket={self.folder}/run/munge.sock", f"--seed-file={munge}/seed"]
        arguments += [f"--pid-file={munge}/pid", f"--log-file={munge}/log", "--foreground"]
        self.start("munged", *arguments, inherits=[self.ports.lock.fileno()])  # so that `up` may end before it
        if self.accounting:
            data, sock = self.folder / "db", self.folder / "run" / "mysql.sock"
            arguments = ["--no-defaults", f"--user={getpass.getuser()}", f"--datadir={data}", f"--socket={sock}"]
            arguments += [
                f"--port={self.ports.first + Ports.DATABASE}",
                "--bind-address=127.0.0.1",
                "--skip-grant-tables",
                "--skip-log-bin",
            ]
            arguments += ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M"]
            self.start("mariadbd", *arguments)
            client = ["mariadb", "--no-defaults", f"--socket={sock}", "--execute"]
            self.wait(lambda: self.works(*client, "create database if not exists slurm_acct_db"))
            self.start("slurmdbd", "-D")
            self.wait(lambda: self.works("sacctmgr", "--noheader", "show", "cluster"))
        self.start("slurmctld", "-D")
        self.wait(lambda: self.works("scontrol", "ping"))
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: self.node_states() == ["idle"] * len(self.nodes))

    def node_states(self) -> list[str]:
        return self.say("sinfo", "--noheader", "--Node", "--format=%T", "--partition=gpu").split()

    def down(self) -> None:
        """Stops everything, jobs included, and removes the folder."""
        for node in self.nodes:
            self.power_loss(node)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self.stop(name)
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and ("SLURM_JOB_ID" in process.environ() or "slurmstepd" in process.name()):
                    process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.ports:
            self.ports.give_back()

    def say(self, *command: str) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout

    def works(self, *command: str) -> bool:
        try:
            return not subprocess.run(command, env=self.environment, capture_output=True, timeout=10).returncode
        except subprocess.TimeoutExpired:
            return False

    def wait(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [path.read_text(errors="replace")[-500:] for path in (self.folder / "log").iterdir()]
                raise TimeoutError("SLURM: " + "\n".join(logs))
            time.sleep(0.1)

    def start(self, name: str, *arguments: str, program: str | None = None, inherits: Sequence[int] = ()) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        command = [shutil.which(program or name, path=path) or (program or name), *arguments]
        with open(self.folder / "log" / f"{name}.out", "a") as log:
            options = {"stdout": log, "stderr": log, "start_new_session": True, "pass_fds": inherits}
            process = subprocess.Popen(command, env=self.environment | {"PATH": path}, **options)
        (self.folder / "run" / f"{name}.pid").write_text(str(process.pid))

    def stop(self, name: str, signum: signal.Signals = signal.SIGTERM) -> None:
        """Ends a daemon; by force where it takes longer than 2 s."""
        pid_file = self.folder / "run" / f"{name}.pid"
        if not pid_file.exists():
            return
        pid = int(pid_file.read_text())
        for each in (signum, signal.SIGKILL):
            deadline = time.monotonic() + 2
            if not gone(pid):
                os.kill(pid, each)
            while not gone(pid) and time.monotonic() < deadline:
                time.sleep(0.02)
        pid_file.unlink()

    def start_node(self, node: str) -> None:
        hosts = self.folder / "run" / f"{node}.hosts"
        others = " ".join(self.nodes)
        hosts.write_text(f"127.0.0.1 localhost {node} {others} {socket.gethostname()}\n")
        script = f"mount --bind {hosts} /etc/hosts; hostname {node}; slurmd -D -N {node} & while :; do sleep 1; done"
        flags = ["--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self.start(node, *flags, "bash", "-c", script, program="unshare")

    def power_loss(self, node: str) -> None:
        """The node and all that ran on it are gone at once."""
        self.stop(node, signal.SIGKILL)

    def kill_daemon(self, node: str) -> None:
        """The node's slurmd is gone, and its jobs live on: SLURM takes the node for dead and starts them elsewhere."""
        namespace = psutil.Process(int((self.folder / "run" / f"{node}.pid").read_text()))
        for process in namespace.children(recursive=True):
            if process.name() == "slurmd":
                process.kill()

    def _write_configs(self) -> None:
        folder, port, user = self.folder, self.ports.first, getpass.getuser()
        auth = f"AuthType=auth/munge\nAuthInfo=socket={folder}/run/munge.sock"
        (folder / "plugstack.conf").write_text("")
        (folder / "slurmdbd.conf").write_text(
            f"{auth}\nDbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={port + Ports.DATABASE_DAEMON}\nSlurmUser={user}\n"
            f"LogFile={folder}/log/slurmdbd.log\nPidFile={folder}/run/slurmdbd.own.pid\n"
            f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={port + Ports.DATABASE}\n"
            f"StorageUser={user}\nStorageLoc=slurm_acct_db\nCommitDelay=0\n"
        )
        (folder / "slurmdbd.conf").chmod(0o600)
        storage = {"AccountingStorageType": "accounting_storage/none"}
        if self.accounting:
            storage = {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": "127.0.0.1",
                "AccountingStoragePort": port + Ports.DATABASE_DAEMON,
                "AccountingStoragePass": f"{folder}/run/munge.sock",  # clients take the socket from here
                "AccountingStorageTRES": "gres/gpu",
            }
        lines = {
            "ClusterName": "sim",
            "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
            "SlurmctldPort": port + Ports.CONTROLLER,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "AuthInfo": f"socket={folder}/run/munge.sock,cred_expire=5",  # else a requeued job waits 120 s
            **storage,
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": f"{folder}/run/slurmctld.own.pid",
            "SlurmdPidFile": f"{folder}/run/%n.own.pid",
            "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{folder}/log/%n.log",
            "PlugStackConfig": f"{folder}/plugstack.conf",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SlurmdParameters": "config_overrides",  # more CPUs than there are
            "PropagateResourceLimits": "NONE",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_min_interval=0,sched_interval=1,batch_sched_delay=0,bf_interval=1",
            "PriorityType": "priority/basic",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "JobRequeue": 1,
            "ReturnToService": 2,
            "SlurmctldTimeout": 5,
            "SlurmdTimeout": 3,
            "MessageTimeout": 2,
            "TCPTimeout": 2,
            "KillWait": 5,
            "MinJobAge": 300,
            "InactiveLimit": 0,
            "Waittime": 0,
            "BatchStartTimeout": 10,
            "OverTimeLimit": 0,
            "MaxArraySize": 1001,
            "GresTypes": "gpu",
        } | self.options
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        gres = ""
        for i, (node, kind) in enumerate(zip(self.nodes, self.types, strict=True)):
            text += (
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port + Ports.NODES + i} CPUs=8 "
                "Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000 "
                f"Gres=gpu:{kind}:2 Feature={kind} State=UNKNOWN\n"
            )
            gres += f"NodeName={node} Name=gpu Type={kind} File={folder}/run/nvidia[0-1]\n"
        partition = "Nodes=ALL MaxTime=INFINITE DefaultTime=10 DefMemPerCPU=500 State=UP"
        preempt = lines["PreemptMode"]
        text += f"PartitionName=gpu {partition} Default=YES PriorityTier=10 PreemptMode=OFF\n"
        text += f"PartitionName=scavenge {partition} PriorityTier=1 PreemptMode={preempt} GraceTime=0\n"
        for k in (0, 1):  # real device nodes, or CUDA_VISIBLE_DEVICES is not set
            device = folder / "run" / f"nvidia{k}"
            if not device.exists():
                os.mknod(device, 0o600 | 0o020000, os.makedev(195, k))
        (folder / "gres.conf").write_text(gres)
        (folder / "slurm.conf").write_text(text)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Ports:
    """A block of ports that nobody else uses, other simulations on this machine neither, for as long as this lives.

    It is the lock on a file that reserves it; a daemon that has inherited the file's descriptor holds it, too.
    """

    SIZE = 20
    CONTROLLER, DATABASE_DAEMON, DATABASE, NODES = 0, 1, 3, 11
    """What is where in a block; the nodes' follow each other."""

    def __init__(self, nodes: int) -> None:
        assert self.NODES + nodes <= self.SIZE
        used = [self.CONTROLLER, self.DATABASE_DAEMON, self.DATABASE, *range(self.NODES, self.NODES + nodes)]
        with suppress(FileExistsError):
            LOCKS.mkdir()
            LOCKS.chmod(0o1777)  # other users have clusters, too
        for first in range(14000, 20000, self.SIZE):  # below those of `support.ports`
            self.first = first
            try:
                self.lock = open(LOCKS / f"{first}.lock", "a")  # noqa: SIM115  closed when it is given back
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if all(is_free(first + port) for port in used):
                return
            self.lock.close()
        raise OSError("no free ports for SLURM")

    def give_back(self) -> None:
        self.lock.close()


def is_free(port: int) -> bool:
    """Whether a server could listen there, on all of this machine's addresses."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended don't count
        try:
            server.bind(("", port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    verb, folder = sys.argv[1], Path(sys.argv[2]).absolute()
    simulation = Simulation(folder)
    if verb == "up":
        simulation.up()
        (folder / "profile.yaml").write_text(PROFILE)
        print(f"export SLURM_CONF={folder}/slurm.conf")
    else:
        simulation.down()
