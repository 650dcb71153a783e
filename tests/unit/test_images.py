"""The images that ours stand on: each pinned in one place, and named wherever it is used."""

import re
from pathlib import Path

from toolchain.resources import versions
from toolchain.target import read_target, targets

DOCKER = Path(__file__).resolve().parents[2] / "docker"
USES = {
    "debian": {"Dockerfile", "runtime.Dockerfile"},
    "jetson_orin_build": {"jetson-orin.Dockerfile"},
    "jetson_orin": {"jetson-orin.toml"},
    "jetson_orin_jp7": {"jetson-orin-jp7.toml"},
}


def test_every_image_that_is_pinned_is_used_and_every_one_that_is_used_is_pinned() -> None:
    found: dict[str, set[str]] = {}
    for path in DOCKER.glob("*Dockerfile"):
        for image in re.findall(r"^ARG (?:BASE|DEBIAN)=(?!\$)(.+)$", path.read_text(), re.MULTILINE):
            found.setdefault(image, set()).add(path.name)
    for name, path in targets().items():
        image = read_target(name).image.reference
        if image is not None:
            found.setdefault(image, set()).add(path.name)
    assert found == {versions()["images"][key]: files for key, files in USES.items()}
    assert set(versions()["images"]) == set(USES)


def test_no_dockerfile_stands_on_anything_else() -> None:
    """Whatever a stage is made from is an argument, another stage or nothing."""
    for path in DOCKER.glob("*Dockerfile"):
        text = path.read_text()
        stages = set(re.findall(r"^FROM .* AS (\S+)$", text, re.MULTILINE))
        stages |= {"scratch", "${DEBIAN}", "${BASE}", "${SYSTEM}"}
        used = re.findall(r"^FROM (?:--platform=\S+ )?(\S+)", text, re.MULTILINE)
        assert used
        assert set(used) <= stages, path.name


def test_images_are_pinned_by_digest_but_for_the_one_that_says_why_not() -> None:
    by_tag = {key for key, image in versions()["images"].items() if not re.search(r"@sha256:[0-9a-f]{64}$", image)}
    assert by_tag == {"jetson_orin"}
    assert "jetson_orin has a tag alone" in (DOCKER / "versions.toml").read_text()
