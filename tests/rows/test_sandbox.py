"""Chat templates end, in bounded time and memory, and ordinary ones are rendered as jinja renders them."""

from __future__ import annotations

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tell.rows.sandbox import BoundedEnvironment, Exceeded

DOUBLED = "{% set n = namespace(s=START) %}{% for i in range(60) %}{% set n.s = MORE %}{% endfor %}{{ n.s }}"
LARGE = "{% set x, z = [1] * 300000, [1] * 300000 %}{% for i in range(1000) %}DONE{% endfor %}"
NESTED = (
    "{% set n, m = namespace(s=[1], t=(1,)), namespace(s=[1]) %}{% for i in range(25) %}"
    "{% set n.s = [n.s, n.s] %}{% set m.s = [m.s, m.s] %}{% set n.t = (n.t, n.t) %}{% endfor %}{{ DONE }}"
)
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops without a round": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops of a filter": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "much plain text": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ (10 ** 100) ** (10 ** 100) }}",
    "a factorial": "{% set n = namespace(x=1) %}{% for i in range(9999) %}{% set n.x = n.x * 99999 %}{% endfor %}",
    "a text times": "{{ 'x' * 10 ** 10 }}",
    "a list times": "{{ [1] * 10 ** 10 }}",
    "doubling by ~": DOUBLED.replace("START", "'x'").replace("MORE", "n.s ~ n.s"),
    "doubling by +": DOUBLED.replace("START", "'x'").replace("MORE", "n.s + n.s"),
    "doubling by join": DOUBLED.replace("START", "'x'").replace("MORE", "[n.s, n.s] | join"),
    "doubling by a method": DOUBLED.replace("START", "'x'").replace("MORE", "n.s.join([n.s, n.s])"),
    "doubling lists": DOUBLED.replace("START", "['x']").replace("MORE", "[n.s, n.s]"),
    "doubled lists as JSON": DOUBLED.replace("START", "['x']")
    .replace("MORE", "[n.s, n.s]")
    .replace("n.s }}", "n.s | tojson }}"),
    "replacing": "{{ 'aaaa'.replace('a', 'b' * 10000000) }}",
    "a filter that replaces": "{{ 'aaaa' | replace('a', 'b' * 10000000) }}",
    "joining": "{{ ('y' * 10000).join(['y'] * 10000) }}",
    "a wide field": "{{ '%999999999d' % 1 }}",
    "a variable width": "{{ '%*d' % (999999999, 1) }}",
    "a wide format": "{{ '{:>999999999}'.format(1) }}",
    "a variable format": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "padding": "{{ 'x'.ljust(999999999) }}",
    "centring": "{{ 'x' | center(999999999) }}",
    "indenting": "{{ 'x\nx' | indent(999999999) }}",
    "adding to a list": LARGE.replace("DONE", "{% set y = x + [2] %}"),
    "adding to a text": LARGE.replace("[1]", "'ab'").replace("DONE", "{% set y = x + 'c' %}"),
    "repeating": LARGE.replace("DONE", "{% set y = [1] * 300000 %}"),
    "searching a list": LARGE.replace("DONE", "{% set y = 2 in x %}"),
    "searching a text": LARGE.replace("[1]", "'ab'").replace("DONE", "{% set y = 'c' not in x %}"),
    "comparing": LARGE.replace("DONE", "{% set y = x == z %}"),
    "comparing in a chain": LARGE.replace("DONE", "{% set y = 'a' < 'b' in x %}"),
    "a test that compares": LARGE.replace("DONE", "{% set y = x is eq(z) %}"),
    "comparing doubled lists": NESTED.replace("DONE", "n.s == m.s"),
    "searching doubled lists": NESTED.replace("DONE", "1 in [n.s] or m.s in [n.s]"),
    "a doubled list in a format": NESTED.replace("DONE", "'%s' % n.s"),
    "a doubled key": NESTED.replace("DONE", "{n.t: 1}"),
    "a doubled key that is looked up": NESTED.replace("DONE", "{}[n.t]"),
    "a doubled key that is searched": NESTED.replace("DONE", "n.t in {}"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_templates_that_would_not_end_are_stopped(kind):
    environment = BoundedEnvironment()
    environment.filters["tojson"] = environment.counted("tojson", json.dumps)
    environment.start()
    with pytest.raises(Exceeded):
        environment.from_string(ENDLESS[kind]).render()


ORDINARY = """{% macro one(m) %}<{{ m.role | upper }}>{{ m['content'] | trim }}{% endmacro -%}
{% for m in messages if m.content %}{{ one(m) ~ loop.index }}{{ '%s:%5d' % (m.role, 3) }}{% else %}none{% endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ ['a', 'b'] | join }} {{ [1, 2] | sum }}
{{ 'a-b'.split('-')[-1] }}
{{ 'abc'[1:] }} {{ 'abc' | replace('a', 'b') }} {{ '{:>5}|{x}'.format(1, x=2) }} {{ missing ~ 'x' }} {{ none ~ 1 }}
{% set n = namespace(i=0) %}{% for k, v in {'q': 1}.items() %}{% set n.i = n.i + v * 2 ** 3 %}{{ k }}{% endfor %}
{{ n.i }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | groupby('role') | length }}
{% filter upper %}text{% endfilter %} {% set block %}inner {{ 1 }}{% endset %}{{ block }} {{ [[1, 2], [3]] | tojson }}
{{ messages | join('+', attribute='role') }} {{ 'x' | indent(2, true) }} {{ 1 < n.i <= 99 in [9, true] }}
{{ 'role' in messages[0] }} {{ n.i is eq 2 }}
{{ messages[0] == messages[1] or messages[0] in messages }} {{ 'a' in 'ab' }} {{ 3 not in [n.i] }} {{ {n.i: 1}[n.i] }}
{{ 'x' is in(['x']) }} {{ ('a', 'b') == ('a', 'b') }} {{ {('a', 1): 'pair'}[('a', 1)] }}
{{ 7 % 4 }} {{ 1.5 * 2 }} {{ 'ab' * 2 }}
"""


def test_ordinary_templates_are_rendered_as_ever():
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}, {"role": "x", "content": ""}]
    bounded = BoundedEnvironment()
    bounded.start()
    plain = ImmutableSandboxedEnvironment()
    assert bounded.from_string(ORDINARY).render(messages=messages) == plain.from_string(ORDINARY).render(
        messages=messages
    )


def test_long_conversations_have_room():
    text = "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content | trim ~ '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 1000}] * 2000
    environment = BoundedEnvironment()
    environment.start()
    assert len(environment.from_string(text).render(messages=messages)) > 9_000_000
