"""An OpenAI-compatible vLLM server for a model folder, as a context manager.

with Server(folder, name="run-1", log=log) as server:
    client = openai.OpenAI(base_url=server.url, api_key="-")
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from components.core.base.errors import InputError, TesseraError
from components.core.base.ports import HOST, is_free, never_proxy_loopback, usable_port
from components.core.model.inspection import read_architecture, stored_dtype
from components.core.runtime.hardware import vllm_uses_gpu
from components.core.serving.server_log import describe_failure
from components.core.serving.serving_config import ServingConfig
from components.core.serving.settings import (
    BATCHED_TOKENS,
    OWNER_VARIABLE,
    PLUGIN,
    kv_cache_bytes,
    process_environment,
    require_servable,
    require_vllm,
)
from components.core.text.toggle import has_toggle

COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""`vllm serve`, which the CPU build does not have: its command looks for a distribution named vllm, and fails."""
LOOPBACK = ServingConfig().on_loopback()
EVERY_INTERFACE = ("0.0.0.0", "::")
POLL_INTERVAL_S = 0.1
STOP_TIMEOUT_S = 5.0


class Server:
    """Serves one model folder until the block is left, by default on the loopback interface.

    The server and its engine form a process group. It ends with this process, even one that is killed: the plug-in,
    which vLLM loads in each of its processes, watches for that.

    Attributes:
        port: where the server listens, known once it is started.
        max_model_len: maximum length of a prompt and its answer together, tokens.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        log: Path,
        serving: ServingConfig = LOOPBACK,
        max_num_seqs: int = 64,
        seed: int = 0,
        swappable: bool = False,
        own_sampling: bool = True,
        gpus: str | None = None,
        timeout_s: float = 600.0,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Describe a server; nothing starts before `start` or `with`.

        Args:
            folder: a Hugging Face model folder with its tokenizer and chat template.
            name: the model's name in requests.
            log: file for the output of the server.
            serving: precision, devices and address.
            max_num_seqs: maximum number of sequences that are generated at the same time.
            seed: seed of the engine.
            swappable: enables `swap_weights`; this opens vLLM's development endpoints on loopback.
            own_sampling: requests that set no sampling settings get those of the folder's `generation_config.json`.
            gpus: the GPUs that the server may use, as `CUDA_VISIBLE_DEVICES` lists them; None: those of this process.
            timeout_s: time limit for the server to become ready.
            on_wait: called with the seconds waited so far, about ten times a second, until the server is ready.

        Raises:
            CheckpointError: vLLM cannot run a model of this shape.
        """
        require_servable(folder)
        dtype, max_model_len = serving.dtype or stored_dtype(folder), serving.max_model_len
        self.folder, self.name, self.log = folder, name, log
        self.port: int | None = None
        self.max_model_len = max_model_len or max_position_embeddings(folder)
        self._serving = serving
        self._options = {
            "--model": folder,
            "--served-model-name": name,
            "--host": serving.host,
            **_precision(dtype),
            "--tensor-parallel-size": serving.tensor_parallel,
            "--seed": seed,
            "--max-num-seqs": max_num_seqs,
            "--generation-config": "auto" if own_sampling else "vllm",
        }
        if max_model_len is not None:
            self._options["--max-model-len"] = max_model_len
        if vllm_uses_gpu():
            if serving.gpu_memory_fraction is not None:
                self._options["--gpu-memory-utilization"] = serving.gpu_memory_fraction
        else:
            self._options["--kv-cache-memory-bytes"] = kv_cache_bytes(
                folder, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs
            )
        if has_toggle(folder):
            self._options["--reasoning-parser"] = PLUGIN
        if swappable:
            self._options["--weight-transfer-config"] = json.dumps({"backend": PLUGIN})
        self._swappable, self._gpus = swappable, gpus
        self._timeout_s, self._on_wait = timeout_s, on_wait
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL for OpenAI clients."""
        return f"http://{self._address}/v1"

    @property
    def _address(self) -> str:
        """Host and port at which this machine reaches the server."""
        host = self._serving.host
        return f"{HOST if host in EVERY_INTERFACE else host}:{self.port}"

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
            TesseraError: the server ended, or was not ready in time; with the cause and the last lines from its log.
        """
        require_vllm()
        never_proxy_loopback()
        self.port = usable_port(self._serving.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*COMMAND, *self._arguments()],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
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
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.port and not is_free(self.port) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S / 2)  # the threads of a killed process can hold it a moment longer

    @property
    def pid(self) -> int | None:
        """The server's process, which is also its process group; None while it does not run."""
        return None if self._process is None else self._process.pid

    def wait(self) -> None:
        """Block until the server ends by itself.

        Raises:
            TesseraError: the server ended; with the cause and the last lines from its log.
        """
        while True:
            self._check_alive()
            time.sleep(POLL_INTERVAL_S)

    def swap_weights(self, folder: Path, version: str) -> None:
        """Serve the weights of another checkpoint of the same architecture from now on.

        Running requests are finished first, with the old weights.

        Args:
            folder: the checkpoint.
            version: the new value of `weight_version`.

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
            self._post("/reset_prefix_cache")  # vLLM keeps the keys and values of the old weights
        finally:
            self._post("/resume")

    def weight_version(self) -> str:
        """The version of the weights being served, as `swap_weights` set it."""
        return str(json.loads(self._request("/weight_info"))["weight_version"])

    def _arguments(self) -> list[str]:
        """The command line after the program."""
        options = {**self._options, "--port": self.port}
        arguments = [str(part) for option in options.items() for part in option]
        if not vllm_uses_gpu():
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
            arguments += ["--max-num-batched-tokens", str(max(BATCHED_TOKENS, self.max_model_len))]
        return [*arguments, "--disable-uvicorn-access-log"]

    def _environment(self) -> dict[str, str]:
        """Environment variables of the server."""
        return {
            **process_environment(self._serving.threads, self._serving.tensor_parallel),
            **({} if self._gpus is None else {"CUDA_VISIBLE_DEVICES": self._gpus}),
            OWNER_VARIABLE: str(os.getpid()),
            "VLLM_SERVER_DEV_MODE": str(int(self._swappable)),
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked engine would not load the plug-in
        }

    def _wait_until_ready(self) -> None:
        """Wait until a health check succeeds."""
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < self._timeout_s:
            self._check_alive()
            self._on_wait(waited)
            try:
                self._request("/health")
            except OSError:
                time.sleep(POLL_INTERVAL_S)
            else:
                return
        raise TesseraError(f"the server was not ready within {self._timeout_s:.0f} s:\n{describe_failure(self.log)}")

    def _check_alive(self) -> None:
        """Raise if the server has ended."""
        if self._process is None or self._process.poll() is not None:
            raise TesseraError(f"the server has ended; from {self.log}:\n{describe_failure(self.log)}")

    def _post(self, path: str, body: Mapping[str, object] | None = None) -> None:
        """Post a JSON body to an endpoint of vLLM that is not part of the OpenAI API."""
        try:
            self._request(path, json.dumps(body or {}).encode())
        except urllib.error.HTTPError as error:
            log = describe_failure(self.log)
            raise TesseraError(f"the server refused {path}: {error}; from its log:\n{log}") from error

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        """Send a request to an endpoint of vLLM that is not part of the OpenAI API."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self._address}{path}", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
            content: bytes = answer.read()
            return content


def _precision(dtype: str) -> dict[str, object]:
    """The options for a precision."""
    if dtype == "float8":
        return {"--dtype": "bfloat16", "--quantization": "fp8", "--kv-cache-dtype": "fp8"}
    return {"--dtype": dtype}


def max_position_embeddings(folder: Path) -> int:
    """The longest context of a model folder, tokens."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])
