"""The model that learns: base, adapter, merged."""

import toolchain.offline  # noqa: F401 - before any Hugging Face import of this package
