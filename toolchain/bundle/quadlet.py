"""A bundle's image as a service of Podman: the text of NAME.container, podman-systemd.unit(5)."""

import json
from pathlib import Path

from toolchain.bundle import image, seal
from toolchain.device import service
from toolchain.errors import RecipeError


def text(folder: Path, *, reference: str) -> str:
    """The unit for the image `reference` of the bundle in `folder`; its keys are those of Podman 4.5 and later.

    Raises ArtifactError when the bundle is not as built, RecipeError for a reference that is none.
    """
    if not reference or reference[0] == "-" or any(letter.isspace() or letter in "\"'\\%$" for letter in reference):
        raise RecipeError(
            f"--image {reference!r} is no image",
            hint="as `podman load` says it, for example docker.io/library/my-model-x86-cpu:1.0",
        )
    bundle = seal.open_whole(folder, read=True)
    manifest = bundle.manifest
    repository, _ = image.reference(bundle)
    secret = f"{repository}-key"
    user, group = image.USER.split(":")
    with seal.as_ours():
        start_s = float(bundle.presets()["server"]["ready_timeout_s"])
    lines = [
        f"# {repository}.container: into /etc/containers/systemd/, or ~/.config/containers/systemd/ for a user. Once:",
        f"#   podman secret create {secret} FILE-WITH-THE-KEY",
        f"#   systemctl daemon-reload && systemctl start {repository}",
        "[Unit]",
        f"Description={manifest['name']}, a language model on 127.0.0.1:{image.PORT}",
        "",
        "[Container]",
        f"Image={reference}",
        f"PublishPort=127.0.0.1:{image.PORT}:{image.PORT}",
        f"Secret={secret},type=mount,target={image.KEY_FILE},uid={user},gid={group},mode=0400",
        "ReadOnly=true",
        "Tmpfs=/tmp",
        "DropCapability=all",
        "NoNewPrivileges=true",
        # The Container Device Interface's name; `nvidia-ctk cdi generate` makes it known.
        *(["AddDevice=nvidia.com/gpu=all"] if manifest["runtime"]["backend"] == "CUDA" else []),
        # Podman reads no health check from an image in OCI's format. Its array is not to begin with "CMD".
        f"HealthCmd={json.dumps(image.HEALTH)}",
        f"HealthStartPeriod={start_s:.0f}s",
        "HealthInterval=30s",
        "HealthTimeout=5s",
        "HealthRetries=3",
        "HealthOnFailure=kill",
        # edgectl gives the server ten seconds.
        "PodmanArgs=--stop-timeout=15",
        "",
        "[Service]",
        "Restart=always",
        # An image that has to be fetched counts as starting.
        "TimeoutStartSec=900",
        f"MemoryMax={service.memory_limit_bytes(manifest)}",
        "MemorySwapMax=0",
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"
