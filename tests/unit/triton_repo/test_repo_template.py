"""Chat templates that would take for ever or all memory end soon, as a refusal; what real ones do goes on."""

from __future__ import annotations

import time

import pytest
from bounded import bounded

from triton_repo.runtime import template
from triton_repo.runtime.chat import MAX_TEMPLATE, ChatTemplate, TemplateRefused
from triton_repo.runtime.texts import BadRequest

MESSAGES = [{"role": "user", "content": "Is the soup good?"}]
_NESTED = "".join(f"{{% for a{depth} in range(99999) %}}" for depth in range(4))
_DOUBLED = (
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = DOUBLE %}{% endfor %}{{ ns.x }}"
)

HOSTILE = {
    "loops in loops": _NESTED + "{% endfor %}" * 4,
    "loops that print": _NESTED + "x" + "{% endfor %}" * 4,
    "calls that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "loops without a call": "{% set r = range(99999) %}"
    + "".join(f"{{% for a{depth} in r %}}" for depth in range(4))
    + "{% endfor %}" * 4,
    "calls without a text": "{% macro f(n) %}{% set a = f(n - 1) if n %}{% set b = f(n - 1) if n %}"
    "{% endmacro %}{% set a = f(60) %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "times": "{{ 'ab' * 10000000000 }}",
    "times a list": "{{ ([1] * 10000000000)|length }}",
    "times in steps": "{{ ('ab' * 99999) * 99999 }}",
    "power": "{{ 10 ** 9999999999 }}",
    "square of squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "plus": _DOUBLED.replace("DOUBLE", "ns.x + ns.x"),
    "tilde": _DOUBLED.replace("DOUBLE", "ns.x ~ ns.x"),
    "join": _DOUBLED.replace("DOUBLE", "[ns.x, ns.x]|join"),
    "join by a method": _DOUBLED.replace("DOUBLE", "ns.x.join(['', '', ''])"),
    "join of escaped": _DOUBLED.replace("DOUBLE", "(ns.x|e).join(['', '', ''])"),
    "replace": _DOUBLED.replace("DOUBLE", "ns.x|replace('a', ns.x)"),
    "replace by a method": _DOUBLED.replace("DOUBLE", "ns.x.replace('a', ns.x)"),
    "replace nothing": "{% set x = 'ab' * 99999 %}{{ x.replace('', x) }}",
    "blocks": _DOUBLED.replace(
        "{% set ns.x = DOUBLE %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ),
    "macros": "{% macro f(n, x) %}{{ f(n - 1, x ~ x) if n else x }}{% endmacro %}{{ f(60, 'ab') }}",
    "lists in lists": _DOUBLED.replace("DOUBLE", "[ns.x, ns.x]"),
    "tuples in dicts": _DOUBLED.replace("DOUBLE", "{'a': (ns.x, ns.x)}"),
    "wide formats": "{{ '%1000000000d' % 1 }}",
    "given widths": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format in format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "justified": "{{ 'a'.ljust(1000000000) }}",
    "indent": "{{ ('a\\n' * 99999)|indent(99999) }}",
    "indent by text": "{{ ('a\\n' * 99999)|indent('a' * 99999) }}",
    "indented json": "{{ [[1]]|tojson(indent=1000000000) }}",
    "separated json": "{{ range(99999)|list|tojson(separators=('a' * 99999, '')) }}",
    "slices": "{{ [1]|slice(1000000000)|list }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "sum of lists": "{{ [[1]]|sum(start=[]) }}",
    "translate": "{{ 'a'.translate({97: 'b' * 99999}) }}",
    "bytes": "{{ 'a'.encode() * 1000000000 }}",
    "a constant": "{% if 'a' * 9999999999 == 'b' %}{% endif %}",
    "many constants": "{{ 'a'" + " ~ 'a' * 99999" * 2000 + " }}",
    "lorem": "{{ lipsum(1000000000) }}",
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> float:
    """So that a suite need not wait for the whole of it."""
    monkeypatch.setattr(template, "MAX_SECONDS", 0.4)
    return 0.4


def rendered(source: str) -> str:
    return ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon(name: str, short: float) -> None:
    started = time.monotonic()
    with pytest.raises(
        BadRequest, match=r"^the model's chat template (refuses|fails on) 'messages'"
    ) as found:
        bounded(rendered, HOSTILE[name])
    # Before memory ends, not because it did.
    assert "MemoryError" not in str(found.value)
    # Far more than it takes, for a machine that does much else.
    assert time.monotonic() - started < short + 10


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("(" * 5000 + ")" * 5000, None),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "no valid template"),
        ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "no valid template"),
        ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursive loops"),
        ("a" * (MAX_TEMPLATE + 1), r"has 262,145 characters, more than 262,144"),
        ("{% include 'other' %}", None),
        ("{{ 'a'|pprint }}", "no valid template: .*pprint"),
    ],
)
def test_templates_of_any_form_are_read_or_refused(source: str, reason: str | None) -> None:
    if reason is None:
        try:
            bounded(rendered, source)
        except BadRequest:
            return
        return
    with pytest.raises(TemplateRefused, match=reason):
        bounded(rendered, source)


def test_a_bound_is_for_each_rendering_not_for_all(short: float) -> None:
    chat = ChatTemplate("{% for a in range(3000) %}{{ a }}{% endfor %}", {})
    ended = time.monotonic() + short + 0.2
    while time.monotonic() < ended:
        assert len(chat.render(MESSAGES)) == 10_890


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content.replace('soup', 'x' * 3) }}", "Is the xxx good?"),
        ("{{ 'abc'.upper() ~ 1 ~ ['a', 2] }}", "ABC1['a', 2]"),
        ("{{ '%05.1f|%s' % (2.25, 'a') }}{{ '{:>5}'.format('a') }}", "002.2|a    a"),
        (
            "{% for a in [1, 2] %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}",
            "1/2,2/2",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        (
            "{% set n = namespace(l=[]) %}{% for a in [0, 1, 2] %}{% set n.l = n.l + [a] %}{% endfor %}"
            "{{ n.l }}",
            "[0, 1, 2]",
        ),
        ("{{ [3, 1]|sort|join('-') }}{{ [1, 2]|sum }}{{ ('a', 'b')|join }}", "1-33ab"),
        ("{{ messages|map(attribute='content')|list|tojson(indent=1) }}", '[\n "Is the soup good?"\n]'),
        # What it holds is not printed: sixty that hold each the one before twice would never end.
        (
            "{% set n0 = namespace() %}"
            + "".join(f"{{% set n{n + 1} = namespace(x=n{n}, y=n{n}) %}}" for n in range(60))
            + "{{ n60 }}",
            "<Namespace>",
        ),
        ("{{ 'a\\nb'|indent(2) }}{{ 2 ** 10 }}{{ 'ab'[::-1] }}", "a\n  b1024ba"),
    ],
)
def test_what_templates_do_is_as_in_jinja(source: str, expected: str) -> None:
    assert rendered(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no: ' ~ messages[0].content) }}",
        "{{ raise_exception(messages[0].content[4:11]) }}",
        "{{ {}[messages[0].content].x }}",
        "{{ messages[0].content|int(0) / 0 ~ messages[0].content.index('zzz') }}",
        "{{ dict(messages[0].content) }}",
        "{{ range(messages[0].content) }}",
    ],
)
def test_a_refusal_never_repeats_a_text(source: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        rendered(source)
    assert not {"soup", "good", "the s"} & {
        word for word in ("soup", "good", "the s") if word in str(refusal.value)
    }


def test_a_refusal_in_the_templates_own_words_is_passed_on() -> None:
    with pytest.raises(BadRequest, match="refuses 'messages': no soup is served"):
        rendered("{{ raise_exception('no soup is served') }}")
