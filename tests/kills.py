"""Kills a run at random times until it ends, and compares its records with those of an undisturbed run.

By hand, on the whole smoke profile: ``python tests/kills.py --kills 20``. Each kill is a SIGKILL to all processes of the run, to
the first one only, or to one of the others, at random. Compared are the hashes of weights, predictions and configurations, the
course of training without its seconds, and the tables of figures without timings.
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[1]
TIMINGS = ("dispatch_speed", "inference_speed", "gathering_seconds")


def project(folder: Path) -> Path:
    """A copy of what a run needs."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    shutil.copy(ROOT / "run_all.sh", folder)
    return folder


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "ones_lib.study", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def kill(process: subprocess.Popen, chance: random.Random) -> str:
    """Kill all or some of a run's processes, and wait for its end; returns which."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return "nothing"
    how = chance.choice(["all", "the first", "another"])
    for victim in {"all": tree, "the first": tree[:1], "another": [chance.choice(tree[1:] or tree)]}[how]:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    if how == "another":  # the run may fail or go on
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    return how


def with_kills(folder: Path, arguments: list[str], kills: int, longest: float, seed: int = 0) -> list[str]:
    """Kill a run ``kills`` times after random times, then let it end; returns a line per kill."""
    chance, done = random.Random(seed), []
    while len(done) < kills:
        process, wait = start(folder, arguments), chance.uniform(1, longest)
        try:
            process.wait(timeout=wait)
            done.append(f"finished within {wait:.1f} s")
            break
        except subprocess.TimeoutExpired:
            done.append(f"{kill(process, chance)} after {wait:.1f} s")
    process = start(folder, arguments)
    if process.wait():
        raise RuntimeError((folder / "log.txt").read_text()[-3000:])
    return done


def contents(folder: Path) -> dict[str, str]:
    """What must be the same, by file; ``left`` for unfinished files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "cache" in path.parts or "locks" in path.parts:
            continue
        if path.suffix == ".safetensors" or path.name == "config.json":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".csv" and path.stem not in TIMINGS and not any(t in name for t in ("dispatch-", "speed-")):
            text = path.read_text()
            table = pd.read_csv(path) if text.strip() else pd.DataFrame()
            found[name] = table.drop(columns=[c for c in table if "seconds" in c]).to_csv()
        elif ".tmp" in path.name or ".partial" in name:
            found[name] = "left"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=45, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "kills")
    options, arguments = parser.parse_known_args()
    arguments = arguments or ["--profile", "smoke"]
    shutil.rmtree(options.folder, ignore_errors=True)
    alone, killed = project(options.folder / "alone"), project(options.folder / "killed")
    began = time.monotonic()
    if start(alone, arguments).wait():
        raise RuntimeError((alone / "log.txt").read_text()[-3000:])
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    for number, line in enumerate(with_kills(killed, arguments, options.kills, options.longest, options.seed), start=1):
        print(f"kill {number}: {line}")
    print(f"with kills: {time.monotonic() - began:.0f} s")
    expected, found = contents(alone / "runs"), contents(killed / "runs")
    odd = sorted(name for name, _ in set(expected.items()) ^ set(found.items()))
    weights = sum(name.endswith("weights.safetensors") for name in expected)
    print(
        f"{len(expected)} files, {weights} of them weights: {'all the same' if not odd else f'{len(odd)} differ: {odd[:9]}'}"
    )
    return int(bool(odd))


if __name__ == "__main__":
    sys.exit(main())
