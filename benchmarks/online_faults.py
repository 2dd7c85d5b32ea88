"""A rolling update, and SIGKILL of an engine, under load: with clients that try again, and with some that do not.

    python -m benchmarks.online_faults

Two replicas on this machine. Prints what became of each request; exits with 1 if a retrying client was left without
an answer, or if one that does not try again lost a request to the update.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import Asked, Load, outcomes
from benchmarks.online_overhead import question_body
from jobs.serve import deploy, local_serve
from tests.serving import KEY, free_port, small_settings

HOST = "127.0.0.1"


def settings(folder: Path, max_tokens: int) -> dict[str, Any]:
    """Two replicas. Another `max_tokens` makes another version, which Serve rolls out replica by replica."""
    keys = folder / "keys.txt"
    keys.write_text(f"{KEY}\n")
    made = small_settings(auth={"keys_file": str(keys)}, access_log=str(folder / "access.log"))
    made["scaling"] = {"min_replicas": 2, "max_replicas": 2, "graceful_shutdown_timeout_s": 60}
    made["limits"] = {"max_tokens": max_tokens}
    return made


def num_running() -> int:
    """Replicas that answer now."""
    from ray import serve

    states = serve.status().applications["r4b"].deployments["R4B"].replica_states
    return next((count for state, count in states.items() if str(state) == "RUNNING"), 0)


def kill_one_engine() -> None:
    """SIGKILL an engine's core process; returns when there are two replicas again."""
    engines = find_engines()
    if len(engines) != 2:
        raise RuntimeError(f"There are {len(engines)} engines, not two: {engines}")
    time.sleep(3)
    engines[0].kill()
    print(f"killed the engine of one of {num_running()} replicas", flush=True)
    started, told = time.monotonic(), ""
    while (seconds := time.monotonic() - started) < 240:
        time.sleep(1)
        alive = find_engines()
        if (state := f"{num_running()} replicas run, {len(alive)} engines live") != told:
            print(f"{seconds:6.0f} s  {state}", flush=True)
            told = state
        if num_running() == 2 and len(alive) == 2 and engines[0] not in alive:
            break
    else:
        raise RuntimeError("The replica was not replaced.")
    time.sleep(3)


def find_engines() -> list[psutil.Process]:
    """The engines' core processes, below this one."""
    return [process for process in psutil.Process().children(recursive=True) if "EngineCore" in process.name()]


async def ask_during(url: str, task: Callable[[], None], clients: int) -> tuple[list[Asked], list[Asked]]:
    """Half of the clients try again, half do not; gives the requests of both."""
    patient, impatient = Load(url, KEY, question_body(), retries=True), Load(url, KEY, question_body())
    _, _ = await asyncio.gather(
        patient.run_while(clients // 2, lambda: _until(impatient), pause_s=0.2),
        impatient.run_while(clients // 2, task, pause_s=0.2),
    )
    return patient.asked, impatient.asked


def _until(load: Load) -> None:
    while not load.stopping.is_set():
        time.sleep(0.2)


def tell(title: str, patient: list[Asked], impatient: list[Asked]) -> None:
    """What became of the requests."""
    again = sum(one.tries > 1 for one in patient)
    print(f"{title}: with retries {outcomes(patient)}, {again} of them asked again; without {outcomes(impatient)}")
    for one in impatient:
        if one.outcome != "answered":
            print(f"    {one.outcome}, after {one.ended - one.started:.1f} s: {one.detail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=6)
    options = parser.parse_args()
    port = free_port()
    url = f"http://{HOST}:{port}"
    with tempfile.TemporaryDirectory() as name, local_serve(HOST, port):
        folder = Path(name)
        deploy(settings(folder, 512), HOST, port)
        update = asyncio.run(ask_during(url, lambda: deploy(settings(folder, 511), HOST, port), options.clients))
        tell("rolling update", *update)
        kill = asyncio.run(ask_during(url, kill_one_engine, options.clients))
        tell("engine killed", *kill)
    answered = all(set(outcomes(patient)) == {"answered"} for patient, _ in (update, kill))
    raise SystemExit(0 if answered and set(outcomes(update[1])) == {"answered"} else 1)


if __name__ == "__main__":
    main()
