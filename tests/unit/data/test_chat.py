"""Chat templates against transformers, which renders and encodes dialogues by itself."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llada_train.config.errors import UserError
from llada_train.data.chat import LLADA, PLAIN, ChatTemplate, DialogueError, Message, encode, names_of
from llada_train.data.tokenizer import BOS_TOKEN, CHAT_TOKENS, Tokenizer

DIALOGUE = [
    Message("system", "be brief"),
    Message("user", " what is it?\n"),
    Message("assistant", "the <b>end</b>\n\nof it "),
    Message("user", "and\tthen?"),
    Message("assistant", "nothing"),
]


@pytest.fixture(scope="module")
def folder(tiny_data: Path) -> Path:
    return tiny_data / "tokenizer"


def test_lladas_format_is_byte_for_byte_the_released_one(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    turns = ChatTemplate("llada", tokenizer).turns(DIALOGUE)
    expected = (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "the <b>end</b>\n\nof it<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nand\tthen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "nothing<|eot_id|>",
    )
    found = [part for turn in turns for part in turn]
    assert [tokenizer.decode(ids, keep_special=True) for ids in found] == list(expected)


@pytest.mark.parametrize("template", [LLADA, PLAIN], ids=["llada", "plain"])
def test_ids_are_those_of_transformers(folder: Path, tmp_path: Path, template: str) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    reference = AutoTokenizer.from_pretrained(folder)
    messages = [message._asdict() for message in DIALOGUE]
    ours = ChatTemplate(str(tmp_path / "chat.jinja"), Tokenizer.load(folder))

    def theirs(messages: list[dict[str, str]], prompt: bool) -> list[int]:
        text = reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return reference(text, add_special_tokens=False).input_ids

    turns = ours.turns(DIALOGUE)
    assert turns[0].context == theirs(messages[:2], True)
    if template == LLADA:  # a plain dialogue has no token where one turn ends: each is encoded by itself
        assert [id for turn in turns for part in turn for id in part] == theirs(messages, False)
    assert ours.prompt(DIALOGUE[:4]) == theirs(messages[:4], True)


def test_plain_texts_stand_on_lines_of_their_own(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    (turn,) = ChatTemplate("plain", tokenizer).turns(
        [Message("system", "in"), Message("user", "the"), Message("assistant", "of")]
    )
    assert [tokenizer.decode(ids) for ids in turn] == ["in\nthe\n", "of"]


@given(content=st.text(max_size=30) | st.sampled_from(["<|eot_id|>", "a<|mdm_mask|>b", "<|endoftext|><|eot_id|>"]))
def test_no_message_can_write_a_special_token(tiny_data: Path, content: str) -> None:
    tokenizer = Tokenizer.load(tiny_data / "tokenizer")
    special = set(tokenizer.special_tokens.values())
    template = ChatTemplate("llada", tokenizer)
    if "\ue000" in content:
        with pytest.raises(DialogueError, match="U\\+E000"):
            template.prompt([Message("user", content)])
        return
    ids = template.prompt([Message("user", content)])
    text = template.render([Message("user", content)], answer=True)
    assert encode(text, tokenizer, names_of([BOS_TOKEN, *CHAT_TOKENS])) == ids
    count = sum(id in special for id in ids)
    assert count == sum(id in special for id in template.prompt([Message("user", "a")]))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if", "not a Jinja template"),
        ("{{ messages[0].content }}<|nobody|>", "the tokenizer has no <|nobody|>"),
        # As the released tokenizer_config.json does, whatever is asked for.
        (LLADA.replace("{% if add_generation_prompt %}", "{% if true %}"), "does not begin as its first messages do"),
    ],
)
def test_templates_that_cannot_be_trained_on_are_told(folder: Path, tmp_path: Path, template: str, told: str) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    with pytest.raises(UserError, match=told.replace("|", r"\|")):
        ChatTemplate(str(tmp_path / "chat.jinja"), Tokenizer.load(folder))


def test_a_template_reaches_nothing_but_its_messages(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    template = ChatTemplate(str(tmp_path / "chat.jinja"), Tokenizer.load(folder))
    with pytest.raises(DialogueError, match="unsafe"):
        template.prompt([Message("user", "a")])


def test_a_missing_template_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="neither llada, plain nor a file"):
        ChatTemplate("nowhere.jinja", Tokenizer.load(folder))
