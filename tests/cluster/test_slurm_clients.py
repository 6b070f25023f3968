"""SLURM's commands that hang: each is ended in time, by whomever it was called, and that is said in its name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission, JobPaths

from cluster import slurm_commands
from cluster.job_manager import JobManager
from cluster.profile import Profile
from cluster.slurm import UNLISTED, SlurmCluster
from cluster.trial_folder import JobState, TrialFolder

ANSWERS = {"scontrol": "echo MaxArraySize = 1001", "srun": "exit 0", "squeue": "exit 0", "scancel": "exit 0"}


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """A cluster whose commands answer as one says, and else that there is nothing."""
    commands = tmp_path / "commands"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")

    def make(**answers: str) -> SlurmCluster:
        for name, answer in (ANSWERS | answers).items():
            (commands / name).write_text(f"#!/bin/sh\n{answer}\n")
            (commands / name).chmod(0o755)
        return SlurmCluster(Profile(kind="slurm"), tmp_path / "sweep", "0123456789", 1, 1)

    return make


@pytest.fixture
def cluster(answering, tmp_path, monkeypatch):
    """A cluster whose command of this name hangs; the others answer."""
    monkeypatch.setattr(slurm_commands, "LIMIT", 1)
    os.mkfifo(tmp_path / "never")  # nobody ever opens its other end
    return lambda hangs: answering(**{hangs: f"exec cat {tmp_path / 'never'}"})


@pytest.fixture
def trials(digits, tmp_path) -> list[TrialFolder]:
    return [TrialFolder.request(tmp_path / "trials", digits(init_seed=seed)) for seed in range(2)]


@pytest.mark.parametrize("count", [1, 2])
def test_sbatch(cluster, trials, count):
    """Alone, and for an array, which submitit submits in another way."""
    with pytest.raises(OSError, match=r"^sbatch did not answer within 1 s$"):
        cluster("sbatch").submit(trials[:count], exclude="")
    assert all(trial.job() is None for trial in trials)


def test_squeue(cluster):
    with pytest.raises(OSError, match=r"^squeue did not answer within 1 s$"):
        cluster("squeue").states(["1"])


def test_scancel(cluster):
    with pytest.raises(OSError, match=r"^scancel did not answer within 1 s$"):
        cluster("scancel").cancel(["1"])


def test_scontrol(cluster, trials):
    with pytest.raises(OSError, match=r"^scontrol did not answer within 1 s$"):
        cluster("scontrol").submit(trials, exclude="")


def asked_again(cluster: SlurmCluster, *job_ids: str) -> dict[str, JobState]:
    """What the next question gives, whenever that is due."""
    cluster._next_query = 0.0
    return cluster.states(job_ids)


def test_sacct_that_hangs_is_not_asked_again(cluster, tmp_path):
    """Accounting is an extra; without it a job that squeue has forgotten counts as lost."""
    made = cluster("sacct")
    assert made.states(["1"]) == {"1": UNLISTED}
    Path(tmp_path / "commands" / "sacct").write_text("#!/bin/sh\necho '1|COMPLETED|node1'\n")
    assert asked_again(made, "1") == {}


@pytest.mark.parametrize(
    "state",
    [
        *("PENDING", "RUNNING", "SUSPENDED", "STOPPED", "REQUEUE_HOLD", "SPECIAL_EXIT", "COMPLETING", "EXPEDITING"),
        "A_STATE_OF_TOMORROW",
    ],
)
def test_a_job_that_squeue_calls_alive_is_not_dead(answering, trials, state):
    made = answering(squeue=f"echo '7|{state}|None|node1'", sbatch="exit 1")
    manager = JobManager(trials[0].path.parent, made)
    for trial in manager.scan.open():
        trial.record_job("7", made.folder / "log")
    manager.poll()
    assert manager.states[trials[0].name].alive
    assert all(trial.job()["submissions"] == 1 for trial in trials)


def test_a_job_is_asked_for_by_its_id_where_the_users_list_lacks_it(answering):
    """A job of another account's, or one that a site's plugin shows to nobody else."""
    made = answering(squeue="case $* in *--jobs=7,8*) echo '7|RUNNING|None|node1'; echo '8|FAILED|None|node1';; esac")
    assert {job_id: state.state for job_id, state in made.states(["7", "8"]).items()} == {
        "7": "RUNNING",
        "8": "FAILED",
    }


def test_a_job_that_accounting_calls_alive_is_not_dead(answering):
    made = answering(squeue="exit 0", sacct="echo Welcome; echo '7|RUNNING|node1'; echo '8|CANCELLED by 0|node1'")
    for _ in range(3):
        states = asked_again(made, "7", "8")
        assert states["7"].alive
        assert states["8"].state == "CANCELLED"


def test_one_empty_look_gives_no_trial_a_second_job(answering, trials, tmp_path):
    """It takes two answers in a row, of squeue's list and by the job's id, that know nothing of it."""
    made = answering(
        squeue="case $* in *--jobs*) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;; esac",
        sacct="exit 1",
    )
    assert made.states(["7"]) == {"7": UNLISTED}
    (tmp_path / "commands" / "squeue").write_text("#!/bin/sh\necho '7|RUNNING|None|node1'\n")
    assert asked_again(made, "7")["7"].state == "RUNNING"
    (tmp_path / "commands" / "squeue").write_text("#!/bin/sh\nexit 0\n")
    assert asked_again(made, "7") == {"7": UNLISTED}
    assert asked_again(made, "7") == {}


VARIABLES = ("SQUEUE_PARTITION", "SLURM_MEM_PER_CPU", "SBATCH_EXPORT", "SLURM_EXPORT_ENV", "SACCT_FORMAT", "SLURM_CONF")
VARIABLES += ("SCANCEL_STATE", "SLURM_CLUSTERS", "SALLOC_MEM_PER_CPU")


def test_the_users_shell_does_not_reach_slurms_commands(answering, trials, tmp_path, monkeypatch):
    """But where the configuration lies, what the profile names, and all that is not SLURM's."""
    monkeypatch.setattr(slurm_commands, "_visible", set(slurm_commands._visible))
    for name in (*VARIABLES, "OF_THE_USER"):
        monkeypatch.setenv(name, "1")
    note = f"env >> {tmp_path}/$(basename $0).env"
    made = answering(
        sbatch=f"{note}; echo 'Welcome to the site'; echo Submitted batch job 7",
        squeue=f"{note}; exit 0",
        scancel=note,
        sacct=f"{note}; exit 0",
        scontrol=f"{note}; echo MaxArraySize = 1001",
    )
    slurm_commands.show_variables(["SLURM_CLUSTERS"])
    made.submit(trials, exclude="")
    made.states(["7", "8"])
    made.cancel(["7"])
    for command in ("sbatch", "squeue", "scancel", "sacct", "scontrol"):
        seen = {line.partition("=")[0] for line in (tmp_path / f"{command}.env").read_text().splitlines()}
        assert seen & {*VARIABLES, "OF_THE_USER"} == {"SLURM_CONF", "SLURM_CLUSTERS", "OF_THE_USER"}, command


def test_jobs_are_asked_for_by_the_users_number(answering, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody")
    made = answering(squeue=f'echo "$*" > {tmp_path}/asked')
    made.states(["7"])
    assert f"--user={os.getuid()}" in (tmp_path / "asked").read_text() or "--jobs=7" in (tmp_path / "asked").read_text()
    assert "somebody" not in (tmp_path / "asked").read_text()


def test_an_array_that_is_refused_is_halved(answering, digits, tmp_path):
    """A site that lets a user have three jobs: three are taken, and what it says of the fourth is told."""
    trials = [TrialFolder.request(tmp_path / "trials", digits(init_seed=seed)) for seed in range(4)]
    sbatch = f"""
n=$(sed -n 's/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1"); n=$((${{n:-0}} + 1))
have=$(cat {tmp_path}/have 2>/dev/null || echo 0)
if [ $((have + n)) -gt 3 ]; then echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; fi
echo $((have + n)) > {tmp_path}/have
echo "Submitted batch job 1$have"
"""
    made = answering(sbatch=sbatch)
    with pytest.raises(OSError, match="QOSMaxSubmitJobPerUserLimit"):
        made.submit(trials, exclude="")
    assert [trial.job_id for trial in trials] == ["10_0", "10_1", "12", None]
    assert not list(made.folder.glob("*.json"))
    manager = JobManager(tmp_path / "trials", made)
    made.jobs_in_flight = 4
    (tmp_path / "commands" / "squeue").write_text(
        '#!/bin/sh\nfor id in 10_0 10_1 12; do echo "$id|RUNNING|None|node1"; done\n'
    )
    with pytest.raises(OSError, match=r"submission refused, again in 1 s: .*QOSMaxSubmitJobPerUserLimit"):
        manager.poll()
    (tmp_path / "have").write_text("2")
    manager._refused_until = 0.0
    manager.poll()
    assert trials[3].job_id == "12"
    assert [trial.job()["submissions"] for trial in trials] == [1] * 4


@pytest.mark.parametrize("option", ["mem", "mem-per-cpu", "mem-per-gpu"])
def test_memory_that_the_user_asks_for_takes_the_place_of_ours(answering, tmp_path, option):
    """In a trial's job and in the driver's: SLURM takes one of these options only."""
    profile = Profile(kind="slurm", sbatch={option: "7G"}, driver={"sbatch": {option: "3G"}})
    assert re.findall(r"--(mem.*)=(\w+)", SlurmCluster.batch_file(profile, tmp_path)) == [(option, "7G")]
    answering(sbatch=f'echo "$*" > {tmp_path}/asked; echo 7')
    SlurmCluster.submit_driver(profile, tmp_path, "0123456789", [])
    assert re.findall(r"--(mem\S*)=(\w+)", (tmp_path / "asked").read_text()) == [(option, "3G")]


def lost(cluster: SlurmCluster, trial: TrialFolder, tmp_path: Path, name: str = "", comment: str = "") -> None:
    """A submission of which the answer was lost: the job waits, and its id is not noted."""
    intent = f"{cluster.name}-1"
    cluster.folder.mkdir(parents=True)
    (cluster.folder / f"{intent}.json").write_text(json.dumps([trial.name]))
    job = f"7|{name or intent}|{comment or intent}"
    script = f'#!/bin/sh\ncase "$*" in *%T*) echo "7|PENDING|Priority|";; *) echo "{job}";; esac\n'
    (tmp_path / "commands" / "squeue").write_text(script)


def test_who_only_looks_adopts_nothing(answering, trials, tmp_path):
    """`--status` beside a driver: the driver finds its job by what it has written down, and submits no other."""
    made = answering(sbatch="exit 1")
    lost(made, trials[0], tmp_path)
    JobManager(tmp_path / "trials", made)
    assert trials[0].job() is None
    assert len(list(made.folder.glob("*.json"))) == 1


@pytest.mark.parametrize(("name", "comment"), [("", ""), ("renamed by a plugin", ""), ("", "the user's own")])
def test_an_adopted_job_is_alive_and_has_its_work(answering, trials, tmp_path, name, comment):
    """Whatever was answered before; submitit, which had no answer, has not written down what it does."""
    made = answering(sbatch="exit 1")
    manager = JobManager(tmp_path / "trials", made)
    assert made.states([]) == {}  # the answer that is kept for a while
    lost(made, trials[0], tmp_path, name, comment)
    made.jobs_in_flight = 1
    manager.poll()
    assert trials[0].job()["id"] == "7"
    assert manager.states[trials[0].name].state == "PENDING"
    assert trials[1].job() is None
    work = DelayedSubmission.load(JobPaths(made.folder, "7").submitted_pickle)
    assert work.args[0] == trials[0].path


@pytest.mark.parametrize("said", ["12", "12;cluster", "Welcome!\n\n12\n", "job 7 of yours ended\n12;sim"])
def test_the_id_is_found_in_what_sbatch_prints(said):
    assert slurm_commands.parse_job_id(said) == "12"


def test_no_id_in_what_sbatch_prints():
    with pytest.raises(OSError, match=r"sbatch: no job id in 'queue is full'"):
        slurm_commands.parse_job_id("queue is full\n")
