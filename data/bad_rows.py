"""Malformed rows: collected over all files of a source, then raised as one error or reported as dropped."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

logger = logging.getLogger("shardrec")

_SHOWN = 5  # rows that are shown in full


class BadRows(ValueError):
    """Malformed rows: wrong number of fields, empty id, rating or timestamp that is no finite number."""


@dataclass
class BadRowLog:
    """Collects the malformed rows of all files of one source; `close` raises or reports them."""

    on_bad_rows: Literal["error", "skip"]
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, path: Path, line_number: int, line: str, reason: str) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(f"  {path}:{line_number}: {reason}: {line[:200]!r}")

    def close(self) -> None:
        """Raises BadRows when there were any, unless they are to be skipped: then their number is logged."""
        if not self.count:
            return
        listing = "\n".join(self.shown + (["  ..."] if self.count > len(self.shown) else []))
        if self.on_bad_rows == "skip":
            logger.warning("Malformed rows skipped: %d\n%s", self.count, listing)
            return
        raise BadRows(f"Malformed rows: {self.count} (--data.on_bad_rows skip drops them)\n{listing}")
