"""A `benchmarks.child.Child` that answers with the length of what it is asked; to "end" it ends without a word."""

from __future__ import annotations

import asyncio
import os
import signal

from benchmarks import child


async def _main() -> None:
    asked = child.Questions()
    left = _forked() if child.question()["forks"] else 0
    asked.answer({"left": left})
    async for word in asked:
        if word == "end":
            os._exit(3)
        asked.answer({"letters": len(word)})
    if left:
        os.kill(left, signal.SIGKILL)
        os.waitpid(left, 0)


def _forked() -> int:
    """A process that has the pipe too, and is ended from outside."""
    pid = os.fork()
    while pid == 0:
        signal.pause()
    return pid


if __name__ == "__main__":
    asyncio.run(_main())
