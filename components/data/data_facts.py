"""What is known of a user's data before a run: counts, and lengths in the parent's tokens. Imports no torch."""

from pydantic import Field

from components.core.base.config import Config


class CorpusFacts(Config):
    """Text to train and to search on."""

    tokens: int = Field(gt=0)
    """Tokens of all documents; estimated from the first ones where there is much text."""
    estimated: bool
    """Whether it is an estimate."""
    document_tokens: int = Field(gt=0)
    """99th percentile of the tokens of a document."""


class ChatFacts(Config):
    """Chats of both modes."""

    num_chats: int = Field(gt=0)
    """Chats."""
    num_thinking: int = Field(ge=0)
    """Those whose answer has its thinking before it."""
    tokens: int = Field(gt=0)
    """Tokens of all chats."""
    chat_tokens: int = Field(gt=0)
    """99th percentile of the tokens of a chat."""
    longest_chat: int = Field(gt=0)
    """Tokens of the longest chat."""
    answer_tokens: int = Field(gt=0)
    """99th percentile of the tokens of a last answer, with its thinking and its end token."""


class ProblemFacts(Config):
    """Problems with answers."""

    num_problems: int = Field(gt=0)
    """Problems."""
    prompt_tokens: int = Field(gt=0)
    """99th percentile of the tokens of a prompt: a problem as a chat, up to where the answer begins."""
    question: str
    """A short one, for a smoke test."""


class DataFacts(Config):
    """What the user has given; None of the rest."""

    corpus: CorpusFacts | None = None
    """Text."""
    chats: ChatFacts | None = None
    """Chats."""
    problems: ProblemFacts | None = None
    """Problems."""
