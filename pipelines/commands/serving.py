"""Commands that run a model: serve and chat."""

from typing import Annotated, Literal

import typer

from pipelines.commands.options import DEFAULT_STORE, RunName, StoreUri, TrustedKeys, console


def serve(
    run: RunName = "latest",
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 8000,
    store: StoreUri = DEFAULT_STORE,
    trust: TrustedKeys = [],  # noqa: B006
) -> None:
    """Serve the model of a run over the OpenAI API until Ctrl-C; its name is the name of the run."""
    from pipelines.run.chat import serve_run

    serve_run(run, port, store, console(), trust)


def chat(
    run: RunName = "latest",
    thinking: Annotated[Literal["on", "off"], typer.Option(help="Whether the model thinks before it answers.")] = "on",
    store: StoreUri = DEFAULT_STORE,
    trust: TrustedKeys = [],  # noqa: B006
) -> None:
    """Chat with the model of a run; an empty line or Ctrl-D ends."""
    from pipelines.run.chat import chat_with_run

    chat_with_run(run, thinking, store, console(), trust)
