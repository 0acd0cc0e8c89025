"""What `build-engines doctor` says: for every check what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from build_engines.errors import MachineError, OnecardError

if TYPE_CHECKING:
    from rich.console import RenderableType

State = Literal["ok", "warning", "problem", "skipped"]
_STYLES: Final[dict[State, str]] = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`found` and `do` are a line each; `error`: what the commands raise that meet this problem."""

    check: str
    state: State
    found: str
    do: str = ""
    error: type[OnecardError] = MachineError

    def as_dict(self) -> dict[str, Any]:
        code = self.error.exit_code if self.state == "problem" else 0
        said = {"check": self.check, "state": self.state, "found": self.found, "do": self.do}
        return {**said, "exit_code": code}


def refused(check: str, error: OnecardError) -> Finding:
    """The problem that an error tells of, in a line."""
    found = f"{error.message} ({error.cause})" if error.cause else error.message
    return Finding(check, "problem", _line(found), _line(error.next_step or ""), type(error))


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many findings there are of each state."""
    return {state: sum(finding.state == state for finding in findings) for state in _STYLES}


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"checks": [finding.as_dict() for finding in findings], **counts(findings)}


def render(findings: Sequence[Finding]) -> RenderableType:
    """The table for people; what to do stands below what was found."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        # As Text: in a plain string Rich would take brackets for a colour.
        said = Text(finding.found)
        if finding.do:
            said.append(f"\n-> {finding.do}", style="cyan")
        table.add_row(Text(finding.state, style=_STYLES[finding.state]), Text(finding.check), said)
    return table


def require_no_problem(findings: Sequence[Finding]) -> None:
    """Raise the first problem's error, so that the exit code says what kind it is."""
    problems = [finding for finding in findings if finding.state == "problem"]
    if problems:
        first = problems[0]
        raise first.error(
            f"{len(problems)} of {len(findings)} checks found a problem, first {first.check}: {first.found}",
            next_step=first.do or None,
        )


def _line(text: str) -> str:
    return " ".join(text.split())
