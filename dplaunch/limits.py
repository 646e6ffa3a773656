"""What the kernel lets the command's own process have."""

from __future__ import annotations

import contextlib
import resource


def allow_open_files() -> None:
    """Raises the soft limit of open files to the hard one, as vLLM's own server does.

    A rank costs the launcher eleven descriptors, a client one; 1024, where many systems begin, ends at ninety ranks.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some containers forbid it: what there is may do.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
