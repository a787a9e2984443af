"""Which models take turns in one server, and the servers that they are asked in."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Self

from openai import APIError

from components.core.base.errors import StageFailed
from components.core.model.architecture import Architecture
from components.core.model.inspection import read_architecture
from components.core.runtime.context import Interrupted, StageContext
from components.core.serving.server import Launcher, Server, max_position_embeddings, tail
from components.core.serving.settings import vllm_uses_gpu
from components.core.text.problems import Problem
from components.eval.answers import Answered, PromptMode
from components.eval.checkpoint import EvalCheckpoint
from components.eval.client import SERVED_NAME, ask
from components.eval.config import WITH_TOGGLE, EvalConfig

SERVERS_AT_A_TIME = 2
"""On a CPU, where a server computes on one thread; on a GPU a server takes the memory of the device."""
PROMPT_ROOM_TOKENS = 256
"""What a chat template adds to a prompt beyond a token a byte."""
PROGRESS_EVERY = 20


@dataclass(frozen=True)
class Served:
    """What a server reads once, when it starts; everything else about a model is in its weights."""

    architecture: Architecture
    tokenizer: tuple[str, ...]
    """Digests of the files that make tokens of a chat, and end an answer."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read a model folder."""
        files = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else b"" for name in files]
        digests = tuple(hashlib.sha256(content).hexdigest() for content in contents)
        return cls(read_architecture(folder).without_gaps(), digests)


def group_by_architecture(models: Mapping[str, Path]) -> list[list[str]]:
    """Groups of roles that one server can serve in turn by swapping weights; the group with most to do first."""
    groups: dict[Served, list[str]] = {}
    for role, folder in models.items():
        groups.setdefault(Served.of(folder), []).append(role)
    return sorted(groups.values(), key=lambda roles: sum(len(ways(role)) for role in roles), reverse=True)


def ways(role: str) -> tuple[PromptMode, ...]:
    """How a model is asked."""
    return ("on", "off") if role in WITH_TOGGLE else ("plain",)


class EvalRunner:
    """Asks all models, and keeps the answers of each as soon as it has all of them."""

    def __init__(
        self, config: EvalConfig, problems: Sequence[Problem], context: StageContext, checkpoint: EvalCheckpoint
    ) -> None:
        self._config, self._problems, self._context, self._checkpoint = config, problems, context, checkpoint
        self._lock = Lock()
        self._done = self._total = 0
        self._given_up = False

    def ask(self, models: Mapping[str, Path]) -> None:
        """Ask every model whose answers are not kept yet.

        Raises:
            DataError: a problem is too long for a model.
            Interrupted: the stage was asked to stop; models that were done are kept.
        """
        waiting = {role: folder for role, folder in models.items() if role not in self._checkpoint.answers}
        self._total = len(self._problems) * sum(len(ways(role)) for role in waiting)
        if not waiting:
            return
        at_a_time = 1 if vllm_uses_gpu() else SERVERS_AT_A_TIME
        with Launcher() as launcher, ThreadPoolExecutor(at_a_time) as pool:
            groups = [
                pool.submit(self._ask_group, launcher, roles, waiting) for roles in group_by_architecture(waiting)
            ]
            try:
                for group in as_completed(groups):
                    group.result()
            except BaseException:
                self._given_up = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask_group(self, launcher: Launcher, roles: Sequence[str], models: Mapping[str, Path]) -> None:
        """Ask models one after the other in the same server."""
        with self._server(launcher, roles, models) as server:
            for role in roles:
                if role != roles[0]:
                    server.swap_weights(models[role], version=role)
                answers = self._ask_model(server, role)
                with self._lock:
                    self._checkpoint.answers[role] = answers
                    self._checkpoint.save(self._context.resume)

    def _server(self, launcher: Launcher, roles: Sequence[str], models: Mapping[str, Path]) -> Server:
        """The server of a group, not started yet."""
        folder = models[roles[0]]
        longest = max(len(text.encode()) for each in self._problems for text in (each.question, each.prompt))
        return Server(
            folder,
            name=SERVED_NAME,
            log=self._context.scratch / f"server-{roles[0]}.log",
            swappable=len(roles) > 1,
            max_model_len=min(max_position_embeddings(folder), longest + PROMPT_ROOM_TOKENS + self._config.max_tokens),
            max_num_seqs=self._config.concurrency,
            launcher=launcher,
            on_wait=lambda _: self._stop_if_asked(),
        )

    def _ask_model(self, server: Server, role: str) -> list[Answered]:
        """All problems, in all ways of one model."""

        def tick() -> None:
            self._stop_if_asked()
            with self._lock:
                self._done += 1
                if self._done % PROGRESS_EVERY == 0 or self._done == self._total:
                    self._context.progress(self._done, self._total, what=role)

        try:
            return asyncio.run(ask(server.url, role, self._problems, ways(role), self._config, tick))
        except APIError as error:
            raise StageFailed(f"the server of {role} failed: {error}\n{tail(server.log)}") from error

    def _stop_if_asked(self) -> None:
        """Leave where the stage was asked to, or where the other server has failed."""
        if self._given_up or self._context.stopping():
            raise Interrupted
