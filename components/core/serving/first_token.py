"""Asks a server for one token; exit code 0 once it came: `python -m components.core.serving.first_token PORT NAME`.

A pod of a server is ready when this has succeeded: `/health` answers before the first request was computed, which may
compile kernels, or fail. It imports nothing but the standard library, since a probe starts it again and again.
"""

import json
import os
import sys
import urllib.error
import urllib.request

API_KEY = "VLLM_API_KEY"
"""Environment variable with the server's key, where it asks for one; vLLM reads it too."""
TIMEOUT_S = 120.0


def first_token(url: str, model: str) -> None:
    """Ask for an answer of one token.

    Args:
        url: base URL of the server, with `/v1`.
        model: name of the model in requests.

    Raises:
        OSError: there is no server yet, it does not answer in time, or it answers with an error.
        ValueError: its answer has no token.
    """
    body = {"model": model, "messages": [{"role": "user", "content": "1+1="}], "max_tokens": 1}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(API_KEY, '')}"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as answer:
        if not json.load(answer).get("choices"):
            raise ValueError(f"{url} answered without a token")


def main() -> int:
    """Ask the server on this machine; returns the exit code."""
    port, model = sys.argv[1:]
    try:
        first_token(f"http://127.0.0.1:{port}/v1", model)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        sys.stderr.write(f"no token yet: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
