"""One experiment as a folder that runs without this project, by one plain command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import disk, lab, materialise, mirror, report, reproduce
from jobs.errors import UserError
from jobs.history import State
from jobs.model import Run, to_json
from jobs.records import Record
from jobs.repository import Repository
from jobs.reproduce import Original, Wish

HERE, DATA, OUT = "/bundle", "/data", "/out"  # where a container sees the folders

HEAD = """\
#!/bin/sh
# Runs this experiment again. What comes of it: a new folder out-*, with result.json.
# {told}
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$here/out-$(date +%Y%m%d-%H%M%S)-$$
mkdir "$out"
"""
CHECK_DATA = """\
data=${{DATA:-{data}}}  # as `autoresearch prepare` made it: {made}
cmp "$data/manifest.json" "$here/data-manifest.json" || {{
    echo "DATA=FOLDER must name the prepared data of data-manifest.json" >&2; exit 2; }}
"""
PLAIN = """\
python=${{PYTHON:-python3}}  # with the packages that the program imports
"$python" - "$here" "$out" "{data}" <<'END'
import json, sys
here, out, data = sys.argv[1:]
task = json.load(open(here + "/task.json"))
task |= {{"program": here + "/program", "run_dir": out, "data": data or None}}
if task["scorer"]:
    task["scorer"]["files_dir"] = here + "/scorer"
json.dump(task, open(out + "/task.json", "w"))
END
cd / && PYTHONPATH=$here/trainer "$python" -m referee.wrapper "$out"
"""
CONTAINED = """\
image=${{IMAGE:-{image}}}  # {tag}: a file, or oras://...@sha256:...
if [ -f "$image" ]; then
    echo "{sha256}  $image" | sha256sum --check --quiet -
fi
cp "$here/task.json" "$out/"
apptainer exec --containall --cleanenv --no-home {nv}--pwd / --bind "$here:{here}:ro" {bind} \\
    --bind "$out:{out}" "$image" env PYTHONPATH={sealed} {python} -m referee.wrapper {out}
"""
TAIL = """\
grep -E '"(status|value|reason)"' "$out/result.json"
"""


def make(
    state: State, repository: Repository, directory: Path, record: Record, target: Path
) -> Path:
    """Write the folder `target`: program, frozen files, records, run.sh. Returns it.

    Raises:
        UserError: the folder exists; the frozen files here are not those of the campaign.
    """
    from containers import seal

    one = reproduce.original(state, repository, directory, record)
    if target.exists():
        raise UserError(f"{target} exists already: name a new folder with --to")
    reproduce.require(
        *("evaluator", one.fact("Evaluator-SHA256"), seal.evaluator_sha256(lab.TRAINER)),
        "Install the version of this project whose trainer/ the campaign used",
    )
    draft = target.with_name(f".{target.name}.new")
    disk.remove(draft)
    _program(one, repository, state, draft)
    seal.copy_sealed(lab.TRAINER, draft / "trainer")
    records = _records(repository, state)
    _facts(one, state, record, records, directory, draft)
    _command(one, state, draft, records)
    draft.rename(target)
    return target


def _program(one: Original, repository: Repository, state: State, draft: Path) -> None:
    task = one.config.task
    paths = () if task.kind == "general" else task.editable
    repository.snapshot(one.experiment.commit, draft / "program", paths)
    if task.scorer:
        repository.snapshot(state.start["start_commit"], draft / "scorer", task.scorer.files)
    for folder, names, files in os.walk(draft):  # a snapshot is read-only, a bundle is the user's
        for path in (folder, *(os.path.join(folder, name) for name in (*names, *files))):
            if not os.path.islink(path):
                os.chmod(path, os.stat(path).st_mode | 0o200)


def _records(repository: Repository, state: State) -> Mapping[str, bytes]:
    try:
        return mirror.load_records(repository, state.campaign)
    except UserError:
        return {}  # a campaign that was never copied into git has them in its folder only


def _facts(
    one: Original,
    state: State,
    record: Record,
    records: Mapping[str, bytes],
    directory: Path,
    draft: Path,
) -> None:
    decision = state.decision(record.id)
    told = {
        "experiment": to_json(one.experiment),
        "trailers": dict(one.trailers),
        "results": [to_json(result) for result in state.results(record.id)],
        "decision": decision and to_json(decision),
        "config": state.config,
    }
    (draft / "record.json").write_text(json.dumps(told, indent=1))
    (draft / "record.txt").write_text(report.show_text(state, record.id))
    kept = {
        "data-manifest.json": _kept(records, "data", one.fact("Data-Manifest-SHA256"), "json"),
        "image.json": _kept(records, "image", one.fact("Container-SHA256"), "json"),
        "image.def": _kept(records, "image", one.fact("Container-SHA256"), "def"),
    }
    for name, content in kept.items():
        if content is not None:
            (draft / name).write_bytes(content)
    weights = directory / "heads" / record.branch / disk.WEIGHTS
    if state.branch(record.branch).best == record.id and weights.exists():
        shutil.copyfile(weights, draft / disk.WEIGHTS)


def _kept(records: Mapping[str, bytes], kind: str, sha: str | None, end: str) -> bytes | None:
    return records.get(f"{kind}-{(sha or '')[:16]}.{end}")


def _command(one: Original, state: State, draft: Path, records: Mapping[str, bytes]) -> None:
    """task.json, and run.sh around it."""
    chosen = reproduce.settings(one, Wish(), None)
    contained, nanochat = one.fact("Container-SHA256"), chosen.task.kind == "nanochat"
    site = materialise.Site(
        chosen,
        Path(HERE),
        Path(DATA) if nanochat else None,
        {"evaluator_sha256": one.fact("Evaluator-SHA256")},
        scorer_files=Path(HERE, "scorer"),
    )
    again = Run(
        *(one.experiment.id, one.run.seed, one.run.attempt),
        *(materialise.budget(chosen), chosen.data.scale),
    )
    task = materialise.task(site, state, one.experiment, again, Path(OUT)).to_json()
    task |= {"program": f"{HERE}/program", "python": None}
    task["isolation"] = "none" if contained else "auto"  # the container is the wall
    (draft / "task.json").write_text(json.dumps(task, indent=1))
    script = draft / "run.sh"
    script.write_text(_script(one, nanochat, records, chosen.data))
    script.chmod(0o755)


def _script(one: Original, nanochat: bool, records: Mapping[str, bytes], data: Any) -> str:
    from containers import command

    then, sha256 = one.result, one.fact("Container-SHA256")
    told = f"{one.experiment.id}, commit {one.experiment.commit}: {then.status} {then.metric}"
    parts = [HEAD.format(told=told)]
    if nanochat:
        folder = data.folder or str(lab.default_data(data.corpus, data.scale))
        made = f"--corpus {data.corpus} --scale {data.scale}"
        parts.append(CHECK_DATA.format(data=shlex.quote(folder), made=made))
    if sha256 is None:
        parts.append(PLAIN.format(data="$data" if nanochat else ""))
    else:
        image = json.loads(_kept(records, "image", sha256, "json") or b"{}")
        cuda = image.get("labels", {}).get("autoresearch.cuda", "none")
        parts.append(
            CONTAINED.format(
                image=shlex.quote(one.fact("Registry-Digest") or "image.sif"),
                tag=one.fact("Container-Tag"),
                sha256=sha256,
                nv="" if cuda == "none" else "--nv ",
                bind=f'--bind "$data:{DATA}:ro"' if nanochat else "",
                here=HERE,
                out=OUT,
                sealed=command.SEALED,
                python=command.PYTHON,
            )
        )
    return "".join([*parts, TAIL])
