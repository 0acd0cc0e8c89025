"""Chat templates of anybody: compiled and rendered, or refused, within their time and size."""

from __future__ import annotations

from unittest import mock

from triton_repo.runtime import template
from triton_repo.runtime.chat import ChatTemplate, TemplateRefused
from triton_repo.runtime.texts import BadRequest

INSTRUMENT = ("jinja2",)
_MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is the soup good?\n"}]
SEEDS = [
    b"{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{% endfor %}",
    b"{%- set ns = namespace(x='a') -%}{% for i in range(9) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    b"{% macro f(n, x) %}{{ f(n - 1, x + x) if n else x }}{% endmacro %}{{ f(9, 'ab') }}",
    b"{{ [1, 2]|map('string')|join(',') }}{{ {'a': (1, 2)}|tojson(indent=2) }}{{ 'a'.join(['b'] * 3) }}",
    b"{{ '%5s|%d' % ('a', 3) }}{{ '{:>5}'.format('a') }}{{ 'abc'|replace('b', 'x')|indent(4)|center(20) }}",
    b"{% set x %}{{ messages|length }}{% endset %}{{ x * 3 }}{% generation %}{{ 2 ** 9 }}{% endgeneration %}",
    b"{% call(y) g() %}{{ y }}{% endcall %}{% macro g() %}{{ caller(5) }}{% endmacro %}",
    b"{% block a %}{{ self.a() }}{% endblock %}{{ messages[0].content[::-1].split('i')|list }}",
]
WORDS = [
    *(
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"for ",
        b" in ",
        b"endfor",
        b"set ",
        b"ns.x",
        b"range(",
        b"99999",
        b"|",
        b" ~ ",
    ),
    *(
        b" * ",
        b" ** ",
        b" + ",
        b" % ",
        b"if ",
        b"else",
        b"endif",
        b"macro ",
        b"endmacro",
        b"namespace(",
        b"dict(",
    ),
    *(
        b"join(",
        b"replace(",
        b"format(",
        b"indent(",
        b"center(",
        b"ljust(",
        b"tojson(",
        b"list",
        b"sum(start=[])",
    ),
    *(
        b"batch(",
        b"slice(",
        b"groupby(",
        b"map(",
        b"select(",
        b"attr(",
        b"__class__",
        b"messages",
        b"strftime_now(",
    ),
    *(
        b"raise_exception(",
        b"recursive",
        b"loop(",
        b"loop.",
        b"filter ",
        b"endfilter",
        b"[::",
        b"]",
        b"(",
        b")",
        b"'",
    ),
    *(
        b"splitlines()",
        b"zfill(",
        b"cycle(",
        b"items()",
        b"unique",
        b"sort",
        b"string",
        b"safe",
        b"e",
        b"~ns.x",
    ),
]


# What takes longer than 2 s is a finding, so that the bound must be below.
_SECONDS = 0.5


def target(data: bytes) -> None:
    try:
        made = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>"})
    except TemplateRefused:
        return
    with mock.patch.object(template, "MAX_SECONDS", _SECONDS):
        try:
            prompt = made.render(_MESSAGES)
        except BadRequest:
            return
    assert len(prompt) <= template.MAX_SIZE
