"""TargetProfile: one device, as data. Adding a device adds a file to targets/, not an `if`."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from toolchain.errors import HostError, RecipeError
from toolchain.recipe import Bench, Name
from toolchain.resources import resource, versions
from toolchain.settings import Settings, read_toml

CmakeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
ModeName = Annotated[str, StringConstraints(min_length=1)]


class Isa(Settings):
    """What compiled code may not use and what it must, as objdump's disassembly shows it."""

    forbidden: dict[str, Pattern] = Field(default_factory=dict)
    """A name for people → a regular expression that no line of any program or library may match."""
    required: dict[str, Pattern] = Field(default_factory=dict)
    """The same, which some line must match of every file that computes on the CPU: the fast kernels are there."""
    dispatched: tuple[str, ...] = ()
    """Functions of a static C library, with wildcards, that it uses only where the processor has what they need."""
    chosen_at_run_time: tuple[str, ...] = ()
    """File names, with wildcards, that are loaded only where the processor can run them: not looked at."""
    asks_first: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """A file name, with wildcards → names of what is forbidden elsewhere: its code asks the processor before."""

    @model_validator(mode="after")
    def _known_rules(self) -> "Isa":
        unknown = {name for names in self.asks_first.values() for name in names} - self.forbidden.keys()
        if unknown:
            raise ValueError(f"asks_first names {', '.join(sorted(unknown))}, which is not among what is forbidden")
        return self


class Runtime(Settings):
    """How llama.cpp is built for the device."""

    cmake: dict[CmakeName, str | bool]
    """CMake options beside the ones that every build shares."""
    backend: Literal["CPU", "CUDA"]
    """The compute backend that llama-server must report, as in its log."""
    glibc_floor: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
    """Newest glibc the binaries may ask for."""
    page_bytes: Literal[4096, 16384, 65536] = 4096
    """Largest pages that the device's kernel may have; programs must be aligned to them."""
    isa: Isa = Isa()
    device_libraries: tuple[str, ...] = ()
    """Libraries beside glibc that the device has of its own, such as CUDA's: they do not go into a bundle."""
    gpu_code: tuple[Annotated[str, StringConstraints(pattern=r"^sm_\d+[af]?$")], ...] = ()
    """Machine code that a GPU library must hold; llama.cpp would otherwise fail at its first answer."""


class Server(Settings):
    """How llama-server is started."""

    threads: int | None = Field(None, ge=1)
    """Left out: the device's physical cores that this process may use."""
    gpu_layers: Literal["all"] | Annotated[int, Field(ge=1)] | None = None
    """Layers that go to the GPU; left out where there is none."""
    parallel: int = Field(1, ge=1)
    """Requests served at once; the context is divided among them."""
    cache_ram_mib: int = Field(0, ge=0)
    """Prompt cache in memory; llama-server's own default, 8192, is too much for a small device."""
    ready_timeout_s: float = Field(120.0, gt=0)


class Budgets(Settings):
    """What a bundle must reach on the device: `edgectl gate` holds a benchmark record to it. Left out: not asked for.

    Shares of what the device could do hold for any model; tokens/s for the models that the profile is for.
    """

    decode_tps: float | None = Field(None, gt=0)
    """At least; the median."""
    prefill_tps: float | None = Field(None, gt=0)
    """At least; the median."""
    roofline_pct: float | None = Field(None, gt=0, le=100)
    """At least; decode as a share of what the memory's measured bandwidth allows."""
    ttft_s: float | None = Field(None, gt=0)
    """At most; the 95th percentile."""
    cold_start_s: float | None = Field(None, gt=0)
    """At most; spawn to first token with the page cache evicted, the 95th percentile."""
    memory_x_model: float | None = Field(None, gt=0)
    """At most; peak resident memory ÷ bytes of the model."""
    sustained_ratio: float | None = Field(None, gt=0, le=1.5)
    """At least; last ÷ first minute of a sustained run."""
    power_mode: ModeName | Annotated[tuple[ModeName, ...], Field(min_length=1)] | None = None
    """The mode that the others are meant for, or several, as `nvpmodel -q` has them; in another nothing is judged."""


class Image(Settings):
    """What a bundle's image stands on."""

    base: str | None = None
    """One with the device's own libraries: a name of [images] in docker/versions.toml, or a reference. Left out: what
    `toolchain base` makes of Debian's packages."""

    @model_validator(mode="after")
    def _known_name(self) -> "Image":
        known = versions()["images"]
        if self.base is not None and self.base not in known and not set(self.base) & set("/:@"):
            raise ValueError(f"base names '{self.base}': known are {', '.join(sorted(known))}, or give a reference")
        return self

    @property
    def reference(self) -> str | None:
        """As `docker pull` takes it."""
        return None if self.base is None else str(versions()["images"].get(self.base, self.base))


class TargetProfile(Settings):
    """One device or family of devices."""

    name: Name
    description: str
    arch: Literal["x86_64", "aarch64"]
    memory_mib: int | None = Field(None, ge=64)
    """Of the smallest board that is meant; left out: any. Model, cache and server must fit into it."""
    disk_mib: int | None = Field(None, ge=64)
    """Free on the smallest board that is meant, before a release is installed; left out: any."""
    runtime: Runtime
    image: Image = Image()
    server: Server = Server()
    bench: Bench = Bench()
    """How `edgectl bench` measures where it is not told otherwise."""
    budgets: Budgets = Budgets()

    def check_build_host(self, machine: str) -> None:
        """`machine`, as uname has it, can build for the device: by a cross compiler, or being of its kind.

        Raises HostError.
        """
        if self.arch != machine and "CMAKE_SYSTEM_NAME" not in self.runtime.cmake:
            raise HostError(
                f"{self.name} is built on {self.arch}, this host is {machine}",
                hint="build on the device or in a container for it (docs/targets.md), or give the profile a cross "
                "compiler: runtime.cmake with CMAKE_SYSTEM_NAME, CMAKE_C_COMPILER and CMAKE_CXX_COMPILER",
            )


def targets() -> dict[str, Path]:
    """The profiles that ship with the toolchain, by name."""
    return {path.stem: path for path in sorted(resource("targets").glob("*.toml"))}


def read_target(name: str) -> TargetProfile:
    """Read the profile called `name`, or the one in the file `name` if that ends in ".toml".

    Raises RecipeError, naming the profiles there are.
    """
    if name.endswith(".toml"):
        path = Path(name)
    else:
        known = targets()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            hint += f"targets: {', '.join(known)}; your own: the path of a file such as those in targets/"
            raise RecipeError(f"no target '{name}'", hint=hint)
        path = known[name]
    profile = read_toml(path, TargetProfile, keys="`toolchain schema --of target` lists every key of a profile")
    if profile.name != path.stem:
        raise RecipeError(f"{path}: name is '{profile.name}', the file says '{path.stem}'")
    return profile
