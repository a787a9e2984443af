"""An OpenAI-compatible vLLM server for a model folder, as a context manager.

    with Server(folder, name="run-1", log=log) as server:
        client = openai.OpenAI(base_url=server.url, api_key="-")

Servers that are started one after the other share a `Launcher`, which imports vLLM once for all of them.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Self

from components.core.base.errors import InputError, TesseraError
from components.core.base.ports import HOST, is_free, usable_port
from components.core.model.inspection import read_architecture
from components.core.serving.settings import (
    BATCHED_TOKENS,
    ENVIRONMENT,
    PLUGIN,
    kv_cache_bytes,
    require_attention,
    require_vllm,
    vllm_uses_gpu,
)
from components.core.text.chat import has_toggle

POLL_INTERVAL_S = 0.1
STOP_TIMEOUT_S = 5.0
TAIL_LINES = 15


class Launcher:
    """A process that has vLLM imported and forks servers; it begins to import at once, in the background.

        with Launcher() as launcher:
            for folder in folders:
                with Server(folder, name="m", log=log, launcher=launcher) as server: ...

    It ends with this process, however that ends, and its servers end with it.
    """

    def __init__(self) -> None:
        """Start to import vLLM.

        Raises:
            MissingPackage: vLLM is not installed.
        """
        require_vllm()
        self._turn = Lock()
        """Orders are answered in order: whoever asks waits for the answer before the next one asks."""
        self._complaints = tempfile.NamedTemporaryFile(prefix="tessera-vllm-", suffix=".log")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "components.core.serving.launch", str(os.getpid())],
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", **_compiler()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            start_new_session=True,
        )

    def launch(self, order: Mapping[str, object], on_wait: Callable[[], None]) -> int:
        """Fork a server; blocks, calling `on_wait` again and again, while vLLM is still being imported.

        Args:
            order: what `components.core.serving.launch` reads.
            on_wait: called about ten times a second.

        Returns:
            Its process id, which is also its process group.

        Raises:
            TesseraError: vLLM could not be imported.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._turn:
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
            while not select.select([self._process.stdout], [], [], POLL_INTERVAL_S)[0]:
                on_wait()
            answer = self._process.stdout.readline()
            if not answer:
                raise TesseraError(f"vLLM could not be imported:\n{tail(Path(self._complaints.name))}")
        return int(answer)

    def close(self) -> None:
        """End the process; servers that still run end too."""
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """Serves one model folder on the loopback interface until the block is left.

    The server and its engine form a process group, which ends with this process, however that ends.

    Attributes:
        port: where it listens, known once it is started.
        pid: its process and process group; None while it does not run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        log: Path,
        port: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        dtype: str = "float32",
        seed: int = 0,
        threads: int = 1,
        swappable: bool = False,
        launcher: Launcher | None = None,
        timeout_s: float = 600.0,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Describe a server; nothing starts before `start` or `with`.

        Args:
            folder: a Hugging Face model folder with its tokenizer and chat template.
            name: the model's name in requests.
            log: file that takes the output of the server.
            port: where to listen; a free port if None.
            max_model_len: most tokens of a prompt and its answer together; what the model allows if None.
            max_num_seqs: most sequences generated at the same time.
            dtype: of weights and computation.
            seed: seed of the engine.
            threads: CPU threads of the engine.
            swappable: whether `swap_weights` shall work; it opens vLLM's development end points on loopback.
            launcher: forks the server; one for this server alone if None.
            timeout_s: how long to wait for the server to be ready.
            on_wait: called with the seconds waited so far, about ten times a second, until the server is ready.

        Raises:
            CheckpointError: no layer has attention.
        """
        require_attention(folder)
        self.folder, self.name, self.log, self.port = folder, name, log, port
        self._options = {
            "--model": folder,
            "--served-model-name": name,
            "--host": HOST,
            "--dtype": dtype,
            "--seed": seed,
            "--max-num-seqs": max_num_seqs,
        }
        if max_model_len is not None:
            self._options["--max-model-len"] = max_model_len
        if not vllm_uses_gpu():
            self._options["--kv-cache-memory-bytes"] = kv_cache_bytes(
                folder, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs
            )
        if has_toggle(folder):
            self._options["--reasoning-parser"] = PLUGIN
        if swappable:
            self._options["--weight-transfer-config"] = json.dumps({"backend": PLUGIN})
        self._threads, self._swappable = threads, swappable
        self._launcher, self._own_launcher = launcher, launcher is None
        self._timeout_s, self._on_wait = timeout_s, on_wait
        self.pid: int | None = None

    @property
    def url(self) -> str:
        """Base URL for OpenAI clients."""
        return f"http://{HOST}:{self.port}/v1"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            InputError: the port is taken.
            MissingPackage: vLLM is not installed.
            TesseraError: the server ended, or was not ready in time; with the last lines of its log.
        """
        self.port = usable_port(self.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        try:
            self._launcher = self._launcher or Launcher()
            self.pid = self._launcher.launch(self._order(), lambda: self._on_wait(time.monotonic() - begin))
            self._wait_until_ready(begin)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and every process it started; the port is free afterwards."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while self.alive and time.monotonic() < deadline:
                time.sleep(POLL_INTERVAL_S / 2)
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.pid = None
            while self.port and not is_free(self.port) and time.monotonic() < deadline + STOP_TIMEOUT_S:
                time.sleep(POLL_INTERVAL_S / 2)  # threads of a killed process may hold it a moment longer
        if self._own_launcher and self._launcher is not None:
            self._launcher.close()
            self._launcher = None

    @property
    def alive(self) -> bool:
        """Whether the server's process is there."""
        if self.pid is None:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> None:
        """Block until the server ends by itself.

        Raises:
            TesseraError: it ended; with the last lines of its log.
        """
        while True:
            self._check_alive()
            time.sleep(POLL_INTERVAL_S)

    def swap_weights(self, folder: Path, version: str) -> None:
        """Serve the weights of another checkpoint of the same architecture from now on.

        Requests under way are finished first, with the old weights.

        Args:
            folder: the checkpoint.
            version: what `weight_version` will say.

        Raises:
            InputError: the architectures differ, or the server was not started as `swappable`.
        """
        if not self._swappable:
            raise InputError("the weights of this server are fixed", hint="start it with swappable=True")
        if read_architecture(folder).without_gaps() != read_architecture(self.folder).without_gaps():
            raise InputError(
                f"{folder} and {self.folder}, which is being served, differ in their architecture",
                hint="start a server of its own for it",
            )
        self._post("/pause?mode=wait")
        try:
            self._post("/init_weight_transfer_engine", {"init_info": {}})
            self._post("/start_weight_update")
            self._post("/update_weights", {"update_info": {"folder": str(folder.resolve())}})
            self._post("/finish_weight_update", {"weight_version": version})
            # else what the old weights computed for a prompt's prefix would be used again
            self._post("/reset_prefix_cache")
        finally:
            self._post("/resume")

    def weight_version(self) -> str:
        """The version of the weights being served: what `swap_weights` was told."""
        return str(json.loads(self._request("/weight_info"))["weight_version"])

    def _order(self) -> dict[str, object]:
        """What the launcher is told."""
        options = {**self._options, "--port": self.port}
        arguments = [str(part) for option in options.items() for part in option]
        if not vllm_uses_gpu():
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
            longest = self._options.get("--max-model-len") or max_position_embeddings(self.folder)
            arguments += ["--max-num-batched-tokens", str(max(BATCHED_TOKENS, int(str(longest))))]
        return {
            "arguments": [*arguments, "--disable-uvicorn-access-log"],
            "environment": {"VLLM_SERVER_DEV_MODE": str(int(self._swappable))},
            "threads": self._threads,
            "log": str(self.log.resolve()),
        }

    def _wait_until_ready(self, begin: float) -> None:
        """Wait for the first answer to a health check."""
        while (waited := time.monotonic() - begin) < self._timeout_s:
            self._check_alive()
            self._on_wait(waited)
            try:
                self._request("/health")
            except OSError:
                time.sleep(POLL_INTERVAL_S)
            else:
                return
        raise TesseraError(f"the server was not ready within {self._timeout_s:.0f} s:\n{tail(self.log)}")

    def _check_alive(self) -> None:
        """Raise if the server has ended."""
        if not self.alive:
            raise TesseraError(f"the server has ended; the last lines of {self.log}:\n{tail(self.log)}")

    def _post(self, path: str, body: Mapping[str, object] | None = None) -> None:
        """Post a JSON body to an end point beside the OpenAI API."""
        try:
            self._request(path, json.dumps(body or {}).encode())
        except urllib.error.HTTPError as error:
            raise TesseraError(f"the server refused {path}: {error}; the end of its log:\n{tail(self.log)}") from error

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        """Ask an end point beside the OpenAI API."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{HOST}:{self.port}{path}", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
            content: bytes = answer.read()
            return content


def tail(log: Path) -> str:
    """The last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-TAIL_LINES:])


def max_position_embeddings(folder: Path) -> int:
    """The longest context of a model folder, tokens."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])


def _compiler() -> dict[str, str]:
    """Keep the compiler out on a CPU, where it takes longer than it saves."""
    return {} if vllm_uses_gpu() else {"TORCH_COMPILE_DISABLE": "1"}
