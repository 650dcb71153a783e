"""TargetProfile: one device, as data. Adding a device adds a file to targets/, not an `if`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from toolchain.errors import RecipeError
from toolchain.recipe import Name
from toolchain.resources import resource
from toolchain.settings import Settings, read_toml

CmakeName = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")]


class Runtime(Settings):
    """How llama.cpp is built for the device."""

    cmake: dict[CmakeName, str | bool]
    """CMake options beside the ones that every build shares."""
    backend: str
    """The compute backend that llama-server must report, as in its log: "CPU", "CUDA"."""
    glibc_floor: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
    """Newest glibc the binaries may ask for."""


class Server(Settings):
    """How llama-server is started."""

    threads: int | None = Field(None, ge=1)
    """Left out: the device's physical cores that this process may use."""
    parallel: int = Field(1, ge=1)
    """Requests served at once; the context is divided among them."""
    cache_ram_mib: int = Field(0, ge=0)
    """Prompt cache in memory; llama-server's own default, 8192, is too much for a small device."""
    ready_timeout_s: float = Field(120.0, gt=0)


class TargetProfile(Settings):
    """One device or family of devices."""

    name: Name
    description: str
    arch: Literal["x86_64", "aarch64"]
    runtime: Runtime
    server: Server = Server()


def targets() -> dict[str, Path]:
    """The profiles that ship with the toolchain, by name."""
    return {path.stem: path for path in sorted(resource("targets").glob("*.toml"))}


def read_target(name: str) -> TargetProfile:
    """Read the profile called `name`. Raises RecipeError, naming those there are."""
    known = targets()
    if name not in known:
        raise RecipeError(f"no target '{name}'", hint=f"targets: {', '.join(known)}; each is a file in targets/")
    profile = read_toml(known[name], TargetProfile)
    if profile.name != name:
        raise RecipeError(f"{known[name]}: name is '{profile.name}', the file says '{name}'")
    return profile
