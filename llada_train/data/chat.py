"""Dialogues as text and tokens: LLaDA's chat template, or another one as Jinja, in a sandbox.

A dialogue is rendered as a whole, so that a template may do with it what it likes, and then cut at the special tokens
that the template wrote. What lies between them is encoded as text, as transformers does it; the name of a special token
inside a message is text, too, and never becomes the token.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada_train.config.errors import UserError
from llada_train.data.tokenizer import Tokenizer

# The released models' format (tokenizer_config.json of LLaDA-8B-Instruct), which writes the assistant's header at the
# end of any dialogue; here it is left to who renders, since a text to train on has none there.
LLADA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# For models that were not trained on chat tokens.
PLAIN = (
    # Not a newline as it stands: it would be trimmed, since a block comes before it.
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"llada": LLADA, "plain": PLAIN}

_GUARD = "\ue000"  # of Unicode's private use area: put into the names of special tokens that a message holds


class Message(NamedTuple):
    role: str
    content: str


class Turn(NamedTuple):
    """What comes after the turn before, and what is answered to it."""

    context: list[int]  # token ids
    response: list[int]


class DialogueError(Exception):
    """Why a dialogue cannot be trained on."""


def template_source(name: str) -> str:
    """The Jinja text of "llada", "plain", or a file; Jinja text is its own.

    Raises:
        UserError: there is no such file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{{" in name or "{%" in name:
        return name
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known, reason = ", ".join(TEMPLATES), getattr(error, "strerror", None) or "not valid UTF-8"
        raise UserError(f"sft.chat_template {name}: neither {known} nor a file that can be read: {reason}") from None


def names_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """What finds the tokens' names in a text; the longest, where one is the beginning of another."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def encode(text: str, tokenizer: Tokenizer, special: re.Pattern[str]) -> list[int]:
    """Token ids of text in which the names of `special` tokens, but for those inside messages, are the tokens."""
    ids: list[int] = []
    start = 0
    for found in special.finditer(text):
        ids += _text_ids(text[start : found.start()], tokenizer)
        ids.append(tokenizer.special_tokens[found[0]])
        start = found.end()
    return ids + _text_ids(text[start:], tokenizer)


def _text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_batch([text.replace(_GUARD, "")])[0] if text else []


def prompt_ids(prompts: Sequence[str], tokenizer: Tokenizer, template: str | None) -> list[list[int]]:
    """Token ids of each prompt, as a user's message in a chat template, or as plain text (None).

    Raises:
        UserError: as of ChatTemplate, or the template refuses it.
    """
    if template is None:
        return [tokenizer.encode_batch([prompt])[0] if prompt else [] for prompt in prompts]
    chat = ChatTemplate(template, tokenizer)
    try:
        return [chat.prompt([Message("user", prompt)]) for prompt in prompts]
    except DialogueError as error:
        raise UserError(f"a prompt: {error}") from None


class ChatTemplate:
    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        """
        Raises:
            UserError: there is no such template, it is not Jinja, or the tokenizer lacks a special token of it.
        """
        self.source = template_source(name)
        name = "as given" if name == self.source else name
        self._name, self._tokenizer = name, tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers reads them
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(f"sft.chat_template {name}: not a Jinja template: {error}") from None
        self._special = names_of(tokenizer.special_tokens)
        written = dict.fromkeys(re.findall(r"<\|\w+\|>", self.source))
        if missing := [token for token in written if token not in tokenizer.special_tokens]:
            raise UserError(
                f"chat template {name}: the tokenizer has no {', '.join(missing)}; give one that has "
                "(llada-data train-tokenizer makes such), or another template"
            )
        with suppress(DialogueError):  # one that takes no such dialogue is asked with the first that it takes
            self.turns([Message(role, role) for role in ("user", "assistant") * 2])

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """A dialogue, turn by turn: all contexts and responses one after another are its tokens, without a last EOS.

        Raises:
            DialogueError: it has no turn, or the template refuses it.
            UserError: the template does not render a dialogue's beginning as the beginning of the dialogue.
        """
        turns, done = [], ""
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            context = self.render(messages[:i], answer=True)
            whole = self.render(messages[: i + 1], answer=False)
            if not (context.startswith(done) and whole.startswith(context)):
                raise UserError(
                    f"sft.chat_template {self._name}: a dialogue does not begin as its first messages do; the "
                    "assistant's header has to be written where `add_generation_prompt` is true, and only there"
                )
            turns.append(Turn(self._encode(context[len(done) :]), self._encode(whole[len(context) :])))
            done = whole
        return turns

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue that the assistant is to go on with."""
        return self._encode(self.render(messages, answer=True))

    def render(self, messages: Sequence[Message], answer: bool) -> str:
        """The dialogue as text for `encode`; `answer`: with what begins an answer to come.

        Raises:
            DialogueError: the template refuses it.
        """
        guarded: list[dict[str, Any]] = [
            {"role": role, "content": self._special.sub(lambda found: found[0][0] + _GUARD + found[0][1:], content)}
            for role, content in messages
        ]
        if any(_GUARD in content for _, content in messages):
            raise DialogueError("holds the character U+E000, which is for private use")
        tokenizer = self._tokenizer
        bos = tokenizer.bos_token if tokenizer.bos_token in tokenizer.special_tokens else ""
        try:
            return self._template.render(
                messages=guarded, add_generation_prompt=answer, bos_token=bos, eos_token=tokenizer.eos_token
            )
        except jinja2.TemplateError as error:
            raise DialogueError(f"the chat template refuses it: {error}") from None

    def _encode(self, text: str) -> list[int]:
        return encode(text, self._tokenizer, self._special)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
