"""What a written page holds, as a parser reads it, and what it must not hold."""

from html.parser import HTMLParser

HOSTILE = "</title><script>alert(1)</script>\"'><img src=//evil.example/x onerror=alert(1)>\u202e\x00\ud800 {{ 7 * 7 }}"
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """A page's tables by label, the drawings' words, all tags with their attributes, and the text; tags must be nested."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.charts, self.tags, self.text, self.open = {}, [], [], "", []
        self.waiting = []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if given.get("role") == "region":
            self.tables[given["aria-label"]] = self.waiting = []
        if tag == "svg" and given.get("role") == "img":
            self.charts.append(given["aria-label"])
        if tag == "table":
            self.table, self.waiting = self.waiting, []  # one without a label is read and forgotten
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.table[-1][-1] += data


def assert_harmless(page):
    """No script, no handler, nothing that a browser would fetch, and the policy that forbids both."""
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object", "embed", "base", "form"} == set()
    for _, attributes in page.tags:
        assert [name for name in attributes if name.startswith("on") or name == "srcdoc"] == []
        assert all(attributes.get(name, "data:").startswith(("data:", "#")) for name in ("src", "href", "xlink:href"))
    (policy,) = [given["content"] for tag, given in page.tags if given.get("http-equiv")]
    assert policy.startswith("default-src 'none'; ") and "script" not in policy
