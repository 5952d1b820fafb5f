import pytest

from minisgl.chat_template import names_read
from minisgl.errors import MinisglError


def test_names_that_a_template_reads():
    """Defaults as Llama 3 and SmolLM3 set them, loop controls, and transformers' own tag."""
    template = """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
    {%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
    {%- set own = 1 %}{{ own }}thinking
    {%- for message in messages %}{% if loop.first %}{% continue %}{% endif %}
    {%- generation %}{{ message.enable_thinking }}{% endgeneration -%}{% endfor %}"""
    assert names_read(template) == {"tools", "date_string", "strftime_now", "messages"}


def test_no_template_reads_nothing():
    assert names_read("") == frozenset()


def test_what_is_no_template():
    with pytest.raises(MinisglError, match="the chat template is none: line 2: Expected"):
        names_read("{{ messages }}\n{% for %}")
