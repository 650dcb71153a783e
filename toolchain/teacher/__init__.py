"""What the teacher says: answers, and the logits behind them."""

import toolchain.offline  # noqa: F401 - before any Hugging Face import of this package
