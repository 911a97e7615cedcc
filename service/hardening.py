"""How well the system holds this process: what somebody who took it over could do."""

import os
import re
from pathlib import Path
from typing import Final

STATUS: Final = Path("/proc/self/status")


def weaknesses() -> list[str]:
    """A sentence for everything that a hardened container or unit would not have. Linux alone can tell."""
    try:
        status = STATUS.read_text()
    except OSError:
        return ["there is no /proc/self/status that would say what this process may do"]
    return found(status, root_is_read_only=bool(os.statvfs("/").f_flag & os.ST_RDONLY))


def found(status: str, *, root_is_read_only: bool) -> list[str]:
    """The same of the text of a /proc/self/status. What it does not say counts as bad."""
    facts = dict(re.findall(r"^(\w+):\s*(.*)$", status, re.MULTILINE))
    users = facts.get("Uid", "0").split()
    held = any(int(facts.get(name, "1"), 16) for name in ("CapEff", "CapPrm"))
    return [
        sentence
        for is_weak, sentence in (
            ("0" in users, "it runs as root: give it a user of its own"),
            (held, "it has capabilities: drop all of them"),
            (facts.get("NoNewPrivs") != "1", "it could gain privileges: set no-new-privileges"),
            (not root_is_read_only, "its root file system can be written to: mount it read-only"),
        )
        if is_weak
    ]
