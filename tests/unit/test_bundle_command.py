"""Command lines of a bundle are pure functions of the target."""

import itertools
import re

from toolchain.bundle import command
from toolchain.target import Server, TargetProfile, read_target


def with_server(**values: object) -> TargetProfile:
    return read_target("x86-cpu").model_copy(update={"server": Server.model_validate(values)})


def test_the_server_gets_the_targets_values() -> None:
    target = with_server(parallel=2, cache_ram_mib=64)
    argv = command.server_argv(target, model="model/a.gguf", alias="a", context=4096)
    options = dict(itertools.pairwise(argv))
    assert options["--ctx-size"] == "4096"
    assert options["--parallel"] == "2"
    assert options["--cache-ram"] == "64"
    assert options["--alias"] == "a"
    assert options["--model"] == "{bundle}/model/a.gguf"


def test_only_a_gpu_is_warmed_up() -> None:
    def argv(target: str) -> list[str]:
        return command.server_argv(read_target(target), model="m", alias="a", context=512)

    assert "--no-warmup" in argv("rpi5")
    assert "--no-warmup" not in argv("jetson-orin")


def test_only_known_placeholders_are_left_for_the_device() -> None:
    presets = command.presets(read_target("x86-cpu"), model="model/a.gguf", alias="a", context=512)
    server = [*presets["server"]["argv"], *presets["server"]["api_key_argv"]]
    assert set(re.findall(r"\{(\w+)\}", " ".join(server))) == {"bundle", "host", "port", "threads", "api_key_file"}
    bench = " ".join(presets["bench"]["argv"])
    assert set(re.findall(r"\{(\w+)\}", bench)) == {
        "bundle",
        "threads",
        "prompt_tokens",
        "generated_tokens",
        "repetitions",
        "depth",
    }


def test_threads_are_the_targets_or_left_to_the_device() -> None:
    def threads(target: TargetProfile) -> object:
        return command.presets(target, model="m", alias="a", context=512)["server"]["threads"]

    assert threads(with_server(threads=3)) == 3
    assert threads(with_server()) is None
