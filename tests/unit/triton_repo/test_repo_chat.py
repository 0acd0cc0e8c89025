"""Chat templates: rendered and tokenized as Transformers does it, and bad messages refused by name."""

from __future__ import annotations

import datetime
import json
from typing import Any

import llm_tokenizers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_repo.runtime.chat import MAX_MESSAGES, ChatTemplate, TemplateRefused, read_messages
from triton_repo.runtime.texts import BadRequest

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# After the templates of these families, with what is peculiar to each.
TEMPLATES = {
    "llama-3": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("not here") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "qwen-2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "eeve": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"""
    """{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"""
    """{% set system_message = 'A chat between a curious user and an artificial intelligence assistant.' %}"""
    """{% endif %}{{ system_message }}
{% for message in loop_messages %}{% if message['role'] == 'user' %}{{ '\\nHuman: ' + message['content'] }}
{% else %}{{ '\\nAssistant: ' + message['content'] + eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\nAssistant: ' }}{% endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}{{- " " + message["content"]|trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}"""
    """{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"""
    """{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"""
    """{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"""
    """{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"""
    """{% set role = message['role'] %}{% endif %}"""
    """{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"""
    """{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "loops": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
    {{ m | tojson(indent=2) }} {{ {'<&>': m.content} | tojson }}
    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% generation %}{% set inner = 'kept inside' %}{{ inner }}{% endgeneration %}{{ inner is defined }}""",
}
CHATS = {
    "one": [("user", "국수 어때요?")],
    "system": [("system", "  짧게 답하세요.\n"), ("user", "Were the noodles good? <b>&'\"")],
    "turns": [("user", "맛있어요?"), ("assistant", " 네, 맛있어요.\n"), ("user", "배송은요?")],
    "all": [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")],
    "two users": [("user", "a"), ("user", "b 👍🏽")],
}


def messages_of(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=llm_tokenizers.byte_level(), **TOKENS)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_are_those_of_transformers(reference: Any, family: str, chat: str) -> None:
    from jinja2 import TemplateError

    messages = messages_of(CHATS[chat])
    template = ChatTemplate(TEMPLATES[family], TOKENS)
    reference.chat_template = TEMPLATES[family]
    try:
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        with pytest.raises(BadRequest, match=f"template refuses 'messages': {error}"):
            template.render(messages)
        return
    mine = template.render(messages)
    assert mine == expected
    ids = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert llm_tokenizers.byte_level().encode(mine, add_special_tokens=False).ids == ids


def test_some_chats_are_refused_by_templates() -> None:
    """So that the test above compares refusals too."""
    gemma = ChatTemplate(TEMPLATES["gemma"], TOKENS)
    with pytest.raises(BadRequest, match="System role not supported"):
        gemma.render(messages_of(CHATS["system"]))
    with pytest.raises(BadRequest, match="must alternate"):
        gemma.render(messages_of(CHATS["two users"]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=20)), min_size=1, max_size=5)
)
def test_contents_are_text_and_nothing_else(chat: list[tuple[str, str]]) -> None:
    """What looks like a template in a message stays as it is."""
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}", TOKENS)
    prompt = template.render(messages_of([*chat, ("user", "{{ 7 * 7 }}{% raw %}")]))
    assert prompt == "".join(f"[{role}|{content}]" for role, content in chat) + "[user|{{ 7 * 7 }}{% raw %}]"


def test_the_date_is_todays() -> None:
    prompt = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render(messages_of(CHATS["one"]))
    assert abs(datetime.date.fromisoformat(prompt) - datetime.date.today()).days <= 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.json }}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_private=1) }}",
        "{{ dict.mro() }}",
        "{% for a in range(10000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ undefined.field }}",
    ],
)
def test_templates_run_in_a_sandbox(source: str) -> None:
    with pytest.raises(BadRequest, match=r"the model's chat template (refuses|fails on) 'messages'"):
        ChatTemplate(source, {}).render(messages_of(CHATS["one"]))


def test_what_is_no_template_is_refused_at_once() -> None:
    with pytest.raises(TemplateRefused, match=r"no valid template: .*endfor"):
        ChatTemplate("{% for message in messages %}", {})


def test_messages_from_json_and_from_objects() -> None:
    messages = messages_of(CHATS["system"])
    encoded = json.dumps(messages, ensure_ascii=False)
    assert read_messages(messages) == read_messages(encoded) == read_messages(encoded.encode()) == messages


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"[]", "'messages' is empty"),
        ([], "'messages' is empty"),
        ("{}", "'messages' is an object, not a list"),
        ("null", "'messages' is null"),
        ("[1", "'messages' is not JSON: .*column 3"),
        ("[" * 100_000, "'messages' is not JSON"),
        (b'[{"role": "user", "content": "\xff"}]', "'messages' is not valid UTF-8 .byte 0xff at 30"),
        (
            '[{"role":"user","content":"a\\ud800"}]',
            "'messages' 0 is not valid Unicode .lone surrogate U.D800 at 1",
        ),
        (["hello"], "'messages' 0 is a text, not an object with 'role' and 'content'"),
        ([{"role": "user"}], "'messages' 0 has no 'content'"),
        ([{"content": "a"}], "'messages' 0 has no 'role'"),
        (
            [{"role": "robot", "content": "a"}],
            "'messages' 0 has the unknown role 'robot'; known are system, user",
        ),
        ([{"role": ["user"], "content": "a"}], "unknown role"),
        ([{"role": "user", "content": "a", "name": "b"}], "'messages' 0 has the unknown field 'name'"),
        ([{"role": "user", "content": None}], "'messages' 0: 'content' is null, not a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'messages' 0: 'content' is a list, not a text"),
        ([{"role": "user", "content": 5}], "'content' is a number"),
        (
            messages_of([("system", "a"), ("system", "b"), ("user", "c")]),
            "'messages' has 2 system messages; put them into one",
        ),
        (
            messages_of([("user", "a"), ("system", "b")]),
            "'messages' 1 is the system message; it must be the first",
        ),
        (messages_of([("user", "a")] * (MAX_MESSAGES + 1)), "'messages' has 1025 messages; at most 1024"),
        (messages_of([("user", "a" * 600_000)] * 2), "'messages' have 1200000 characters; at most 1000000"),
        (5, "'messages' is a number"),
    ],
)
def test_bad_messages_are_named(value: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read_messages(value)


@pytest.mark.parametrize("wrong", [{"role": "x" * 10_000}, {"x" * 10_000: "a"}])
def test_a_refusal_does_not_repeat_a_long_text(wrong: dict[str, str]) -> None:
    with pytest.raises(BadRequest) as refusal:
        read_messages([{"role": "user", "content": "a"} | wrong])
    assert len(str(refusal.value)) < 200
