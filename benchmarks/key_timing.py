"""Whether the time in which a wrong API key is refused tells how much of it was right.

Kinds of wrong keys are asked for in random order, each many times, of a `KeyRing` with some keys; in the same rounds
they are compared in a leaky way (byte by byte, until one differs), which shows that the measurement would see a leak.
Prints for each kind the median and the spread in ns, and how far its median lies from that of keys which are wrong in
all bytes, with a bootstrapped 95 % interval: one that holds 0 shows no difference.
Not covered: the network, whose jitter only hides more; a key's length, which its owner chose and which is no secret.
"""

import argparse
import os
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable

from deployments.keys import ENVIRONMENT, KeyRing

KEY_CHARS = 40
BASELINE = "wrong in all bytes"


def make_kinds(key: bytes) -> dict[str, bytes]:
    """Wrong keys by what is wrong with them; the right one for comparison."""
    flipped = bytes(byte ^ 1 for byte in key)
    return {
        BASELINE: flipped,
        "wrong first byte": flipped[:1] + key[1:],
        "wrong middle byte": key[:20] + flipped[20:21] + key[21:],
        "wrong last byte": key[:-1] + flipped[-1:],
        "another of this length": secrets.token_hex(KEY_CHARS // 2).encode(),
        "last byte missing": key[:-1],
        "half of it": key[: KEY_CHARS // 2],
        "one byte": key[:1],
        "the right key": key,
    }


def find_leakily(key: bytes) -> Callable[[bytes], bool]:
    """Compares until a byte differs."""

    def find(token: bytes) -> bool:
        return len(key) == len(token) and all(a == b for a, b in zip(key, token, strict=True))

    return find


def measure(find: Callable[[bytes], object], kinds: dict[str, bytes], rounds: int) -> dict[str, list[int]]:
    """Nanoseconds of each call, the kinds in a new random order each round."""
    times: dict[str, list[int]] = {kind: [] for kind in kinds}
    order = list(kinds.items())
    for _ in range(rounds):
        random.shuffle(order)
        for kind, token in order:
            start = time.perf_counter_ns()
            find(token)
            times[kind].append(time.perf_counter_ns() - start)
    return times


def interval(times: list[int], baseline: list[int], resamples: int = 200) -> tuple[float, float]:
    """The 95 % interval of the difference between medians."""
    size = min(len(times), 4000)
    differences = sorted(
        statistics.median(random.choices(times, k=size)) - statistics.median(random.choices(baseline, k=size))
        for _ in range(resamples)
    )
    return differences[round(0.025 * resamples)], differences[round(0.975 * resamples) - 1]


def show(title: str, times: dict[str, list[int]]) -> None:
    print(title)
    for kind, values in times.items():
        deciles = statistics.quantiles(values, n=10)
        low, high = interval(values, times[BASELINE])
        median = statistics.median(values)
        print(
            f"  {kind:<24} median {median:7.0f} ns, 10 to 90 %: {deciles[0]:.0f} to {deciles[-1]:.0f}; "
            f"difference {median - statistics.median(times[BASELINE]):+6.0f} ns [{low:+.0f}, {high:+.0f}]"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--keys", type=int, default=20, help="keys on the ring; the one that is guessed at is the last")
    options = parser.parse_args()
    key = secrets.token_hex(KEY_CHARS // 2)
    others = [f"key-{number} {secrets.token_hex(KEY_CHARS // 2)}" for number in range(options.keys - 1)]
    os.environ.pop(ENVIRONMENT, None)
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
        file.write("\n".join([*others, key]))
        file.flush()
        kinds = make_kinds(key.encode())
        show(f"KeyRing.find, {options.keys} keys", measure(KeyRing(file.name).find, kinds, options.rounds))
    show("byte by byte, for comparison", measure(find_leakily(key.encode()), kinds, options.rounds))


if __name__ == "__main__":
    main()
