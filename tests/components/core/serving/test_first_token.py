"""A server is ready when it has answered with a token, and not before."""

import subprocess
import sys

from tests.json_server import Request, running_json_server


def asked(port: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "components.core.serving.first_token", port, "nano"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_only_a_token_makes_it_succeed() -> None:
    answers: list[tuple[int, object]] = [(503, {}), (200, {"choices": []}), (200, {"choices": [{"index": 0}]})]
    seen: list[Request] = []

    def answer(request: Request) -> tuple[int, object]:
        seen.append(request)
        return answers.pop(0)

    with running_json_server(answer) as url:
        port = url.rpartition(":")[2]
        assert [asked(port).returncode for _ in range(3)] == [1, 1, 0]
    assert {request.path for request in seen} == {"/v1/chat/completions"}
    assert b'"max_tokens": 1' in seen[0].body
    nobody = asked(port)
    assert nobody.returncode == 1
    assert "no token yet" in nobody.stderr
    assert "Traceback" not in nobody.stderr
