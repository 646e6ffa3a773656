"""vLLM's own OpenAI app over our engine; every endpoint and flag is vLLM's."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from dplaunch.seam import failures, older
from dplaunch.seam.frontend import preserved_environ


def import_server() -> None:
    """Imports what the app needs, while the ranks load: when they are ready, the app waits for nothing else."""
    with preserved_environ():
        import vllm.entrypoints.openai.chat_completion.serving  # noqa: F401
        from vllm.reasoning import ReasoningParserManager  # noqa: F401
        from vllm.tool_parsers import ToolParserManager  # noqa: F401

        older.moved("init_app_state")
        older.moved("build_app")


async def make_app(engine: Any, args: argparse.Namespace) -> Any:
    """The FastAPI app: chat, completions, embeddings where the model has them, /metrics, /health and the rest."""
    tasks = await engine.get_supported_tasks()
    app = older.moved("build_app")(args, tasks, engine.model_config)
    await older.moved("init_app_state")(engine, app.state, args, tasks)
    failures.tell_when_to_retry(app)
    return app


def load_plugins(args: argparse.Namespace) -> None:
    """Registers the user's own tool and reasoning parsers."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


@contextlib.contextmanager
def environment_read_once() -> Iterator[None]:
    """Has vLLM keep what its variables say, as its engine cores do: its metrics read one for each token of an answer.

    For a process that serves and does nothing else. In a user's, a variable may be set between two launches.
    """
    from vllm import envs

    with preserved_environ():
        # It asks for all of them, and one answers with a name that it draws and sets for all processes to come.
        envs.enable_envs_cache()
    try:
        yield
    finally:
        envs.disable_envs_cache()
