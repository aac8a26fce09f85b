"""A controller's half of an executor: obeys lines of JSON until it is killed. See conftest.py."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trivial

from jobs.errors import AutoresearchError
from jobs.model import Budget, Run, Submission, to_json
from jobs.settings import Executor
from jobs.submission import ANYWHERE


class Driver:
    def __init__(self, first: dict[str, Any]) -> None:
        self.folder = Path(first["folder"])
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in first["settings"].items()}
        settings = Executor(**lists)
        if settings.kind == "slurm":
            from slurm.executor import SlurmExecutor as Kind
        else:
            from slurm.allocation import AllocationRuns as Kind
        for name, value in first.get("constants", {}).items():
            setattr(Kind, name, value)
        self.executor = Kind(settings, self.folder, work=trivial.run)
        self.submissions: dict[str, Submission] = {}

    def submit(
        self,
        run: str,
        limit_s: float = 30.0,
        avoid: Sequence[str] = (),
        place: Mapping[str, str] = ANYWHERE,
        **work: Any,
    ) -> Any:
        experiment, seed, attempt = run.split("-")
        value = Run(experiment, int(seed[1:]), int(attempt[1:]), Budget("wall", 1), "cpu")
        folder = self.folder / "runs" / value.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "work.json").write_text(json.dumps(work))
        asked = (limit_s, frozenset(avoid), place)
        submission = self.executor.submit(value, f"night-{run}", folder, *asked)
        self.submissions[run] = submission
        return to_json(submission)

    def survey(self) -> Any:
        """All runs of this driver that have no result yet, as the controller does."""
        open_runs = [s for s in self.submissions.values() if not self._finished(s.run)]
        states = self.executor.survey(open_runs)
        return None if states is None else {k: dataclasses.asdict(v) for k, v in states.items()}

    def adopt(self, *runs: str) -> Any:
        """What a restarted controller does with runs whose submission was not recorded."""
        found = self.executor.find([f"night-{run}" for run in runs])
        self.submissions |= {s.run: s for s in found.values()}
        return sorted(self.submissions)

    def know(self, run: str, executor: str, job: str) -> None:
        """A submission out of the ledger."""
        self.submissions[run] = Submission(run, executor, job)

    def cancel(self, *runs: str) -> None:
        self.executor.cancel([self.submissions[run] for run in runs])

    def close(self) -> None:
        self.executor.close()

    def _finished(self, run: str) -> bool:
        return (self.folder / "runs" / run.replace("-", "/", 1) / "result.json").exists()


def main() -> None:
    driver = Driver(json.loads(sys.argv[1]))
    for line in sys.stdin:
        verb, args, kwargs = json.loads(line)
        try:
            answer = getattr(driver, verb)(*args, **kwargs)
        except AutoresearchError as error:
            answer = {"error": type(error).__name__, "words": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
