"""Energy that the machine, or its processor, took over a `with` block: from counters, or from sensors that are sampled.

x86: RAPL's package counters (Linux powercap; readable by root). Jetson: the INA3221 on the input rail, volts × amperes
(hwmon). Elsewhere nothing tells, and nothing is guessed.
"""

import itertools
import threading
import time

from .facts import FactError
from .system import HERE, System

_RAPL = "/sys/class/powercap/intel-rapl:[0-9]*"
_SAMPLE_S = 0.2
_INPUT_RAILS = ("VDD_IN", "SYS5V", "VIN_SYS_5V0")
"""What Jetson boards call the sensor of all that comes in."""


class Meter:
    """`joules` is None, and `source` says why, where nothing tells."""

    joules: float | None
    source: str

    def __init__(self, system: System = HERE) -> None:
        self._system = system
        self._rail = _input_rail(system)

    def __enter__(self) -> "Meter":
        self._start_uj = _packages(self._system)
        self._ended = threading.Event()
        self._watts: list[tuple[float, float]] = []
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if self._rail is not None and not self._start_uj:
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.joules, self.source = None, "no sensor that can be read"
        if self._start_uj:
            end_uj = _packages(self._system)
            if end_uj.keys() == self._start_uj.keys():
                self.joules = sum(self._used_j(zone, end_uj[zone]) for zone in end_uj)
                self.source = "RAPL, processor packages"
        elif self._rail is not None:
            self._sampler.join()
            self.joules = integral(self._watts)
            self.source = f"{self._system.text(self._rail + '_label')}, sampled every {_SAMPLE_S:g} s"

    def _used_j(self, zone: str, now_uj: int) -> float:
        used = now_uj - self._start_uj[zone]
        if used < 0:  # the counter has begun anew
            used += self._system.number(f"{zone}/max_energy_range_uj") or 0
        return used / 1e6

    def _sample(self) -> None:
        assert self._rail is not None
        while True:
            ended = self._ended.wait(_SAMPLE_S)
            watts = _watts(self._system, self._rail)
            if watts is not None:
                self._watts.append((time.perf_counter(), watts))
            if ended:
                return


def integral(samples: list[tuple[float, float]]) -> float | None:
    """Joules of (second, watts) samples by the trapezoidal rule; None below two of them."""
    if len(samples) < 2:
        return None
    pairs = itertools.pairwise(samples)
    return sum((at - before) * (watts + last) / 2 for (before, last), (at, watts) in pairs)


def _packages(system: System) -> dict[str, int]:
    """Counter of each package, in microjoules; empty where there is none, or none that we may read."""
    found = {}
    for zone in system.glob(_RAPL):
        if ":" in zone.rpartition("intel-rapl:")[2]:
            continue  # a part of a package
        try:
            value = system.number(f"{zone}/energy_uj")
        except FactError:
            return {}
        if value is not None:
            found[zone] = value
    return found


def _input_rail(system: System) -> str | None:
    """/sys/…/in<n> of the sensor that all current comes through."""
    for label in system.glob("/sys/class/hwmon/hwmon*/in*_label"):
        if system.text(label) in _INPUT_RAILS:
            return label.removesuffix("_label")
    return None


def _watts(system: System, rail: str) -> float | None:
    folder, _, name = rail.rpartition("/in")
    try:
        millivolts, milliamperes = system.number(f"{rail}_input"), system.number(f"{folder}/curr{name}_input")
    except FactError:
        return None
    return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e6
