"""Normalizes answers that differ only in layout: TeX spacing, delimiters, markdown, Unicode, digit groups.

No step changes a value. Ambiguities (a comma between digits inside brackets) are left to the parser.
"""

from __future__ import annotations

import re

# Full-width ASCII (U+FF01..U+FF5E) and the ideographic space. NFKC would also turn a superscript 2 into a 2.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_GREEK = dict(zip("αβγδεζηθικλμνξρστυφχψω", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
).split(), strict=True))  # fmt: skip
_SYMBOLS = str.maketrans(
    _HALF_WIDTH
    | {ord(letter): rf"\{name} " for letter, name in _GREEK.items()}
    | {ord(dash): "-" for dash in "\u2212\u2010\u2011\u2013\ufe63"}
    | {ord(space): " " for space in "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u200a"}
    | {ord(space): r"\," for space in "\u2009\u202f"}
    | {ord(nothing): "" for nothing in "\u200b\u200c\u200d\u2060\ufeff✓✅"}
    | {ord(symbol): rf" \{command} " for symbol, command in {
        "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "÷": "div", "∞": "infty", "±": "pm", "∓": "mp",
        "…": "ldots", "⋯": "ldots",
        "≤": "le", "⩽": "le", "≥": "ge", "⩾": "ge", "≠": "ne", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset",
        "π": "pi", "√": "sqrt", "Δ": "Delta", "Ω": "Omega", "ℝ": "mathbb{R}", "∖": "setminus",
    }.items()}
    | {ord(digit): rf"_{{{index}}}" for index, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")}
    | {ord(sign): rf"\frac{{{over}}}{{{under}}}" for sign, over, under in (
        ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5), ("⅗", 3, 5),
        ("⅘", 4, 5), ("⅙", 1, 6), ("⅚", 5, 6), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8),
    )}
    | {ord(slash): "/" for slash in "\u2044\u2215"} | {ord("∶"): ":", ord("⟨"): "(", ord("⟩"): ")"}
    | {ord("∛"): r"\sqrt[3]", ord("∜"): r"\sqrt[4]"}
    | {ord("°"): r"^\circ ", ord("′"): "'", ord("’"): "'", ord("“"): '"', ord("”"): '"', ord("％"): "%"}
)  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER = re.compile("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_BRACED = re.compile(r"\{((?:\\.|[^{}\\]|\{(?:\\.|[^{}\\])*\})*)\}", re.DOTALL)
_TEXT_COMMAND = (
    r"\\(?:underline|text|textrm|textbf|textit|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|bm"
    r"|boldsymbol|emph|fbox|operatorname\*?)"
)
_TEXT = re.compile(_TEXT_COMMAND + r"\s*\{([^{}]*)\}")
_MARKDOWN = re.compile(r"(\*\*\*|\*\*|\*|___|__|_|`{1,3}|\"|')(?=\S)(.*\S)\s*\1", re.DOTALL)
_DELIMITED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]|\$\$(.*)\$\$|\$([^$]*[^\\$])\$", re.DOTALL)
_LAYOUT = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|rm|bf|it"
    r"|tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![A-Za-z])\.?|(?<!\\)\\!"
)
_SPACING = re.compile(
    r"(?<!\\)\\[,;: ]|\\(?:q?quad|(?:en|thin)?space|null)(?![A-Za-z])|\\[hv]space\*?\s*\{[^{}]*\}|~|&nbsp;"
)
_LIST_SPACING = re.compile(r"(?<=[\w)}\]])\s*\\q?quad(?![A-Za-z])\s*(?=\S)(?!\\(?:text|mathrm)\s*\{)")
_RENAMED = [
    (re.compile(rf"\\(?:{old})(?![A-Za-z])"), new)
    for old, new in {
        "[dtc]frac|sfrac|nicefrac": r"\\frac", "[dt]binom": r"\\binom", "leq|leqslant": r"\\le",
        "geq|geqslant": r"\\ge",
        "lvert|rvert|vert": "|", "lbrace": r"\\{", "rbrace": r"\\}", "lbrack": "[", "rbrack": "]", "langle": "(",
        "rangle": ")", "lparen": "(", "rparen": ")", "colon": ":", "degree|deg": r"^\\circ", "neq": r"\\ne",
        "varnothing": r"\\emptyset", "ast|cdotp": r"\\cdot", "lor|vee": " or ", "land|wedge": " and ",
        "infin": r"\\infty", "Reals|R": r"\\mathbb{R}", "arcsec": r"\\arcsec", "gt": ">", "lt": "<",
        "bigcup": r"\\cup", "bigcap": r"\\cap", "backslash|smallsetminus": r"\\setminus", "textdegree": r"^\\circ",
        "dots|cdots|dotsc|dotsb": r"\\ldots", "pounds|textsterling": "£", "euro|texteuro": "€", "textdollar": r"\\$",
    }.items()
]  # fmt: skip
_PLAIN_RELATIONS = [("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne ")]
# A thin space, {,} or ,\! groups digits by three. A plain blank does so only with two or more groups: 1 000 000.
_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|\{\\,\}|\\,|,\\!|\\;|~)\s*\d{3})+(?!\d)")
_BLANK_GROUPS = re.compile(r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?: \d{3}){2,}(?![\d/]| \d)")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))(?!\d)")
_DOTTED = re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_PERIOD_IN_BRACKETS = re.compile(r"-?\d*\.\d*\(\d+\)")
_CONTINUED = re.compile(r"(?<![\d.])(\d*)\.(\d+)\s*\\ldots(?![A-Za-z])")
# Digits that show their period: 1666, 272727 (the period occurs twice if no digits precede it).
_PERIODIC = re.compile(r"()(\d{2,}?)\2+|(\d*?)(\d+?)\4{2,}")
_UNIT = r"\\(?:text|mathrm)\s*\{\s*([A-Za-z]+)\s*\}"
_UNIT_FRACTION = re.compile(rf"(?<=[\d~ ,;}}])\\frac\s*\{{{_UNIT}\}}\s*\{{{_UNIT}\s*(\^\{{?\d\}}?)?\}}")
_SPELLINGS = [
    (re.compile(pattern), new)
    for pattern, new in {
        r"(?<![\\A-Za-z}^_])\{\s*([-+=:.])\s*\}": r"\1",  # {-}5
        r"\\\\\s*\[\s*[\d.]+\s*[a-z]{2}\s*\]|\\cr(?![A-Za-z])": r"\\\\ ",  # the end of a row, with its distance
        r"(?<=\d)\s*x\s*(?=10\s*\^)": r"\\times ",
        r"\\not\s*=": r"\\ne ",
        r"\bUS\s*(?=\\?\$)": "",
        r"(?<![A-Za-z\\])(sq|cu|in|ft|yd|oz|lbs?|hrs?|mins?|secs?)\.(?![\d.])": r"\1",
        r"\\mathbb\s*\{R\}\s*-\s*(?=\\\{|[(\[])": r"\\mathbb{R}\\setminus ",
    }.items()
]
_TEMPERATURE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:\{?\\?(?:text|mathrm|rm)?\s*\{?\s*([CF])\b\s*\}?\}?)")
_PERCENT = re.compile(r"(?:\\text\s*\{\s*)?\b(?:percent|per cent)\b(?:\s*\})?", re.IGNORECASE)
_COLOR = re.compile(
    r"\\(?:text)?color\s*\{[a-z]+\}|\\(?:checkmark|blacksquare|qed)(?![A-Za-z])"
    r"|\\(?:phantom|tag\*?)\s*\{[^{}]*\}|^\{\}|(?<=\d)\{\}$"
)
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*)?(?:\{\s*)?(?:\\(?:text|mathrm)\s*\{)?(?:st|nd|rd|th)(?![A-Za-z])\}*")
_HALF_OF_DAY = re.compile(r"(?<=[\d\s{])([apAP])\.?\s?[mM](?![A-Za-z])\.?")
_ANSWER_IS = r"(?:the\s+)?(?:(?:final|correct)\s+)?ans(?:wer)?\s*(?:is\s*:?|:|=)\s*"
_LEAD = re.compile(rf"{_TEXT_COMMAND}\s*\{{\s*{_ANSWER_IS}\}}|\^?{_ANSWER_IS}\^?", re.IGNORECASE)
_SYSTEM = re.compile(r"\\begin\{(cases|aligned|align\*?|gathered)\}(.*)\\end\{\1\}", re.DOTALL)
_THEREFORE = re.compile(r"(?:=|\\(?:therefore|implies|Rightarrow)(?![A-Za-z])|[∴⇒])\s*")
_NO_TEXT = re.compile(r"\\text\s*\{\s*[.,]?\s*\}$")


def normalize(answer: str) -> str:
    """Normalize an answer for the parser. Time is linear in its length, up to nesting."""
    answer = _POWER.sub(lambda power: f"^{{{power[0].translate(_RAISED)}}}", answer)
    answer = _COLOR.sub("", answer.translate(_SYMBOLS)).strip()
    answer = _unwrap(re.sub(r"\.{3,}", r"\\ldots ", answer))
    answer = _without_system(answer)
    answer = _GROUPS.sub(lambda groups: re.sub(r"\D", "", groups[0]), answer)
    answer = _LIST_SPACING.sub(" ; ", answer)
    answer = _TEMPERATURE.sub(lambda scale: {"C": " celsius", "F": " fahrenheit"}[scale[1]], answer)
    answer = _LAYOUT.sub("", answer)
    # A space after a comma shows that the comma does not group digits; TeX spacing counts as a space.
    answer = _SPACING.sub(" ", answer)
    for pattern, new in _RENAMED:
        answer = pattern.sub(new, answer)
    for old, new in _PLAIN_RELATIONS:
        answer = answer.replace(old, new)
    answer = answer.replace(r"\%", "%").replace("**", "^")
    answer = _ORDINAL.sub("", answer)
    answer = _HALF_OF_DAY.sub(lambda half: f" {half[1].lower()}m", answer)
    answer = _PERCENT.sub("%", answer)
    for pattern, new in _SPELLINGS:
        answer = pattern.sub(new, answer)
    answer = _UNIT_FRACTION.sub(r"\\text{ \1 }/\\text{ \2 }\3", answer)
    answer = _DOTTED.sub(r"\\overline{\1\2\3}", answer)
    answer = _CONTINUED.sub(_continued_decimal, answer)
    if _PERIOD_IN_BRACKETS.fullmatch(answer):
        answer = answer.replace("(", r"\overline{").replace(")", "}")
    answer = _REPEATING.sub(_repeating_fraction, answer)
    answer = _LEAD.sub("", answer, count=1) if _LEAD.match(answer) else answer
    answer = _unwrap(_THEREFORE.sub("", answer, count=1) if _THEREFORE.match(answer) else answer)
    answer = _BLANK_GROUPS.sub(lambda groups: groups[0].replace(" ", ""), answer)
    return re.sub(r"\s+", " ", answer).strip()


_ONES = dict(zip((
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
).split(), range(20), strict=True))  # fmt: skip
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
NUMBER_WORDS = _ONES | _TENS | {
    f"{ten}{joint}{one}": tens + _ONES[one]
    for ten, tens in _TENS.items() for one in list(_ONES)[1:10] for joint in "- "
}  # fmt: skip
"""Numbers below 100 in words."""


def read_number_word(answer: str) -> str:
    """Digits for an answer that is one number in words; other answers are returned unchanged."""
    number = NUMBER_WORDS.get(unwrap_text(answer).strip().lower())
    return answer if number is None else str(number)


def unwrap_text(answer: str) -> str:
    r"""Replace \text{...} and similar by its content; a single letter stays marked, `\text{m}`, as a unit."""

    def words(text: re.Match) -> str:
        content = text[1]
        if re.fullmatch(r"\s*[A-Za-z]\s*", content) and not text[0].startswith((r"\mathbf", r"\mathit", r"\bm")):
            return rf"\text{{{content.strip()}}}"
        if unit := re.fullmatch(r"\s*([A-Za-z])\s*/\s*([A-Za-z]+)\s*", content):
            return rf"\text{{{unit[1]}}}/\text{{{unit[2]}}}"
        return f" {content} "

    for _ in range(4):  # \textbf{\text{...}}
        unwrapped = _TEXT.sub(words, answer)
        if unwrapped == answer:
            break
        answer = unwrapped
    return answer


def _without_system(answer: str) -> str:
    """Convert a system of equations to a list; systems with other columns (a function by cases) are unchanged."""
    system = _SYSTEM.fullmatch(answer)
    if system is None or "&" in (rows := system[2].replace("&=", "=")):
        return answer
    return ", ".join(row.strip(" ,\n") for row in re.split(r"\\\\", rows) if row.strip())


def _unwrap(answer: str) -> str:
    """Remove delimiters, emphasis, braces and punctuation around the complete answer."""
    for _ in range(8):
        before = answer
        # A backslash at the end belongs to TeX spacing or a line break.
        answer = _NO_TEXT.sub("", answer.strip()).rstrip(" \t\n.,;:\\").strip()
        if delimited := _DELIMITED.fullmatch(answer):
            answer = next(content for content in delimited.groups() if content is not None)
        if (emphasis := _MARKDOWN.fullmatch(answer)) and emphasis[1] not in emphasis[2]:
            answer = emphasis[2]
        if braced := _BRACED.fullmatch(answer):
            answer = braced[1]
        if (text := _TEXT.fullmatch(answer)) is not None:
            answer = text[1]
        if answer == before:
            break
    return answer


def _continued_decimal(number: re.Match) -> str:
    """0.1666... as a repeating decimal, 3.14159... as a rounded one; others are unchanged and are not numbers."""
    integral, digits = number[1], number[2]
    if len(digits) <= 200 and (periodic := _PERIODIC.fullmatch(digits)) is not None:
        fixed, period = (periodic[1], periodic[2]) if periodic[2] else (periodic[3], periodic[4])
        return rf"{integral}.{fixed}\overline{{{period}}}"
    return f"{integral}.{digits}" if len(digits) >= 6 else number[0]


def _repeating_fraction(number: re.Match) -> str:
    """Convert 0.1\\overline{6} to the equal fraction."""
    integral, fixed, period = number[1] or "0", number[2], number[3] or number[4]
    if len(fixed) + len(period) > 1000:
        return number[0]
    numerator = int(integral + fixed + period) - int(integral + fixed)
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"
