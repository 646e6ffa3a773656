"""A `benchmarks.child.Child` that answers with the length of what it is asked; to "end" it ends without a word."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from benchmarks import child


async def _main() -> None:
    asked = child.Questions()
    left = os.fork() if child.question()["forks"] else 0
    if left == 0 and child.question()["forks"]:
        time.sleep(600)  # Ended from outside: it has the pipe too.
    asked.answer({"left": left})
    async for word in asked:
        if word == "end":
            os._exit(3)
        asked.answer({"letters": len(word)})
    if left:
        os.kill(left, 9)
        os.waitpid(left, 0)
        sys.exit()


if __name__ == "__main__":
    asyncio.run(_main())
