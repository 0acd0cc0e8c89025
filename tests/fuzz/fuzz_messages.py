"""A conversation in JSON to messages, and through a chat template to a prompt."""

from __future__ import annotations

import draw

from triton_repo.runtime.chat import ChatTemplate, read_messages
from triton_repo.runtime.texts import BadRequest

_TEMPLATE = ChatTemplate(
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m.content }}{{ eos }}{% endfor %}<|assistant|>",
    {"eos": "</s>"},
)
SEEDS = [
    b'[{"role": "user", "content": "Is the soup good?"}]',
    b'[{"role":"system","content":"a"},{"role":"user","content":"\\ud83d\\ude00"},{"role":"assistant","content":""}]',
    '[{"role": "user", "content": "국수 어때요? {{ x }}"}]'.encode(),
]
WORDS = [
    *(b'"role"', b'"content"', b'"user"', b'"system"', b'"assistant"', b"null", b"[", b"]", b"{", b"}", b","),
    *(b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"-", b"9" * 30, b"{{", b"{%", b'"tool"', b'"\\"', b"true"),
]


def target(data: bytes) -> None:
    for value in (data, data.decode("utf-8", "replace"), draw.Draw(data).value()):
        try:
            messages = read_messages(value)
            prompt = _TEMPLATE.render(messages)
        except BadRequest as error:
            assert len(str(error)) < 400
            continue
        assert prompt == "".join(f"<|{m['role']}|>{m['content']}</s>" for m in messages) + "<|assistant|>"
