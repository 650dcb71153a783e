"""Failures that a user can mend: what is wrong, and the next step. Only `cli` prints them.

Anything else that is raised is a bug of ours and keeps its traceback.
"""


class ToolchainError(Exception):
    """A failure with a message that names the thing and the cause, and a hint that names the next step."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(ToolchainError):
    """A recipe or target profile that cannot be used."""

    exit_code = 2


class DataError(ToolchainError):
    """A data set that does not fit: the row is named by number."""


class ModelError(ToolchainError):
    """A checkpoint, adapter, tokenizer or GGUF that cannot be used."""


class ArtifactError(ToolchainError):
    """A stage's output that is missing, damaged, or was made from other inputs."""


class ExternalToolError(ToolchainError):
    """A program outside Python that failed or is missing."""

    def __init__(self, message: str, *, hint: str | None = None, returned: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.returned = returned
        """Its exit code, or minus the signal that ended it; None when it was not started."""


class HostError(ToolchainError):
    """The machine lacks something: disk, memory, a package, a compiler, a free port."""


class EndpointError(ToolchainError):
    """A server that answers for the teacher, and does not: a refused key, an unknown model, no usable answer."""


class GateError(ToolchainError):
    """The work is done and kept, and a quality gate says it is not good enough."""

    exit_code = 3
