"""Kill and stop real processes of the multi-process example at random, and compare with an undisturbed run.

For each number of processes: an undisturbed run; then a run in which a process drawn at random is sent SIGKILL (one in
five times SIGSTOP) a random while after it has got going, 20 times in a row; then one that shrinks on two of them.
What is counted: rounds that had to be done again, failures to come back, and the difference of the final loss.

    python benchmarks/local_sgd_faults.py        # some ten minutes; writes reports/local_sgd/faults.json
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "local_sgd_multihost.py"
REPORT = ROOT / "reports" / "local_sgd"
ROUNDS = 30  # of a run, or four a fault
SHRINKING = (3, 2)  # processes and faults of the run that shrinks


def run(processes, rounds, faults, seed, *, shrink=False, timeout=5.0):
    """Run the example; send ``faults`` signals, one a restart. Return what happened."""
    draw = random.Random(seed)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(ROOT)]))}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, str(EXAMPLE), "--processes", str(processes), "--rounds", str(rounds)]
        command += ["--workdir", workdir, "--restarts", str(faults + 3), "--timeout", str(timeout)]
        command += ["--startup-timeout", "120", "--pause", "0.1"] + (["--shrink"] if shrink else [])
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        pids, sent, lost, done, reached, began = [], [], [], None, 0, time.time()
        armed = False
        try:
            for line in launcher.stdout:
                if not line.startswith("{"):
                    continue  # gloo talks too
                event = json.loads(line)
                if event["event"] == "started":
                    pids, armed = event["pids"], True
                elif event["event"] == "restored":
                    lost.append(reached - event["round"])
                elif event["event"] == "round":
                    reached = max(reached, event["round"])
                    if armed and len(sent) < faults:
                        armed = False
                        process = draw.randrange(len(pids))
                        kind = signal.SIGSTOP if draw.random() < 0.2 else signal.SIGKILL
                        sent.append({"process": process, "signal": kind.name, "after_round": event["round"]})
                        threading.Timer(draw.uniform(0.0, 0.25), _send, (pids[process], kind)).start()
                elif event["event"] == "done":
                    done = event
        finally:
            launcher.kill()
            launcher.wait()
            launcher.stdout.close()
            for pid in pids:
                _send(pid, signal.SIGKILL)
    return {"sent": sent, "rounds_lost": lost, "done": done, "seconds": round(time.time() - began, 1)}


def _send(pid, kind):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, kind)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--faults", type=int, nargs="+", default=[20, 4], help="for each number of processes")
    args = parser.parse_args()
    report = {}
    for processes, faults in zip(args.processes, args.faults, strict=True):
        rounds = max(ROUNDS, 4 * faults)
        calm = run(processes, rounds, 0, 0)
        wild = run(processes, rounds, faults, seed=processes)
        calm_loss, wild_loss = (r["done"]["loss"] if r["done"] else None for r in (calm, wild))
        report[f"{processes} processes"] = {
            "rounds": rounds,
            "undisturbed_loss": calm_loss,
            "disturbed_loss": wild_loss,
            "signals_sent": len(wild["sent"]),
            "of_them_to_the_coordinator": sum(s["process"] == 0 for s in wild["sent"]),
            "of_them_SIGSTOP": sum(s["signal"] == "SIGSTOP" for s in wild["sent"]),
            "restarts": len(wild["rounds_lost"]),
            "most_rounds_lost_at_once": max(wild["rounds_lost"], default=0),
            "rounds_lost": wild["rounds_lost"],
            "undisturbed_seconds": calm["seconds"],
            "disturbed_seconds": wild["seconds"],
        }
        print(json.dumps(report[f"{processes} processes"]), flush=True)
    processes, faults = SHRINKING
    shrunk = run(processes, ROUNDS, faults, seed=7, shrink=True)
    end = shrunk["done"] or {}
    report[f"shrinking from {processes} processes"] = {
        "rounds": ROUNDS,
        "signals": [s["signal"] for s in shrunk["sent"]],
        "rounds_lost": shrunk["rounds_lost"],
        "workers_at_the_end": end.get("workers"),
        "loss": end.get("loss"),
    }
    print(json.dumps(report), flush=True)
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "faults.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
