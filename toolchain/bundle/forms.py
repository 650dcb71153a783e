"""Folder of a bundle → the other forms that a recipe asks for, one file each: an archive, an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.bundle import archive, image
from toolchain.bundle.base_image import open_base
from toolchain.reporter import Reporter
from toolchain.target import TargetProfile


def check_base(base: Path, target: TargetProfile) -> None:
    """Images for `target` can stand on `base`. Raises HostError."""
    with open_base(base, image.platform(target.arch)) as found:
        found.check_contents(target.name, target.arch, target.runtime.device_libraries)


def run(forms: Sequence[str], *, bundle: Path, base: Path | None, out: Path, report: Reporter) -> dict[str, Any]:
    """Write the `forms` of the bundle's folder to out/, and return their facts.

    Raises ArtifactError when the bundle is not as built, HostError for the disk or a `base` that will not do.
    """
    made: dict[str, dict[str, Any]] = {}
    for form in forms:
        file = out / f"{bundle.name}{_ENDING[form]}"
        if form == "archive":
            facts = archive.pack(bundle, file, report=report)
        else:
            assert base is not None
            facts = image.pack(bundle, file, base=base, report=report)
        made[form] = {"file": file.name, **facts}
    summary = ", ".join(f"{form} {facts['bytes'] / 1e6:.1f} MB" for form, facts in made.items())
    return {"summary": summary, **made}


_ENDING = {"archive": ".tar", "image": ".image.tar"}
