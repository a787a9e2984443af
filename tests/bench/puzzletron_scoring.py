"""Puzzletron's own scoring of variants; runs in an environment of its own, see `environment.py` and `score.py`.

`validate_puzzle_solutions` of the installed ModelOpt is called as its pipeline calls it: it builds a whole model for
each solution from files of sub-blocks, runs it, and compares its predictions with the teacher's. The shim, all of it:

- torch, Transformers and what else ModelOpt needs come from Tessera's environment, so that both compute with the same.
- The package `modelopt.torch.puzzletron` is put in place empty, with its folder as search path, since its own
  `__init__` loads all its stages; and its data loaders, which need `datasets`, are replaced by the batch that Tessera
  scores on.
- There is no CUDA: moving a module there and waiting for it do nothing, the local rank is the CPU.
- Rotary embeddings are made without a device: Transformers 5.19 takes none there.
- Models are float32 instead of bfloat16, which this processor has no fast products of; Tessera's are float32 too.

usage: python puzzletron_scoring.py FOLDER SITE_PACKAGES, with what `score.py` writes in the folder; prints
{"kl": [of each solution], "seconds": [of each, model building and all], "losses_seconds": [forward pass and measures]}
"""

import contextlib
import importlib
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

PACKAGE = "modelopt.torch.puzzletron"


def main() -> None:
    """Convert, score, print."""
    folder = Path(sys.argv[1]).resolve()
    sys.path.append(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):
        answer = score(folder)
    print(json.dumps(answer))  # noqa: T201


def load() -> Any:
    """The module of `validate_puzzle_solutions`, with the shim."""
    import torch

    spec = importlib.util.find_spec("modelopt")
    assert spec is not None
    assert spec.submodule_search_locations
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "torch" / "puzzletron")]
    loaders = types.ModuleType(f"{PACKAGE}.utils.data")
    loaders.create_validation_dataloader = None  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, loaders.__name__: loaders}
    importlib.import_module(f"{PACKAGE}.anymodel.models.llama.llama_model_descriptor")
    validation = importlib.import_module(f"{PACKAGE}.tools.validate_puzzle_with_multi_replacements")

    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda device=None: None
    validation.dist.local_rank = lambda: "cpu"
    sharded: Any = importlib.import_module(f"{PACKAGE}.tools.sharded_checkpoint_utils")
    sharded.SimpleNamespace = lambda **values: types.SimpleNamespace(**{**values, "dtype": torch.float32})
    return validation


def score(folder: Path) -> dict[str, list[float]]:
    """What Puzzletron makes of the variants in the folder."""
    validation = load()
    from safetensors.torch import load_file

    converter = importlib.import_module(f"{PACKAGE}.anymodel.models.llama.llama_converter").LlamaConverter
    descriptor = validation.ModelDescriptorFactory.get("llama")
    teacher = folder / "teacher"
    descriptor.init_rotary_embedding = staticmethod(renew_rotary_embedding)
    converter.convert(descriptor, folder / "parent", teacher)
    block_configs = json.loads((teacher / "config.json").read_text())["block_configs"]
    own = [replacement(layer, config, teacher, teacher) for layer, config in enumerate(block_configs)]
    variants = [
        one_variant(variant, folder, teacher, block_configs)
        for variant in json.loads((folder / "variants.json").read_text())
    ]
    solutions = [
        {"chosen_replacements": [*own[:layer], other, *own[layer + 1 :]]}
        for other in variants
        for layer in other["parent_layer_indices"]
    ]
    (folder / "library.json").write_text(json.dumps([*own, *variants]))
    (folder / "solutions.json").write_text(json.dumps(solutions))

    batch = load_file(folder / "batch.safetensors")
    validation.validate_model.prepare_dataloader = lambda args, tokenizer: [batch]
    losses_s = timed(validation.validate_model, "calculate_losses_pipeline")
    whole_s = timed(validation, "validate_model_with_teacher_similarity_metrics", since_last=True)
    validation.validate_puzzle_solutions(
        types.SimpleNamespace(
            descriptor="llama",
            solutions_path=folder / "solutions.json",
            replacement_library_path=folder / "library.json",
            teacher_dir=teacher,
            output_dir=folder / "validation",
            sort_solutions_by=None,
            bigger_is_better=False,
            solutions_to_validate=None,
            skip_validation=False,
            save_models=False,
            model_name_or_path=None,
            eval_samples=len(batch["input_ids"]),
            micro_batch_size=len(batch["input_ids"]),
            activations_log_dir=None,
            calc_losses_on_cpu=False,
            write_results=False,
        )
    )
    results = [json.loads((folder / "validation" / f"solution_{n}.json").read_text()) for n in range(len(variants))]
    return {
        "kl": [result["kl_div"]["avg"] for result in results],
        "seconds": whole_s[1:],
        "losses_seconds": losses_s[1:],
    }


def renew_rotary_embedding(model: Any, runtime: Any) -> None:
    """What ModelOpt's own does, as this Transformers wants it."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def replacement(layer: int, block_config: Any, attention: Path, ffn: Path) -> dict[str, Any]:
    """A layer as Puzzletron's library has it; no-ops have no weights."""
    files = {"attention": attention, "ffn": ffn}
    return {
        "parent_layer_indices": [layer],
        "child_block_configs": [block_config],
        "weight_paths": [
            str(folder / "subblocks_safetensors" / f"block_{layer}_{part}.safetensors")
            for part, folder in files.items()
            if not block_config[part].get("no_op")
        ],
    }


def one_variant(variant: dict[str, Any], folder: Path, teacher: Path, block_configs: list[Any]) -> dict[str, Any]:
    """A layer of the teacher with one sub-block from the variant's own folder."""
    layer, part, size = variant["layer"], variant["part"], variant["size"]
    name = {"attention": "num_key_value_heads", "ffn": "intermediate_size"}[part]
    config = {
        **block_configs[layer],
        part: {"no_op": True} if size == 0 else {**block_configs[layer][part], name: size},
    }
    folders = {"attention": teacher, "ffn": teacher, part: folder / f"{part}-{size}"}
    for made in folders.values():
        if made != teacher and size:
            (made / "config.json").write_text((teacher / "config.json").read_text())
    return replacement(layer, config, folders["attention"], folders["ffn"])


def timed(module: Any, name: str, *, since_last: bool = False) -> list[float]:
    """CPU seconds of every call of a function from now on; or from the end of the call before."""
    function, seconds, ends = getattr(module, name), [], [time.process_time()]

    def call(*args: Any, **kwargs: Any) -> Any:
        began = ends[-1] if since_last else time.process_time()
        result = function(*args, **kwargs)
        ends.append(time.process_time())
        seconds.append(ends[-1] - began)
        return result

    setattr(module, name, call)
    return seconds


if __name__ == "__main__":
    main()
