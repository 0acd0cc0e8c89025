"""Every error a user can meet, in one tree; each class has its own exit code.

OnecardError (1)
├── StackError (10)        the stack file is wrong
├── PlanError (11)         the stack does not fit the card
├── FetchError (12)        a checkpoint cannot be fetched or is refused
├── DataError (13)         calibration or evaluation data is missing or malformed
├── ExportError (14)       the checkpoint cannot be turned into a graph
├── QuantizeError (15)     calibration or quantization failed
├── GateError (16)         an accuracy gate failed and nothing is left that can help
├── CompileError (17)      a target refused the graph, or the target is not available here
├── ArtifactError (18)     a file on disk is missing, truncated, altered or for another card or version
├── RepositoryError (19)   the Triton repository cannot be written
├── ServerError (20)       tritonserver cannot be started, or a model failed to load
├── BusyError (21)         another run is writing to the same place
└── MachineError (22)      this machine lacks what every command needs (build-engines doctor)

Exit code 2 is Click's own (wrong usage), 130 an interrupt.
"""

from __future__ import annotations

from typing import ClassVar


class OnecardError(Exception):
    """What happened, the likely cause and the next command; `str()` renders all that is known."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, cause: str | None = None, next_step: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.next_step = next_step

    def __str__(self) -> str:
        parts = [self.message]
        if self.cause:
            parts.append(f"  cause: {self.cause}")
        if self.next_step:
            parts.append(f"  next:  {self.next_step}")
        return "\n".join(parts)


class StackError(OnecardError):
    exit_code = 10


class PlanError(OnecardError):
    exit_code = 11


class FetchError(OnecardError):
    exit_code = 12


class DataError(OnecardError):
    exit_code = 13


class ExportError(OnecardError):
    exit_code = 14


class QuantizeError(OnecardError):
    exit_code = 15


class GateError(OnecardError):
    exit_code = 16


class CompileError(OnecardError):
    exit_code = 17


class ArtifactError(OnecardError):
    exit_code = 18


class RepositoryError(OnecardError):
    exit_code = 19


class ServerError(OnecardError):
    exit_code = 20


class BusyError(OnecardError):
    exit_code = 21


class MachineError(OnecardError):
    exit_code = 22
