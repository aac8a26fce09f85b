"""The plugin that lets submitit start a function as a step of a held allocation.

submitit finds it by the entry points of group `submitit`, on the login node and on the compute
node; every job of ours imports it there, so it imports nothing of ours.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, ClassVar

from submitit.core.core import Job, PicklingExecutor
from submitit.core.job_environment import JobEnvironment

STEP_ID = "AUTORESEARCH_STEP"  # tells a step's payload which pickle is its own


class StepJob(Job[Any]):
    """A step, followed by whoever started it: `process` is its srun."""

    _cancel_command = "scancel"
    process: subprocess.Popen[bytes]


class AllocationExecutor(PicklingExecutor):
    """Starts `srun` for each function; the caller composes the command and picks the place.

    The parameters `job_id`, `argv` and `env` are set anew for each submission.
    """

    job_class = StepJob

    def _submit_command(self, command: str) -> StepJob:
        """srun in a session of its own: neither Ctrl-C nor a kill of the controller ends it."""
        job = StepJob(self.folder, self.parameters["job_id"])
        marks = {"SUBMITIT_EXECUTOR": self.name(), STEP_ID: job.job_id}
        with open(self.folder / "srun.log", "ab") as log:
            job.process = subprocess.Popen(
                self.parameters["argv"],
                env=self.parameters["env"] | marks,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return job

    def _num_tasks(self) -> int:
        return 1

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return ""  # a step has no script: see slurm.script.step_argv

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return list(self.parameters["argv"])

    @staticmethod
    def _get_job_id_from_submission_command(string: str | bytes) -> str:
        return string.decode() if isinstance(string, bytes) else string

    @classmethod
    def affinity(cls) -> int:
        return 0  # only where it is asked for by name


class AllocationJobEnvironment(JobEnvironment):
    """How a step learns who it is. Preemption is the holder's affair: nothing here requeues."""

    _env: ClassVar[dict[str, str]] = {
        "job_id": STEP_ID,
        "num_tasks": "SLURM_STEP_NUM_TASKS",
        "num_nodes": "SLURM_STEP_NUM_NODES",
        "node": "SLURM_NODEID",
        "global_rank": "SLURM_PROCID",
        "local_rank": "SLURM_LOCALID",
    }
