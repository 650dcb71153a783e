"""Failures that the person at the device can mend; only `cli` prints them."""


class DeviceError(Exception):
    """A message that names the thing and the cause, and a hint that names the next step."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DeviceError):
    """An option that cannot be used as it was given."""

    exit_code = 2


class RolledBackError(DeviceError):
    """A release was not good; the device serves the one before, or nothing where there was none."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str, record: dict[str, object]) -> None:
        super().__init__(message, hint=hint)
        self.record = record
        """As of a release that was good, with what was wrong."""


class BusyError(DeviceError):
    """Another process is at it, or has the port."""

    exit_code = 4
