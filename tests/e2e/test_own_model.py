"""A user's own checkpoint and text, written without us: from a Hugging Face folder to a bundle that vLLM serves."""

import itertools
import json
import keyword
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from components.core.model.checkpoint import load_model
from components.core.store.store import open_store
from components.core.training.greedy_decoding import complete
from components.search.config import Measurement, Space
from components.search.costs.measured import counted_costs
from components.search.costs.resources import CostTable, Machine
from components.search.space.layer_space import layer_spaces
from components.search.space.subblocks import shape_of
from pipelines.records.runs import stage_documents

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "own-model.yaml"
SOURCES = [Path(sysconfig.get_path("stdlib"), name) for name in ("bisect.py", "heapq.py", "textwrap.py", "token.py")]
BOS, EOS = "<|begin|>", "<|end_of_text|>"
QUESTION = "How many letters has 'while'?"
MAX_TOKENS = 6

SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TRAINING = "num_steps: 2, global_batch_size: 2, micro_batch_size: 2, seq_len: 64"
SMALL = (
    "search={shards: 1, seq_len: 64, batch_size: 2, ffn_fractions: [1.0, 0.5], importance_batches: 1,"
    " distillation: {num_steps: 2}, scoring_batches: 1, pareto_points: 2,"
    " measurement: {batch_size: 2, prompt_tokens: 4, new_tokens: 4, rounds: 1}}",
    f"distill={{{TRAINING}}}",
    f"pretrain={{{TRAINING}}}",
    f"sft={{{TRAINING}}}",
    "rl={num_steps: 1, prompts_per_step: 2, samples_per_prompt: 2, updates_per_step: 1, max_tokens: 6,"
    " start_without_reward: true,"
    " pass_rate_samples: 1, max_problems: 4}",
    "eval={num_problems: 2, num_samples: 1, max_tokens: 4,"
    " workload: {batch_size: 2, prompt_tokens: 4, new_tokens: 4, rounds: 1}}",
    f'deploy={{questions: ["{QUESTION}"], max_tokens: {MAX_TOKENS}}}',
)
"""Settings that leave every stage something to do, and next to nothing."""


def write_tokenizer(folder: Path, *, begins: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the sources, one that begins every text with a token of its own or does not."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train([str(path) for path in SOURCES], trainer)
    if begins:
        core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS if begins else None, eos_token=EOS)  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    return fast


def write_llama(folder: Path) -> PreTrainedModel:
    """A Llama as of Llama 3.2: scaled rotary positions, grouped heads, tied embeddings, a token to begin with."""
    tokenizer = write_tokenizer(folder, begins=True)
    torch.manual_seed(0)
    own: dict[str, Any] = {"num_hidden_layers": 4, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    model: PreTrainedModel = LlamaForCausalLM(
        LlamaConfig(**SIZES, **own, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE, initializer_range=0.1)
    )
    model.save_pretrained(folder)
    return model


def write_qwen2(folder: Path) -> PreTrainedModel:
    """A Qwen2 whose query, key and value biases differ from nought, with more embeddings than tokens, as released."""
    write_tokenizer(folder, begins=False)
    torch.manual_seed(0)
    own: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 448, "bos_token_id": None, "eos_token_id": 1}
    model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**SIZES, **own, initializer_range=0.1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return model


def write_costs(parent: Path, path: Path) -> None:
    """Block costs as an earlier run would have measured them, a microsecond for every hundred parameters."""
    model = load_model(parent)
    spaces = layer_spaces(Space(ffn_fractions=(1.0, 0.5)), shape_of(model.config))
    fixed, blocks = counted_costs(model, spaces)
    table = CostTable(
        fixed=fixed.model_copy(update={"latency_ms": 0.1}),
        blocks={
            variant.name: costs.model_copy(update={"latency_ms": costs.parameters / 1e5})
            for variant, costs in blocks.items()
        },
        machine=Machine(device="elsewhere", threads=1, versions={}),
        measurement=Measurement(),
        models=(),
    )
    path.write_text(json.dumps(table.canonical()))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def nemotron_chats() -> list[dict[str, Any]]:
    """Rows as in the Llama-Nemotron post-training data set."""
    common = {"category": "code", "system_prompt": "You know Python.", "license": "cc-by-4.0", "version": "v1"}
    return [
        {**common, "input": [{"role": "user", "content": ask}], "output": reply, "reasoning": mode}
        for ask, reply, mode in asked_and_answered()
    ]


def message_chats() -> list[dict[str, Any]]:
    """The same as plain messages, the mode told by the system message alone."""
    return [
        {
            "messages": [
                {"role": "system", "content": f"detailed thinking {mode}"},
                {"role": "user", "content": ask},
                {"role": "assistant", "content": reply},
            ]
        }
        for ask, reply, mode in asked_and_answered()
    ]


def asked_and_answered() -> list[tuple[str, str, str]]:
    """Question, reply and mode: the lengths of Python's keywords, with a thought and without one."""
    told = []
    for word in keyword.kwlist:
        ask, reply = f"How many letters has {word!r}?", str(len(word))
        told += [(ask, f"<think>{' '.join(word)}</think>{reply}", "on"), (ask, reply, "off")]
    return told


def tessera(*arguments: str) -> str:
    """Run the command as a user does; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=RECIPE.parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + _end_of_log(arguments)
    return done.stdout


def _end_of_log(arguments: tuple[str, ...]) -> str:
    logs = Path(arguments[-1]).glob("local/runs/*/*.log")
    return "\n".join(log.read_text()[-3000:] for log in logs)


def run_own_model(folder: Path, chats: list[dict[str, Any]], *settings: str) -> tuple[list[dict[str, Any]], Path]:
    """The whole pipeline on the model in `folder / "model"`; returns deploy's talks and the exported bundle."""
    problems = [{"problem": f"How many letters has {word!r}?", "answer": len(word)} for word in keyword.kwlist]
    named = {
        "parent": folder / "model",
        "corpus": f"[{', '.join(map(str, SOURCES))}]",
        "sft": write_rows(folder / "chats.jsonl", chats),
        "rl": write_rows(folder / "problems.jsonl", problems),
    }
    overrides = [*(f"{key}={value}" for key, value in named.items()), *SMALL, *settings]
    store = str(folder / "store")
    options = itertools.chain.from_iterable(("--set", override) for override in overrides)
    shown = tessera("run", str(RECIPE), *options, "--run", "own", "--store", store)
    assert "deploy: done" in shown
    tessera("export", "own", "bundle", str(folder / "bundle"), "--store", store)
    opened = open_store(store)
    record = opened.stage_record(stage_documents(opened, "own")["deploy"]["key"])
    assert record is not None
    talks: Any = record.result["smoke"]
    return talks, folder / "bundle"


def without_tags(text: str) -> str:
    """A model after two steps of training writes the tags anywhere."""
    return text.replace("<think>", "").replace("</think>", "")


def check_replies(talks: list[dict[str, Any]], bundle: Path) -> None:
    """The server said in both modes what our own decoder says, token by token, to what plain transformers asks."""
    model = load_model(bundle)
    tokenizer: Any = AutoTokenizer.from_pretrained(bundle)
    assert [(talk["question"], talk["mode"]) for talk in talks] == [(QUESTION, "on"), (QUESTION, "off")]
    for talk in talks:
        chat = [
            {"role": "system", "content": f"detailed thinking {talk['mode']}"},
            {"role": "user", "content": QUESTION},
        ]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        (reply,) = complete(model, [prompt], [MAX_TOKENS], tokenizer.eos_token_id)
        said = tokenizer.decode(reply, skip_special_tokens=True)
        assert without_tags(talk["reasoning"] + talk["answer"]) == without_tags(said)
        assert talk["same_when_streamed"]


def test_a_llama_with_scaled_positions_and_tied_embeddings(tmp_path: Path) -> None:
    parent = write_llama(tmp_path / "model")
    write_costs(tmp_path / "model", tmp_path / "measured-before.json")
    settings = [
        f"search.costs={tmp_path / 'measured-before.json'}",
        "search.limits={latency_ms: 60%}",
        "eval=null",  # five architectures, a server each; the other test has an evaluation
    ]
    talks, bundle = run_own_model(tmp_path, nemotron_chats(), *settings)
    check_replies(talks, bundle)
    child = load_model(bundle)
    assert child.config.tie_word_embeddings
    assert child.config.rope_parameters == parent.config.rope_parameters
    assert child.num_parameters() < parent.num_parameters()


def test_a_qwen2_with_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MLflow, which every stage would load; the run of the other test has a database of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    parent = write_qwen2(tmp_path / "model")
    one_way = [  # one KV head in the first layer and no attention in the second: the baselines are the same child
        "search={ffn_fractions: [1.0], no_op_ffn: false}",
        "search.limits={kv_bytes_per_token: 25%, latency_ms: null}",
    ]
    talks, bundle = run_own_model(tmp_path, message_chats(), *one_way)
    check_replies(talks, bundle)
    child = load_model(bundle)
    biases = [parameter for name, parameter in child.named_parameters() if name.endswith(".bias")]
    assert biases
    assert all(bias.abs().max() > 0 for bias in biases)
    assert child.num_parameters() < parent.num_parameters()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen3"}, "no norms on queries and keys"),
        ({"model_type": "qwen2_moe", "num_experts": 4}, "mixtures of experts"),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, "sliding-window attention"),
    ],
)
def test_what_a_family_cannot_do_is_refused_before_any_work(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_qwen2(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    own = ["--set", f"parent={tmp_path / 'model'}", "--store", str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-m", "pipelines", "run", str(RECIPE), *own], capture_output=True, text=True)
    assert done.returncode == 2
    assert reason in done.stderr
    assert not (tmp_path / "store").exists()
