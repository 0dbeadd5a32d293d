"""Stands in for `adept_ds.cli.train` where a test needs its behaviour towards SLURM alone: no model, no process group.

STUB_STEP_SECONDS   time of a step (0.05)
STUB_IMPORT_SECONDS time before the signal handlers are there
STUB_FAIL           "RANK WHAT STEP": that rank does so at that step; raise, exit7, kill or hang
STUB_NO_PROGRESS    nothing is saved
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from adept_ds.config.command_line import parse_command_line
from adept_ds.files import write_json
from adept_ds.storage.run_folder import MANIFEST, RNG_NAME, STATE_NAME, file_proof, newest_step

SHOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(arguments: Sequence[str]) -> None:
    time.sleep(float(os.environ.get("STUB_IMPORT_SECONDS", "0")))
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        for other in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(other, signal.SIG_IGN)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, receive)
    _, loaded = parse_command_line(arguments, "stub", "")
    run = loaded.run
    rank = int(os.environ["RANK"])
    folder = Path(run.logging.run_dir)
    seen = folder / "seen"
    seen.mkdir(parents=True, exist_ok=True)
    name = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}-{rank}.json"
    write_json(seen / name, {**os.environ, "arguments": list(arguments), "model": run.model.name_or_path})
    print(json.dumps({name: os.environ.get(name) for name in SHOWN}), flush=True)
    if rank == 0:
        write_json(folder / "config.json", run.model_dump(mode="json", by_alias=True))
    failing, what, when = os.environ.get("STUB_FAIL", "-1 none 0").split()

    def save(step: int) -> None:
        if rank == 0 and not os.environ.get("STUB_NO_PROGRESS"):
            checkpoint = folder / "checkpoints" / f"step-{step:08d}"
            write_json(checkpoint / STATE_NAME, {"step": step})
            (checkpoint / RNG_NAME).touch()
            write_json(checkpoint / MANIFEST, {name: file_proof(checkpoint, name) for name in (STATE_NAME, RNG_NAME)})

    def set_status(state: str, step: int) -> None:
        if rank == 0:
            write_json(folder / "status.json", {"state": state, "step": step, "total_steps": run.train.max_steps})

    first = newest_step(folder)
    set_status("running", first)
    for step in range(first + 1, (run.train.max_steps or 0) + 1):
        time.sleep(float(os.environ.get("STUB_STEP_SECONDS", "0.05")))
        if rank == int(failing) and step == int(when):
            fail(what)
        if rank == 0:
            (folder / "step").write_text(str(step))
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        if received:
            save(step)
            set_status("interrupted", step)
            return
        if step % (run.train.save_every or 1) == 0:
            save(step)
    save(run.train.max_steps or 0)
    set_status("finished", run.train.max_steps or 0)


def fail(what: str) -> None:
    if what == "raise":
        raise RuntimeError("the stub raises")
    if what == "exit7":
        sys.exit(7)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(3600)
