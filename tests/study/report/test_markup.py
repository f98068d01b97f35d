import pytest

from deepkd_plugin.study.report.markup import Markup, join, tag


def test_text_and_attributes_are_escaped():
    made = tag("p", "<b> & \"'", title='"><script>')

    assert made == '<p title="&quot;&gt;&lt;script&gt;">&lt;b&gt; &amp; &quot;&#x27;</p>'


def test_markup_is_taken_as_it_is():
    assert tag("p", tag("b", "a"), [Markup("<i>b</i>"), "<"], None, 3) == "<p><b>a</b><i>b</i>&lt;3</p>"


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"class_": "a"}, ' class="a"'),
        ({"aria_hidden": "true"}, ' aria-hidden="true"'),
        ({"viewBox": "0 0 1 1"}, ' viewBox="0 0 1 1"'),
        ({"open": True}, " open"),
        ({"id": None, "hidden": False}, ""),
        ({"colspan": 0}, ' colspan="0"'),
    ],
)
def test_names_of_attributes(attributes, text):
    assert tag("a", **attributes) == f"<a{text}></a>"


def test_elements_without_content_are_closed():
    assert tag("line", x1=0) == '<line x1="0"/>'


def test_joined_pieces_are_markup():
    assert join("&", tag("br")) == "&amp;<br/>"
    assert isinstance(join("a"), Markup)
