"""A bundle that brings its own configuration class."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from components.core.checkpoint import save_model
from components.deploy.standalone import FILE, add_configuration_file
from tests.components.core import tiny_models


def test_transformers_reads_the_bundle_with_the_class_that_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    model = tiny_models.heterogeneous(0)
    save_model(model, tmp_path / "bundle", tokenizer=None)
    before = json.loads((tmp_path / "bundle" / "config.json").read_text())
    add_configuration_file(tmp_path / "bundle")

    config = AutoConfig.from_pretrained(tmp_path / "bundle", trust_remote_code=True)
    assert type(config).__name__ == "DeciLMConfig"
    assert [block.attention.no_op for block in config.block_configs] == [False, True, False, False]
    assert config.block_configs[0].ffn.intermediate_size == 40
    assert config.block_configs[2].ffn.no_op is True
    again = json.loads(config.to_json_string(use_diff=False))
    assert again["block_configs"] == before["block_configs"]
    after = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert after == {**before, "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}}


def test_a_dense_bundle_stays_as_it_is(tmp_path: Path):
    tiny_models.llama(0).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    add_configuration_file(tmp_path)

    assert (tmp_path / "config.json").read_bytes() == before
    assert not (tmp_path / FILE).exists()
