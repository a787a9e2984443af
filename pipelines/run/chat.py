"""Serving the result of a run, and talking to it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console

from components.core.base.errors import InputError, MissingPackage, TesseraError
from components.core.base.processes import sigterm_as_interrupt
from components.core.serving.server import Server
from components.core.serving.serving_config import ServingConfig
from components.core.store.store import Store, open_store
from pipelines.recipe.llama_nemotron import MODELS
from pipelines.recipe.schema import Trust
from pipelines.records.runs import artifacts, find_run, run_record
from pipelines.run.terminal_view import PLAIN_INTERVAL_S

if TYPE_CHECKING:
    import openai

LAST_FIRST = ("bundle", *reversed(MODELS))
"""Roles of models, from the end of the pipeline to its beginning."""


def served_model(store: Store, run: str, keys: Sequence[Path] = ()) -> Path:
    """Folder of the last model that a run made.

    Args:
        store: where the run is.
        run: its name.
        keys: public keys of which one has to have signed the model; those of the recipe where none are given.

    Raises:
        InputError: there is no model yet, or it is not signed as it should be.
    """
    made = artifacts(store, run)
    for role in LAST_FIRST:
        if role in made:
            require_signature(store, made[role], run_record(store, run), keys)
            return store.fetch(made[role])
    raise InputError(f"run {run!r} has made no model yet", hint="tessera run RECIPE goes on with it")


def require_signature(store: Store, digest: str, record: Mapping[str, Any], keys: Sequence[Path]) -> None:
    """Refuse to serve a model that is not signed, where its recipe or the user requires a signature.

    Args:
        store: where the model is.
        digest: of the model.
        record: of its run.
        keys: trusted keys of the user, in place of those of the recipe.

    Raises:
        UntrustedArtifact: names the artifact, and how it is signed.
    """
    from components.core.store.signatures import demand_signature

    written = record["recipe"].get("trust")
    trust = Trust.parse(written, where="trust") if written else None
    if keys:
        demand_signature(store, digest, keys, "model")
    elif trust is not None and "deploy" in trust.require:
        demand_signature(store, digest, trust.keys, "model")


def serve_run(name: str, port: int | None, store_uri: str, console: Console, keys: Sequence[Path] = ()) -> None:
    """Serve the last model of a run until Ctrl-C or SIGTERM, at `port` instead of the recipe's where one is given."""
    store = open_store(store_uri)
    run = find_run(store, name)
    serving = serving_of(store, run)
    start = StartView(run, console)
    serving = serving if port is None else serving.model_copy(update={"port": port})
    server = _server(store, run, serving, keys, start)
    with sigterm_as_interrupt():
        try:
            with start:
                server.start()
            console.print(f"{server.url}  model {run}; Ctrl-C ends it", highlight=False, markup=False, soft_wrap=True)
            server.wait()
        except KeyboardInterrupt:
            console.print("stopped")
        finally:
            server.stop()


def chat_with_run(
    name: str, thinking: Literal["on", "off"], store_uri: str, console: Console, keys: Sequence[Path] = ()
) -> None:
    """Talk to the last model of a run on the terminal."""
    try:
        import openai
    except ImportError:
        raise MissingPackage("chat needs the package openai", hint="install tessera[serve]") from None
    store = open_store(store_uri)
    run = find_run(store, name)
    start = StartView(run, console)
    server = _server(store, run, serving_of(store, run).on_loopback(), keys, start)
    try:
        with start:
            server.start()
        console.print(f"{run}, detailed thinking {thinking}; an empty line ends", style="dim", highlight=False)
        client = openai.OpenAI(base_url=server.url, api_key="none")
        converse(client, run, thinking, console)
    except (KeyboardInterrupt, EOFError):
        console.print()
    except openai.OpenAIError as error:
        raise TesseraError(f"the server refused to answer: {error}", hint=f"log: {server.log}") from None
    finally:
        server.stop()


def converse(client: "openai.OpenAI", model: str, thinking: str, console: Console) -> None:
    """Ask and answer until an empty line."""
    messages: list[dict[str, str]] = [{"role": "system", "content": f"detailed thinking {thinking}"}]
    while question := console.input("[bold]> ").strip():
        messages.append({"role": "user", "content": question})
        answer, before = "", "content"
        for kind, text in stream_answer(client, model, messages):
            if kind != before:
                console.print()
            style = "dim" if kind == "reasoning" else None
            console.print(_harmless(text), end="", style=style, markup=False, highlight=False)
            answer += text if kind == "content" else ""
            before = kind
        console.print()
        messages.append({"role": "assistant", "content": answer})


def stream_answer(
    client: "openai.OpenAI", model: str, messages: list[dict[str, str]]
) -> Iterator[tuple[Literal["reasoning", "content"], str]]:
    """Pieces of an answer as they arrive, the reasoning apart from what is said."""
    options: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
    for chunk in client.chat.completions.create(**options):
        delta = chunk.choices[0].delta if chunk.choices else None
        # A field of vLLM's that the client's types do not know.
        if reasoning := getattr(delta, "reasoning", None):
            yield "reasoning", reasoning
        if delta is not None and delta.content:
            yield "content", delta.content


def _harmless(text: str) -> str:
    """A text without characters that would steer the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def serving_of(store: Store, run: str) -> ServingConfig:
    """How the recipe of a run has its models served."""
    return ServingConfig.parse(run_record(store, run)["recipe"].get("serving") or {}, where="serving")


class StartView:
    """Shows during a block how long a server has been starting: in one line on a terminal, in lines elsewhere."""

    def __init__(self, run: str, console: Console) -> None:
        self._text, self._console, self._next_s = f"starting a server for {run}", console, PLAIN_INTERVAL_S
        self._status = console.status(self._text)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        else:
            self._print(self._text)
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def update(self, seconds: float) -> None:
        """Show that so much time has passed."""
        text = f"{self._text}, {seconds:.0f} s so far"
        if self._console.is_terminal:
            self._status.update(text)
        elif seconds >= self._next_s:
            self._next_s = seconds + PLAIN_INTERVAL_S
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _server(store: Store, run: str, serving: ServingConfig, keys: Sequence[Path], start: StartView) -> Server:
    """A server of the last model of a run, named after the run, whose start is shown."""
    log = store.local / "runs" / run / "server.log"
    return Server(served_model(store, run, keys), name=run, log=log, serving=serving, on_wait=start.update)
