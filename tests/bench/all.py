"""Every measurement, one after the other, into RESULTS.md: `make proof`. Takes hours on two cores.

python tests/bench/all.py              all of them
python tests/bench/all.py feed ledger  only these (bench_feed.py, bench_ledger.py)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from trainer import prepare  # noqa: E402

# What a bench needs to be told; {data} and {work} are folders.
ARGUMENTS = {
    "constants": ["--data", "{data}", "--work", "{work}"],
    "startup": ["--data", "{data}", "--work", "{work}"],
}


def main(chosen: list[str]) -> int:
    """Run the chosen benches (all by default). The number that failed."""
    names = chosen or sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    data = prepare.default_folder("stdlib", "cpu")
    if not (data / "manifest.json").exists():
        subprocess.run([sys.executable, ROOT / "trainer/prepare.py"], check=True)
    failed = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as work:
            words = [a.format(data=data, work=work) for a in ARGUMENTS.get(name, [])]
            argv = [sys.executable, "-m", f"tests.bench.bench_{name}", *words]
            print(f"== {name}", flush=True)
            if subprocess.run(argv, cwd=ROOT, check=False).returncode:
                failed.append(name)
    print(f"{len(names) - len(failed)} measured, {len(failed)} failed: {', '.join(failed) or '-'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
