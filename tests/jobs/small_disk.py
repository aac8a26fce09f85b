"""A campaign on a disk that fills up, as a program: it needs a mount namespace of its own.

    unshare -rm python small_disk.py FOLDER KILOBYTES

mounts a tmpfs on FOLDER, lets all but KILOBYTES of it be used up in mid-run, and checks that the
controller pauses in words and that nothing is lost once there is space again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from toylab import Lab, change, check_books, ended, eventually

SIZE_MB = 24


def fill(folder: Path, leave_kb: int) -> Path:
    """Use up the disk of `folder` but for `leave_kb`; the file that does it."""
    filler = folder / "filler"
    with open(filler, "wb") as file:
        while (free := shutil.disk_usage(folder).free - leave_kb * 1024) > 0:
            file.write(bytes(min(free, 1 << 20)))
            file.flush()
    return filler


def main(folder: Path, leave_kb: int) -> None:
    size = f"size={SIZE_MB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)
    os.chdir(folder)
    edits = change(X=1, NAP=0.5), change(X=6)
    lab = Lab(folder / "lab", *edits, limits={"experiments": 3}, confirm={"runs": 1})
    with ended(lab.start()) as controller:
        eventually((lab.folder / "runs/e0002/s1-a1/claim.json").exists)
        filler = fill(folder, leave_kb)
        said, _ = controller.communicate(timeout=60)
    print(said)
    assert controller.returncode == 3, controller.returncode
    assert "Traceback" not in said
    assert "No space left" in said or "MB are free on its disk" in said
    recorded = (lab.folder / "ledger.jsonl").read_bytes()
    filler.unlink()
    status, said = lab.call()
    print(said)
    assert status == 0, status
    whole = recorded[: recorded.rfind(b"\n") + 1]
    assert (lab.folder / "ledger.jsonl").read_bytes().startswith(whole)
    assert lab.verdicts()["X 6"] == "discard"
    assert [r.id for r in lab.state.chain("main")] == ["e0001", "e0002"]
    check_books(lab)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
