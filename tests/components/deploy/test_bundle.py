"""A bundle that brings its own configuration class."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.core.base.errors import CheckpointError
from components.core.model.checkpoint import save_model
from components.deploy.bundle import FILE, add_configuration_file
from tests.components.core import tiny_models

WITHOUT_TESSERA = """
import json, sys
sys.modules["components"] = None
from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps({
    "class": type(config).__name__,
    "no_op": [block.attention.no_op for block in config.block_configs],
    "width": config.block_configs[0].ffn.intermediate_size,
    "again": json.loads(config.to_json_string(use_diff=False))["block_configs"],
}))
"""
"""A program of its own: where our configuration class is registered, transformers takes that one."""


def test_transformers_reads_the_bundle_with_the_class_that_lies_in_it(tmp_path: Path):
    save_model(tiny_models.heterogeneous(0), tmp_path / "bundle", tokenizer=None)
    before = json.loads((tmp_path / "bundle" / "config.json").read_text())
    add_configuration_file(tmp_path / "bundle")

    command = [sys.executable, "-c", WITHOUT_TESSERA, str(tmp_path / "bundle")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read == {
        "class": "DeciLMConfig",
        "no_op": [False, True, False, False],
        "width": 40,
        "again": before["block_configs"],
    }
    after = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert after == {**before, "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}}


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [([(4, 40), (2, "linear")], "layer 1 has a linear part"), ([(None, 40), (2, 40)], "the first layer has no att")],
)
def test_what_only_tessera_runs_is_refused(tmp_path: Path, shapes: tiny_models.Shapes, reason: str):
    save_model(tiny_models.heterogeneous(0, shapes), tmp_path / "bundle", tokenizer=None)
    with pytest.raises(CheckpointError, match=reason):
        add_configuration_file(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / FILE).exists()


def test_a_dense_bundle_stays_as_it_is(tmp_path: Path):
    tiny_models.llama(0).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    add_configuration_file(tmp_path)

    assert (tmp_path / "config.json").read_bytes() == before
    assert not (tmp_path / FILE).exists()
