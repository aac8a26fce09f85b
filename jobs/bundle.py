"""One experiment as a folder that runs without this project, by one plain command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml

from jobs import campaign, config, disk, lab, materialise, report
from jobs.errors import UserError
from jobs.model import Run, to_json
from jobs.recorded import INSTALL, Clone, Original, kept, original, require
from jobs.records import Record
from jobs.settings import Config
from jobs.text import one_line

HERE, DATA, OUT = "/bundle", "/data", "/out"  # where a container sees the folders

KEPT = [("data-{}.json", "data-manifest.json")]  # in the campaign's records, and here
KEPT += [("image-{}.json", "image.json"), ("image-{}.def", "image.def")]

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
echo "{sha256}  $data/manifest.json" | sha256sum --check --quiet - || {{
    echo "DATA=FOLDER must name the prepared data of data-manifest.json" >&2; exit 2; }}
data=$(cd "$data" && pwd)
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
PYTHONPATH=$here/trainer "$python" -P -m referee.wrapper "$out"
"""
CONTAINED = """\
image=${{IMAGE:-{image}}}  # {tag}: a file, or oras://...@sha256:...
if [ -f "$image" ]; then
    echo "{sha256}  $image" | sha256sum --check --quiet -
elif [ "${{image#*://}}" = "$image" ]; then
    echo "IMAGE=FILE must name the image {tag}, sha256 {sha256}" >&2; exit 2
fi
cp "$here/task.json" "$out/"
apptainer exec --containall --cleanenv --no-home {nv}--pwd / --bind "$here:{here}:ro" {bind} \\
    --bind "$out:{out}" "$image" env PYTHONPATH={sealed} {python} -m referee.wrapper {out}
"""
TAIL = """\
grep -E '"(status|value|reason)"' "$out/result.json"
"""


def make(clone: Clone, record: Record, target: Path) -> Path:
    """Write the folder `target`: program, frozen files, records, run.sh. Returns it.

    Raises UserError: the folder exists; the frozen files here are not those of the campaign.
    """
    from containers import seal

    one = original(clone, record)
    if target.exists():
        raise UserError(f"{target} exists already: name a new folder with --to")
    found = seal.evaluator_sha256(lab.TRAINER)
    require("evaluator", one.fact("Evaluator-SHA256"), found, INSTALL)
    draft = target.with_name(f".{target.name}.new")
    disk.remove(draft)
    _program(one, clone, draft)
    seal.copy_sealed(lab.TRAINER, draft / "trainer")
    records = kept(clone)
    _facts(one, clone, record, records, draft)
    _command(one, clone, records, draft)
    draft.rename(target)
    return target


def _program(one: Original, clone: Clone, draft: Path) -> None:
    task = one.config.task
    paths = () if task.kind == "general" else task.editable
    clone.repository.snapshot(one.experiment.commit, draft / "program", paths)
    if task.scorer:
        start = clone.state.start["start_commit"]
        clone.repository.snapshot(start, draft / "scorer", task.scorer.files)
    for folder, names, files in os.walk(draft):  # a snapshot is read-only, a bundle is the user's
        for path in (folder, *(os.path.join(folder, name) for name in (*names, *files))):
            if not os.path.islink(path):
                os.chmod(path, os.stat(path).st_mode | 0o200)


def _facts(
    one: Original, clone: Clone, record: Record, records: Mapping[str, bytes], draft: Path
) -> None:
    state, decision = clone.state, clone.state.decision(record.id)
    told = {
        "experiment": to_json(one.experiment),
        "trailers": dict(one.trailers),
        "results": [to_json(result) for result in state.results(record.id)],
        "decision": decision and to_json(decision),
    }
    settings = yaml.safe_dump(config.to_dict(one.config), sort_keys=False)
    (draft / "campaign.yaml").write_text(settings)
    (draft / "record.json").write_text(json.dumps(told, indent=1))
    (draft / "record.txt").write_text(report.show_text(state, record.id))
    for kind, name in KEPT:
        if content := records.get(_kept(one, kind)):
            (draft / name).write_bytes(content)
    weights = clone.directory / "heads" / record.branch / record.id / disk.WEIGHTS
    if weights.exists():
        shutil.copyfile(weights, draft / disk.WEIGHTS)


def _kept(one: Original, kind: str) -> str:
    """What the campaign's records call the data's manifest, or the image's facts or definition."""
    trailer = "Data-Manifest-SHA256" if kind == "data-{}.json" else "Container-SHA256"
    return kind.format((one.fact(trailer) or "")[:16])


def _command(one: Original, clone: Clone, records: Mapping[str, bytes], draft: Path) -> None:
    """task.json, and run.sh around it."""
    chosen = one.settings()
    contained, nanochat = one.fact("Container-SHA256"), chosen.task.kind == "nanochat"
    site = materialise.Site(
        chosen,
        Path(HERE),
        Path(DATA) if nanochat else None,
        {"evaluator_sha256": one.fact("Evaluator-SHA256")},
        scorer_files=Path(HERE, "scorer"),
    )
    length, scale = materialise.budget(chosen), chosen.data.scale
    again = Run(one.experiment.id, one.run.seed, one.run.attempt, length, scale)
    task = materialise.task(site, clone.state, one.experiment, again, Path(OUT)).to_json()
    task |= {"program": f"{HERE}/program", "python": None, "scratch": None}
    task["isolation"] = "none" if contained else "auto"  # the container is the wall
    (draft / "task.json").write_text(json.dumps(task, indent=1))
    script = draft / "run.sh"
    script.write_text(_script(one, nanochat, records, chosen))
    script.chmod(0o755)


def _script(one: Original, nanochat: bool, records: Mapping[str, bytes], chosen: Config) -> str:
    from containers import command

    then, sha256 = one.result, one.fact("Container-SHA256")
    told = f"{one.experiment.id}, commit {one.experiment.commit}: {then.status} {then.metric}"
    parts = [HEAD.format(told=told)]
    if nanochat:
        data = chosen.data
        facts = {
            "data": shlex.quote(str(campaign.data_folder(chosen))),
            "made": one_line(f"--corpus {data.corpus} --scale {data.scale}"),
            "sha256": one.fact("Data-Manifest-SHA256"),
        }
        parts.append(CHECK_DATA.format(**facts))
    if sha256 is None:
        parts.append(PLAIN.format(data="$data" if nanochat else ""))
    else:
        image = json.loads(records.get(_kept(one, "image-{}.json"), b"{}"))
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
