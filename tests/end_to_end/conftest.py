"""The container engine, for the image of the demo's bundle."""

from tests.containers.conftest import docker

__all__ = ["docker"]
