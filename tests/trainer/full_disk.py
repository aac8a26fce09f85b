"""A run on a disk that fills up, as a program: it needs a mount namespace of its own.

    unshare -rm python full_disk.py MEGABYTES FOLDER

mounts a tmpfs of 24 MB on FOLDER, of which others use MEGABYTES, and lets a program fill the rest
and print on. Prints the run's result, and the files that are left, as one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "trainer"))

import runs

PROGRAM = """
import os, contextlib
with contextlib.suppress(OSError), open(os.environ['AUTORESEARCH_SCRATCH'] + '/f', 'wb', 0) as file:
    while True: file.write(bytes(2**16))
for _ in range(40): print('x' * 1000)
train(); evaluate()
"""


def main(by_others: int, folder: Path) -> None:
    runs.data_folder()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], check=True)
    (folder / "others").write_bytes(bytes(by_others * 2**20))
    result = runs.run(folder, PROGRAM, isolation="none")
    runs.remove_data()
    print(json.dumps(result | {"files": os.listdir(folder / "run")}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
