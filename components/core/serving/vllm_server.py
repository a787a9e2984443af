"""VLLM's OpenAI-compatible server as its makers ship it, imported without garbage collections.

    python -m components.core.serving.vllm_server --model FOLDER …

What a server imports is millions of objects and no garbage, which Python's collector takes a sixth of the time to find
out. The engine, a process that vLLM spawns, imports this module first, where the server's own would load all of its
endpoints. The plug-in lets collections happen again: vLLM calls it in both processes once its modules are loaded.
"""

import gc
import runpy

gc.disable()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
