import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("vllm")

from components.core.base.errors import InputError, MissingPackage, TesseraError
from components.core.base.ports import HOST, is_free, never_proxy_loopback, usable_port
from components.core.model.checkpoint import save_model
from components.core.serving.server import Server
from components.core.serving.serving_config import ServingConfig
from tests.chaos.processes import group_pids
from tests.components.core import tiny_models
from tests.waiting import wait_until

ON, OFF = "detailed thinking on", "detailed thinking off"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one architecture whose replies are known, and one of another architecture."""
    root = tmp_path_factory.mktemp("models")
    answers = {"first": "42", "second": "13"}
    folders = {}
    for name, answer in answers.items():
        thinking = ["<on>", "<think>", "6", "*", "7", "</think>", answer[0]]
        model = tiny_models.speaker(thinking, ["<off>", *answer, "<eos>"])
        folders[name] = tiny_models.write(model, root / name)
    save_model(tiny_models.heterogeneous(0), root / "other", tokenizer=folders["first"])
    return {**folders, "other": root / "other"}


@pytest.fixture(scope="module", autouse=True)
def dead_proxy() -> Iterator[None]:
    """The environment names a proxy at which nobody answers."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("http_proxy", f"http://{HOST}:1")
        yield


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], dead_proxy: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    waited: list[float] = []
    with Server(folders["first"], name="tiny", log=log, swappable=True, on_wait=waited.append) as running:
        assert waited
        assert waited == sorted(waited)
        yield running
        group = int(running.pid or 0)
        assert group_pids(group)
    wait_until_gone(group)
    assert usable_port(running.port) == running.port


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="-") as found:
        yield found


def chat(mode: str) -> Any:
    """A question in one mode."""
    return [{"role": "system", "content": mode}, {"role": "user", "content": "6*7="}]


def ask(client: openai.OpenAI, mode: str, max_tokens: int = 16) -> tuple[str | None, str | None]:
    """Reasoning and answer."""
    reply = client.chat.completions.create(model="tiny", messages=chat(mode), max_tokens=max_tokens, temperature=0.0)
    message = reply.choices[0].message
    return message.reasoning, message.content  # type: ignore[attr-defined]  # a field of vLLM


def ask_streaming(client: openai.OpenAI, mode: str, **options: Any) -> tuple[str, str]:
    """Reasoning and answer, put together from the deltas."""
    reasoning = content = ""
    chunks = client.chat.completions.create(
        model="tiny", messages=chat(mode), max_tokens=16, temperature=0.0, stream=True, **options
    )
    for chunk in chunks:
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning", None) or ""
        content += delta.content or ""
    return reasoning, content


def test_reasoning_and_answer_have_fields_of_their_own(client: openai.OpenAI) -> None:
    assert ask(client, ON) == ("6*7", "42")
    assert ask(client, OFF) == (None, "42")


def test_reasoning_that_is_cut_off_is_reasoning_so_far(client: openai.OpenAI) -> None:
    assert ask(client, ON, max_tokens=3) == ("6*", None)


def test_a_stream_gives_the_same_fields(client: openai.OpenAI) -> None:
    assert ask_streaming(client, ON) == ("6*7", "42")
    assert ask_streaming(client, OFF) == ("", "42")


def test_a_stream_with_stop_strings_gives_the_same_fields(client: openai.OpenAI) -> None:
    """The text then lags behind the tokens, so that tags arrive in pieces."""
    assert ask_streaming(client, ON, stop=["nothing of the kind"]) == ("6*7", "42")


CHOICE = {"structured_outputs": {"choice": ["13", "31"]}}
"""Neither is what the model would say."""


@pytest.mark.parametrize("constraint", [CHOICE, {"structured_outputs": {"regex": "13|31"}}], ids=["choice", "regex"])
def test_structured_output_is_enforced_in_both_modes(client: openai.OpenAI, constraint: dict[str, Any]) -> None:
    options: dict[str, Any] = {"extra_body": constraint, "temperature": 0.0, "max_tokens": 16}
    for mode, expected in ((OFF, None), (ON, "6*7")):
        reply = client.chat.completions.create(model="tiny", messages=chat(mode), **options).choices[0].message
        assert reply.reasoning == expected  # type: ignore[attr-defined]
        assert reply.content in ("13", "31")
        reasoning, content = ask_streaming(client, mode, extra_body=constraint)
        assert reasoning == (expected or "")
        assert content in ("13", "31")


def test_the_rest_of_a_continued_thought_is_reasoning(client: openai.OpenAI) -> None:
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    for begun, expected in (("<think>6", ("*7", "42")), ("<think>6*7</think>", (None, "42"))):
        messages: Any = [*chat(ON), {"role": "assistant", "content": begun}]
        options: dict[str, Any] = {"extra_body": continued, "temperature": 0.0, "max_tokens": 16}
        reply = client.chat.completions.create(model="tiny", messages=messages, **options).choices[0].message
        assert (reply.reasoning, reply.content) == expected  # type: ignore[attr-defined]
        deltas = [
            chunk.choices[0].delta
            for chunk in client.chat.completions.create(model="tiny", messages=messages, stream=True, **options)
        ]
        reasoning = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
        assert (reasoning or None, "".join(delta.content or "" for delta in deltas)) == expected


def test_several_answers_to_one_question(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=chat(ON), max_tokens=16, temperature=0.1, n=2)
    found = [(choice.message.reasoning, choice.message.content) for choice in reply.choices]  # type: ignore[attr-defined]
    assert found == [("6*7", "42")] * 2


def test_the_model_has_its_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_weights_of_the_same_architecture_are_swapped(
    server: Server, client: openai.OpenAI, folders: dict[str, Path]
) -> None:
    server.swap_weights(folders["second"], version="second")
    assert server.weight_version() == "second"
    assert ask(client, ON) == ("6*7", "13")
    server.swap_weights(folders["first"], version="first")
    assert server.weight_version() == "first"
    assert ask(client, ON) == ("6*7", "42")


def test_weights_of_another_architecture_are_refused(server: Server, folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="differ in their architecture"):
        server.swap_weights(folders["other"], version="other")


def test_a_server_swaps_no_weights_unless_it_was_started_for_that(folders: dict[str, Path], tmp_path: Path) -> None:
    server = Server(folders["other"], name="other", log=tmp_path / "log")
    with pytest.raises(InputError, match="swappable"):
        server.swap_weights(folders["other"], version="other")


def test_a_server_that_dies_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["first"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"nothing")
    cause = r"(?s)the server has ended; from .*log:\nsafetensors.*SafetensorError: .*header too small\n"
    with pytest.raises(TesseraError, match=cause):
        Server(broken, name="broken", log=tmp_path / "log").start()


def test_a_taken_port_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} cannot be used") as error:
            Server(folders["first"], name="tiny", log=tmp_path / "log", serving=ServingConfig(port=port)).start()
    assert error.value.hint


def test_without_vllm_the_way_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
) -> None:
    monkeypatch.setattr("components.core.serving.settings.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="make install"):
        Server(folders["first"], name="tiny", log=tmp_path / "log").start()


ORPHANING = """
import sys, time
from pathlib import Path
from components.core.serving.server import Server

def report(seconds):
    print(server.pid, server.port, flush=True)

server = Server(Path(sys.argv[1]), name="tiny", log=Path(sys.argv[2]), on_wait=report)
server.start()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("case", ["while the server starts", "when it is ready", "after the server was killed"])
def test_a_killed_parent_leaves_no_process(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Of a server of a heterogeneous model, beside that of the other tests."""
    command = [sys.executable, "-c", ORPHANING, str(folders["other"]), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group, port = map(int, parent.stdout.readline().split())
        if case != "while the server starts":
            assert "ready\n" in iter(parent.stdout.readline, "")
            assert len(group_pids(group)) >= 2
            never_proxy_loopback()
            with openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="-") as client:
                assert client.completions.create(model="tiny", prompt="6*7=", max_tokens=4).usage
        if case == "after the server was killed":
            os.kill(group, signal.SIGKILL)
        os.kill(parent.pid, signal.SIGKILL)
    wait_until_gone(group)
    wait_until_free(port)


def wait_until_free(port: int) -> None:
    """Fail if a port is still taken after a while; the threads of a killed process can hold it a moment longer."""
    wait_until("the port is free", lambda: is_free(port), interval_s=0.1)


def wait_until_gone(group: int) -> None:
    """Fail if a process group is still there after a while."""
    wait_until("the group is gone", lambda: not group_pids(group), details=lambda: group_pids(group))
