"""A parent's own chat template carries the switch; one that cannot is replaced. Templates of the kinds that are met."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from components.core.text.chat import encode_chats, prompt_ids
from components.core.text.corpus.encoding import load_corpus
from components.core.text.toggle import END_THINK, THINK, system_message
from components.core.text.toggle_template import OWN, ChatTemplate
from components.core.text.tokenizer import add_toggle, beginning_ids, plain_prompt_ids
from components.core.text.tokenizer_files import document_end, read_settings
from tests.components.conftest import write_rows

CHATML = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a model of a lab.<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
NO_SYSTEM = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}
{%- if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}
{%- endfor %}"""
CUTS_THOUGHTS = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
THINKS_FIRST = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}")
SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
)
HEADER_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS = sorted("detailed thinking on off system user assistant You are a model of lab 7 + 5 = 2 be kind I add".split())


def tokenizer_folder(
    folder: Path, template: str | None, *, eos: str, bos: str | None = None, post: bool = False
) -> Path:
    """A word tokenizer with the special tokens of several families."""
    special = [*SPECIAL, *HEADER_TOKENS] if template != CHATML else list(SPECIAL)
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if post and bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
        )
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": bos,
        "chat_template": template,
    }
    text = json.dumps({key: value for key, value in settings.items() if value is not None})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def chat(mode: str, *, extra: str = "") -> list[dict[str, str]]:
    thought = f"{THINK}7 + 5 = 2{END_THINK}" if mode == "on" else ""
    first = system_message(mode)
    first["content"] += f"\n{extra}" if extra else ""
    return [first, {"role": "user", "content": "7 + 5"}, {"role": "assistant", "content": f"{thought}2"}]


@pytest.mark.parametrize(
    ("template", "eos", "bos", "end"),
    [(CHATML, "<|im_end|>", None, "<|im_end|>"), (HEADERS, "<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>")],
)
def test_a_parent_keeps_its_template_and_its_roles(tmp_path, template, eos, bos, end):
    own = tokenizer_folder(tmp_path / "own", template, eos=eos, bos=bos)
    before: Any = AutoTokenizer.from_pretrained(own)
    toggled = add_toggle(own, tmp_path / "out")
    after: Any = AutoTokenizer.from_pretrained(tmp_path / "out")

    assert toggled.replaced is None
    assert set(after.get_vocab()) - set(before.get_vocab()) == {THINK, END_THINK}
    assert after.eos_token == end
    for mode in ("on", "off"):
        messages = chat(mode, extra="be kind")
        text = before.apply_chat_template(messages, tokenize=False)
        assert after.apply_chat_template(messages, tokenize=False) == text
        example = encode_chats([{"messages": messages}], tmp_path / "out")[0]
        whole = after(text.rstrip("\n"), add_special_tokens=False).input_ids
        assert list(example.token_ids) == whole
        answer = [token for token, counts in zip(example.token_ids, example.counts, strict=True) if counts]
        assert after.convert_ids_to_tokens(answer)[-1] == end
        assert (THINK in after.convert_ids_to_tokens(answer)) == (mode == "on")
        (prompt,) = prompt_ids(tmp_path / "out", ["7 + 5"], mode)
        asked = after.apply_chat_template([system_message(mode), messages[1]], add_generation_prompt=True)
        assert prompt == list(asked["input_ids"])


def test_without_a_system_message_thinking_is_on_and_an_argument_switches(tmp_path):
    add_toggle(tokenizer_folder(tmp_path / "own", CHATML, eos="<|im_end|>"), tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "7 + 5"}]

    def text(messages: list[dict[str, str]], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    assert text(question).startswith("<|im_start|>system\ndetailed thinking on<|im_end|>\n<|im_start|>user\n7 + 5")
    assert "detailed thinking off<|im_end|>" in text(question, detailed_thinking=False)
    assert "detailed thinking off<|im_end|>" in text(question, default_thinking="off")
    asked = [{"role": "system", "content": "detailed thinking on"}, *question]
    assert "detailed thinking on<|im_end|>" in text(asked, default_thinking="off")
    kind = [{"role": "system", "content": "be kind"}, *question]
    assert "detailed thinking on\nbe kind<|im_end|>" in text(kind)
    past = [*chat("on"), {"role": "user", "content": "be kind"}]
    assert "7 + 5 = 2" not in text(past)
    assert "<|im_start|>assistant\n2<|im_end|>" in text(past)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (NO_SYSTEM, "it refuses a system message (Only user and assistant roles are supported!)"),
        (CUTS_THOUGHTS, "it changes an answer that has its thinking before it"),
        (THINKS_FIRST, "its prompt is not the beginning of the chat with its answer"),
        ("{{ messages[-1]['content'] }}", "it leaves the system message out"),
        (
            "{% for m in messages %}{{ m.wrong.deeper }}{% endfor %}",
            "it refuses a system message ('dict object' has no",
        ),
    ],
)
def test_a_template_that_cannot_carry_the_switch_is_replaced_and_the_reason_is_told(tmp_path, template, why):
    own = tokenizer_folder(tmp_path / "own", template, eos="</s>", bos="<s>", post=True)
    toggled = add_toggle(own, tmp_path / "out")

    assert toggled.replaced is not None
    assert toggled.replaced.startswith(why)
    (prompt,) = prompt_ids(tmp_path / "out", ["7 + 5"], "on")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens(prompt)  # type: ignore[no-untyped-call]
    assert tokens == [*"<s> <|system|> detailed thinking on </s> <|user|> 7 + 5 </s> <|assistant|>".split()]


def test_named_templates_have_a_default_and_a_file_wins(tmp_path):
    own = tokenizer_folder(tmp_path / "own", CHATML, eos="<|im_end|>")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    found = ChatTemplate.of(own)
    assert found is not None
    assert found.source == CHATML
    (own / "chat_template.jinja").write_text(HEADERS)
    found = ChatTemplate.of(own)
    assert found is not None
    assert found.source == HEADERS


def test_a_base_model_has_no_template(tmp_path):
    own = tokenizer_folder(tmp_path / "own", None, eos="</s>")
    assert ChatTemplate.of(own) is None
    assert add_toggle(own, tmp_path / "out").replaced is None
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == OWN


@pytest.mark.parametrize(
    ("eos", "template", "end"),
    [
        ("<|im_end|>", CHATML, "<|endoftext|>"),
        ("<|eot_id|>", HEADERS, "<|endoftext|>"),
        ("</s>", NO_SYSTEM, "</s>"),
        ("<|end_of_text|>", None, "<|end_of_text|>"),
    ],
)
def test_documents_end_as_in_pretraining_and_not_as_turns_do(tmp_path, eos, template, end):
    own = tokenizer_folder(tmp_path / "own", template, eos=eos)
    write_rows(tmp_path / "train.jsonl", [{"text": "be kind"}])
    (example,) = load_corpus(tmp_path, own, "train")

    assert document_end(own) == end
    assert tokens_of(own, list(example.token_ids)) == ["be", "kind", end]


@pytest.mark.parametrize(
    ("post", "adds", "begins"), [(True, None, True), (False, None, False), (False, True, True), (True, False, False)]
)
def test_documents_and_plain_prompts_begin_as_in_pretraining(tmp_path, post, adds, begins):
    own = tokenizer_folder(tmp_path / "own", None, eos="</s>", bos="<s>", post=post)
    if adds is not None:
        settings = json.loads((own / "tokenizer_config.json").read_text())
        (own / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": adds}))
    write_rows(tmp_path / "train.jsonl", [{"text": "be kind"}, {"prompt": "7 + 5 =", "completion": "2"}])
    text, pair = load_corpus(tmp_path, own, "train")
    first = ["<s>"] if begins else []

    assert tokens_of(own, list(text.token_ids)) == [*first, "be", "kind", "</s>"]
    assert tokens_of(own, list(pair.token_ids)) == [*first, "7", "+", "5", "=", "2", "</s>"]
    assert list(pair.counts) == [False] * (len(first) + 4) + [True, True]
    assert tokens_of(own, plain_prompt_ids(own, ["7 + 5 ="])[0]) == [*first, "7", "+", "5", "="]
    core = Tokenizer.from_file(str(own / "tokenizer.json"))
    assert len(beginning_ids(core, read_settings(own))) == len(first)


def tokens_of(folder: Path, ids: list[int]) -> list[str | None]:
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [core.id_to_token(number) for number in ids]
