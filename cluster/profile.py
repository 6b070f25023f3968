"""Where and how jobs run: a YAML file in `cluster/profiles`, or one of the user's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, WithJsonSchema

from lorvp.errors import UserError
from lorvp.parts import Part
from lorvp.utils.explain import closest
from lorvp.utils.yaml_file import YamlFile

PROFILES = Path(__file__).parent / "profiles"
KINDS = {
    "local": "cluster.local:LocalCluster",
    "slurm": "cluster.slurm:SlurmCluster",
}
"""The kinds of places where jobs run, and their classes."""


def _is_known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown name {kind!r}; one of {', '.join(KINDS)}")
    return kind


Kind = Annotated[str, AfterValidator(_is_known), WithJsonSchema({"enum": list(KINDS), "type": "string"})]


SbatchOptions = dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], str | int | bool]


class DriverJob(Part):
    """What the driver of a sweep asks for when it is a job itself (`--detach`): CPUs and memory, no GPU."""

    partition: str | None = Field(None, description="default: the one of the trials' jobs")
    cpus: PositiveInt = 2
    memory_gb: PositiveFloat = Field(2, description="0.3 while it searches, 0.6 with 500 trials, about 1 at the end")
    time_limit_minutes: PositiveInt = Field(24 * 60, description="it requeues itself before that")
    sbatch: SbatchOptions = Field({}, description="other options of sbatch, by their long name")


class Profile(Part):
    """One place to run jobs. Most keys are SLURM's: `kind: local` looks at `jobs_in_flight` and `trials_per_job`."""

    kind: Kind = Field(description="local: processes on this machine; slurm: jobs of SLURM")
    jobs_in_flight: PositiveInt | None = Field(None, description="jobs that wait or run; default: search.concurrent")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = Field(None, description="GPUs by type, as gpu:rtx8000:1")
    gpu_memory_gb: PositiveFloat | None = Field(None, description="of one GPU; --dry-run says whether trials fit it")
    allow_cpu: bool = Field(
        False, description="a job that can use none of its GPUs trains on the CPU, and does not go on elsewhere"
    )
    constraint: str | None = Field(None, description="features that a node must have")
    exclude: str | None = Field(None, description="nodes not to use")
    trials_per_job: PositiveInt = Field(
        1, description="trials that a job takes one after the other; they must share backbone and data"
    )
    cpus_per_gpu: PositiveInt = 4
    memory_gb_per_gpu: PositiveFloat = 32
    time_limit_minutes: PositiveInt = Field(24 * 60, description="of one start of a job; it goes on after a requeue")
    requeues: NonNegativeInt = Field(20, description="starts after the first that a trial may need")
    array_chunk: PositiveInt = Field(100, description="jobs in one array at most; the site's MaxArraySize binds too")
    setup: list[str] = Field([], description="shell lines before the job: modules, environment, proxy")
    container: str | None = Field(None, description="goes before python, as `apptainer exec --nv image.sif`")
    mail_user: str | None = Field(None, description="whom SLURM writes to")
    mail_type: str | None = Field(None, description="of what, as END,FAIL")
    sbatch: SbatchOptions = Field({}, description="other options of sbatch, by their long name")
    slurm_variables: list[Annotated[str, Field(pattern="^[A-Z]+_[A-Z_]+$")]] = Field(
        [], description="what SLURM's commands see of SLURM's own variables in your shell, as SLURM_CLUSTERS"
    )
    driver: DriverJob = DriverJob()

    @property
    def asks_for_gpus(self) -> bool:
        """Say whether a job is given GPUs: by `gres`, or by one of sbatch's own options."""
        options = [self.gres or "", *(f"{key}={value}" for key, value in self.sbatch.items())]
        return any(re.match(r"gpu(:|$)|gpus(-per-\w+)?=|gres=(.*,)?gpu|tres-per-\w+=.*gpu", text) for text in options)

    @property
    def gpus(self) -> int:
        """GPUs of a job; CPUs and memory are asked for as if a job without any had one."""
        count = re.search(r":(\d+)$", self.gres or "")
        return int(count[1]) if count else 1


def names() -> list[str]:
    """Return the profiles that come with the project."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load(name: str) -> Profile:
    """Return the profile of that name, or in the YAML file at that path. Raises UserError in one line."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name!r}: {error}") from None
    if name in names():
        path = PROFILES / f"{name}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        raise UserError(f"no such profile {name!r}{closest(name, names())}, or name a YAML file of your own")
    return YamlFile(path).validate(Profile)
