"""modeling/chat_templates.py: a template that does or makes too much is refused at once; honest ones are not."""

import time

import pytest

from vamba.demo.tiny_checkpoints import CHAT_TEMPLATE
from vamba.modeling.chat_templates import ChatTemplateError, check_rendering
from vamba.modeling.processing_video_ma2mba import CHAT_TEMPLATE as MA2MBA_CHAT_TEMPLATE


MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}]
NESTED = "{% set n = namespace(s=['x']) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% if false %}{{ 'x' * 10**10 }}{% endif %}",  # which transformers computes when it compiles
        "{% if false %}{{ 'x'|center(10**10) }}{% endif %}",
        "{% set n = 10**5 %}{{ 'x' * (n * n) }}",
        "{{ (9**9) ** (9**9) }}",
        "{{ 'x'.center(10**12) }}",
        "{{ '%99999999999d' % 5 }}",
        "{{ '%*d' % (10**11, 5) }}",
        "{{ '{:99999999999}'.format(5) }}",
        "{{ '{:{}}'.format(5, 10**11) }}",
        "{{ lipsum(n=10**9) }}",
        "{{ [1]|batch(10**10, 'x')|list }}",
        "{{ ('y' * 100000).join(range(100000)|map('string')) }}",
        "{{ ('a ' * 100000)|wordwrap(1, wrapstring='x' * 100000) }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s|replace('x', 'xx') %}{% endfor %}",
        NESTED + "{{ n.s|tojson }}",
        NESTED + "{{ '%s' % n.s }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set b = 'y' * 10**6 %}{% set x %}{% for i in range(10**5) %}{{ b }}{% endfor %}{% endset %}",
        "{% for x in range(10**5) if range(10**5)|list|length == 3 %}{% endfor %}",
        "{% generation %}{{ 'x' * 10**10 }}{% endgeneration %}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "x" * 2**21,
    ],
)
def test_a_bomb_is_refused(template):
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError, match="^The chat template ['\"].*['\"] … is refused: it "):
        check_rendering(template, [MESSAGES], {})
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MA2MBA_CHAT_TEMPLATE])
def test_thousands_of_messages_pass(template):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(3000)]
    check_rendering(template, [turns, MESSAGES], {"add_generation_prompt": True})


def test_a_text_that_grows_with_the_messages_passes():
    """Each step copies all that was said before."""
    template = (
        "{% set n = namespace(s='') %}{% for m in messages %}{% set n.s = n.s + m.content %}{% endfor %}{{ n.s }}"
    )
    check_rendering(template, [[{"role": "user", "content": "word " * 200}] * 3000], {})


def test_other_errors_are_left_to_transformers():
    for template in ("{{ raise_exception('roles') }}", "{{ 1 / 0 }}", "{% if %}", "{{ x.y.z }}"):
        check_rendering(template, [MESSAGES], {})


def test_large_numbers_may_be_written():
    """It is only how long something is to be that is bounded."""
    check_rendering("{{ 1763761239 | tojson }}{{ 1003520 | int }}{{ 123456.5 | round(2) }}", [MESSAGES], {})
