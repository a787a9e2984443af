"""Chat templates with a switch for detailed thinking: that of a user's tokenizer, or Tessera's own.

Source: arXiv 2505.00949, section 4, and the model cards' chat template.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError

from components.core.text.toggle import END_THINK, THINK, system_message
from components.core.text.tokenizer_files import CHAT_TEMPLATE, SETTINGS, read_settings, token_text

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
TOGGLE = Path(__file__).with_name("thinking_toggle.jinja").read_text(encoding="utf-8")
"""Jinja that stands before a template: it puts the switch into the messages, and cuts thoughts of past answers."""
OWN = TOGGLE + Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
"""Tessera's template, for tokenizers that have none; it needs the role tokens."""

Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and what it may insert.

    Attributes:
        source: Jinja.
        tokens: texts of the tokenizer's special tokens by their names in templates, such as `eos_token`.
    """

    source: str
    tokens: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """The template of a tokenizer folder, from whichever file transformers reads it; None if it has none."""
        if not (folder / SETTINGS).is_file():
            return None
        settings = read_settings(folder)
        source = template_source(folder, settings)
        return None if source is None else cls(source, special_tokens(settings))

    def render(self, chats: Sequence[Chat], *, add_generation_prompt: bool = False) -> list[str]:
        """The text of each chat.

        Args:
            chats: messages with role and content.
            add_generation_prompt: end the text where an answer of the assistant begins.

        Raises:
            jinja2.TemplateError: the template refuses a chat.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {**self.tokens, "add_generation_prompt": add_generation_prompt}
        conversations: Any = [list(chat) for chat in chats]  # its type hints allow fewer kinds of messages
        rendered: Any = render_jinja_template(conversations, chat_template=self.source, **options)
        return list(rendered[0])

    def with_toggle(self) -> "ChatTemplate":
        """This template behind the switch."""
        return self if self.source.startswith(TOGGLE) else ChatTemplate(TOGGLE + self.source, self.tokens)

    def defect(self) -> str | None:
        """Why chats of both modes cannot be trained with this template, which has the switch; None if they can."""
        try:
            return next((why for mode in ("on", "off") for chat in _probes(mode) if (why := self._fault(chat))), None)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            return f"it refuses a system message ({error})"

    def _fault(self, chat: Chat) -> str | None:
        """What is wrong with the text of a chat that ends with an answer."""
        (prompt,), (whole,) = self.render([chat[:-1]], add_generation_prompt=True), self.render([chat])
        if chat[0]["content"] not in prompt:
            return "it leaves the system message out"
        if not whole.startswith(prompt):
            return "its prompt is not the beginning of the chat with its answer"
        if chat[-1]["content"] not in whole[len(prompt) :]:
            return "it changes an answer that has its thinking before it"
        return None

    def end_of_turn(self, special: Collection[str]) -> str | None:
        """The first of the special tokens that follows an answer; None if none does."""
        *_, chat = _probes("on")
        (whole,) = self.render([chat])
        rest = whole.rpartition(str(chat[-1]["content"]))[2]
        found = [(rest.index(token), -len(token), token) for token in special if token and token in rest]
        return min(found)[2] if found else None


def _probes(mode: str) -> list[Chat]:
    """A chat of one turn and one of two; the last answer has its thinking before it."""
    first = [system_message(mode), {"role": "user", "content": "How many are two?"}]
    second = [*first, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "And three?"}]
    answer = {"role": "assistant", "content": f"{THINK}I count them.{END_THINK}Three."}
    return [[*first, answer], [*second, answer]]


def own_template(tokens: Mapping[str, str], beginning: str) -> ChatTemplate:
    """Tessera's template for a tokenizer; each text begins with `beginning`, the parent's token for that."""
    first = f"{{{{- {json.dumps(beginning, ensure_ascii=False)} -}}}}" if beginning else ""
    return ChatTemplate(TOGGLE + first + OWN.removeprefix(TOGGLE), tokens)


def template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The Jinja of a tokenizer folder: a file of its own, else the default among those in the settings."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found.strip() else None


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens that the settings name, such as `eos_token`."""
    return {
        name: token_text(token)
        for name, token in settings.items()
        if name.endswith("_token") and token and isinstance(token, str | dict)
    }
