"""What tests of the report share: a parser that checks the structure of a page, and text that tries to break it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "input"}
HOSTILE = "</pre></title></style><script>alert(1)</script><img src=//a.test onerror=a()> & \" ' \x00\x1b\ud800 $x$"


class Structure(HTMLParser):
    """Tags of a page; fails on a closing tag without an open one."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
