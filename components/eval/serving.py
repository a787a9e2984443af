"""Groups models that one server can serve in turn, and asks them."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Self, TypeVar

from openai import APIError

from components.core.base.errors import StageFailed
from components.core.model.architecture import Architecture
from components.core.model.inspection import StoredDtype, read_architecture, stored_dtype
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.hardware import vllm_uses_gpu
from components.core.serving.server import Server, max_position_embeddings
from components.core.serving.server_log import describe_failure
from components.core.serving.start_report import server_start
from components.core.text.problems import Problem
from components.core.text.toggle_template import ChatTemplate
from components.eval.answer_rows import AnswerRow, PromptMode
from components.eval.answers import EvalCheckpoint, TaskResults
from components.eval.client import SERVED_NAME, ask
from components.eval.config import WITH_TOGGLE, EvalConfig
from components.eval.replicas import Replicas, gpus_of_replica, merge_shares
from components.eval.tasks import run_tasks

CPU_SERVERS = 2
"""Servers that run at the same time on a CPU where there is one replica. On a GPU a server takes the memory of the
device."""
CHAT_TEMPLATE_TOKENS = 256
"""Upper limit of what a chat template adds to a prompt, whose own length is at most one token per byte."""
PROGRESS_REPORTS = 50
"""Most reports of progress while models answer."""
ANSWERS, TASKS = "answers", "tasks of lm-eval"
"""What progress calls them, for all models together: two servers may be asked at the same time."""

Found = TypeVar("Found")
"""What a part of the checkpoint holds for a model."""


@dataclass(frozen=True)
class ServerKey:
    """What a server reads only when it starts, but the chat template. Models with equal keys can share a server."""

    architecture: Architecture
    dtype: StoredDtype
    """Precision of the weights."""
    tokenizer: tuple[str, ...]
    """Digests of the files that tokenize a text and define the end of an answer."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read a model folder."""
        files = ("tokenizer.json", "generation_config.json")
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else b"" for name in files]
        digests = tuple(hashlib.sha256(content).hexdigest() for content in contents)
        return cls(read_architecture(folder).without_gaps(), stored_dtype(folder), digests)


def group_by_architecture(models: Mapping[str, Path]) -> list[list[str]]:
    """Groups of roles that one server can serve in turn by swapping weights, the group with most requests first.

    Models of a group have the same chat template or none: those without one are not asked in a chat. The first of a
    group has one if any does, since the server reads it there.
    """
    groups: dict[tuple[ServerKey, str | None], list[str]] = {}
    without: dict[ServerKey, list[str]] = {}
    for role, folder in models.items():
        key, template = ServerKey.of(folder), ChatTemplate.of(folder)
        if template is None:
            without.setdefault(key, []).append(role)
        else:
            groups.setdefault((key, template.source), []).append(role)
    for key, roles in without.items():
        shared = next((found for (other, _), found in groups.items() if other == key), None)
        if shared is None:
            groups[key, None] = roles
        else:
            shared += roles
    return sorted(
        groups.values(), key=lambda roles: sum(len(prompt_modes(role, models[role])) for role in roles), reverse=True
    )


def prompt_modes(role: str, folder: Path) -> tuple[PromptMode, ...]:
    """The modes in which a model is asked."""
    if role in WITH_TOGGLE:
        return ("on", "off")
    return ("plain",) if ChatTemplate.of(folder) is None else ("chat",)


class EvalRunner:
    """Asks all models, and saves the answers of each model once they are complete.

    Each replica asks its share of the requests. All take the models in the same order, and exchange their answers.
    """

    def __init__(
        self,
        config: EvalConfig,
        problems: Sequence[Problem],
        context: StageContext,
        checkpoint: EvalCheckpoint,
        replicas: Replicas,
        task_files: Path | None = None,
    ) -> None:
        self._config, self._problems, self._context, self._checkpoint = config, problems, context, checkpoint
        self._replicas, self._task_files, self._tasks = replicas, task_files, replicas.share(config.tasks)
        self._lock = Lock()
        self._done = self._total = self._num_running = 0
        self._cancelled = False

    def ask(self, models: Mapping[str, Path]) -> None:
        """Ask every model whose answers are not in the checkpoint yet.

        Raises:
            DataError: a problem is too long for a model.
            Interrupted: the stage was asked to stop; the answers of finished models are in the checkpoint.
        """
        without_answers = {role: models[role] for role in models if role not in self._checkpoint.answers}
        without_tasks = [role for role in models if self._tasks and role not in self._checkpoint.tasks]
        remaining = {role: models[role] for role in models if role in without_answers or role in without_tasks}
        self._total = sum(len(self._requests(*model)) for model in without_answers.items())
        self._total += len(self._tasks) * len(without_tasks)
        if not remaining:
            return
        num_servers = 1 if vllm_uses_gpu() or self._replicas.count > 1 else CPU_SERVERS
        with ThreadPoolExecutor(num_servers) as pool:
            groups = [pool.submit(self._ask_group, roles, remaining) for roles in group_by_architecture(remaining)]
            try:
                for group in as_completed(groups):
                    group.result()
            except BaseException:
                self._cancelled = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask_group(self, roles: Sequence[str], models: Mapping[str, Path]) -> None:
        """Ask models one after the other on the same server."""
        with self._server(roles, models) as server, self._counted():
            for role in roles:
                if role != roles[0]:
                    server.swap_weights(models[role], version=role)
                if role not in self._checkpoint.answers:
                    rows = [row.model_dump(mode="json") for row in self._ask_model(server, role, models[role])]
                    merged = merge_shares(self._replicas.exchange(rows))
                    self._save(self._checkpoint.answers, role, [AnswerRow.model_validate(row) for row in merged])
                if self._config.tasks:
                    shares = self._replicas.exchange(asdict(self._run_tasks(server, role, models[role])))
                    results = {name: found for share in shares for name, found in share["results"].items()}
                    samples = [sample for share in shares for sample in share["samples"]]
                    self._save(self._checkpoint.tasks, role, TaskResults(results, samples))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """During the block a server runs, and what it is asked is the progress."""
        with self._lock:
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1

    def _save(self, part: dict[str, Found], role: str, found: Found) -> None:
        """Add what was found for a model to a part of the checkpoint, and save a resume point."""
        with self._lock:
            part[role] = found
            if self._replicas.is_first:
                self._checkpoint.save(self._context.resume)

    def _requests(self, role: str, folder: Path) -> list[tuple[Problem, PromptMode]]:
        """What this replica asks a model: its share of all problems in the first mode, then in the next."""
        modes = prompt_modes(role, folder)
        return self._replicas.share([(problem, mode) for mode in modes for problem in self._problems])

    def _server(self, roles: Sequence[str], models: Mapping[str, Path]) -> Server:
        """The server of a group, before it is started."""
        folder = models[roles[0]]
        texts = [text for problem in self._problems for text in (problem.question, problem.prompt)]
        longest, serving = max((len(text.encode()) for text in texts), default=0), self._config.serving
        needed = longest + CHAT_TEMPLATE_TOKENS + self._config.max_tokens
        lengths = (max_position_embeddings(folder), None if self._config.tasks else needed, serving.max_model_len)
        return Server(
            folder,
            name=SERVED_NAME,
            log=self._context.scratch / f"server-{roles[0]}-{self._replicas.index}.log",
            swappable=len(roles) > 1,
            serving=serving.on_loopback().model_copy(update={"max_model_len": min(filter(None, lengths))}),
            max_num_seqs=self._config.concurrency,
            own_sampling=False,
            gpus=gpus_of_replica(self._context.placement, serving.tensor_parallel),
            on_wait=partial(self._while_starting, server_start(self._context)),
        )

    def _while_starting(self, report: Callable[[float], None], seconds: float) -> None:
        """Report how long a server has been starting, unless another one answers meanwhile."""
        self._stop_if_asked()
        with self._lock:
            if self._num_running == 0:
                report(seconds)

    def _ask_model(self, server: Server, role: str, folder: Path) -> list[AnswerRow]:
        """Ask a model this replica's share of the problems in its modes."""
        requests, count = self._requests(role, folder), partial(self._count, ANSWERS)
        with self._lock:  # the server has started: time counts from here
            self._context.progress(self._done, self._total, what=ANSWERS)
        try:
            return asyncio.run(ask(server.url, role, requests, self._config, count, folder))
        except APIError as error:
            raise StageFailed(f"the server of {role} failed: {error}\n{describe_failure(server.log)}") from error

    def _run_tasks(self, server: Server, role: str, folder: Path) -> TaskResults:
        """Run this replica's share of the tasks on a model."""
        if not self._tasks:
            return TaskResults()
        self._context.progress(self._done, self._total, what=TASKS)
        log, modes = self._context.scratch / f"lm-eval-{role}-{self._replicas.index}.log", prompt_modes(role, folder)
        found = run_tasks(server, folder, self._tasks, modes, self._config, self._task_files, log, self._stop_if_asked)
        for _ in self._tasks:
            self._count(TASKS)
        return found

    def _count(self, what: str) -> None:
        """Count a problem or task that is done, and report progress now and then."""
        self._stop_if_asked()
        with self._lock:
            self._done += 1
            if self._done % max(1, self._total // PROGRESS_REPORTS) == 0 or self._done == self._total:
                self._context.progress(self._done, self._total, what=what)

    def _stop_if_asked(self) -> None:
        """Raise Interrupted if the stage was asked to stop, or if another server has failed."""
        if self._cancelled or self._context.stopping():
            raise Interrupted
