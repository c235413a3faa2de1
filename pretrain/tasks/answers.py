"""When two final answers are the same: numbers by value, LaTeX by what it means to say."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s*/\s*\d+)?")
_FOUND_NUMBER = re.compile(
    r"(?<![\w.])[-\u2212+]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
)
_MARKERS = re.compile(r"(?:####|\b[Aa]nswer:|\b[Aa]nswer is:?)[ \t]*([^\n]+)")
# Spelling without meaning; the longer ones first.
_SILENT = (
    "\\left", "\\right", "\\displaystyle", "\\!", "\\,", "\\;", "\\:", "\\ ", "\\$", "$",
    "\\%", "%", "^{\\circ}", "^\\circ", "\\degree",
)  # fmt: skip
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}\s])\\(?:text|mathrm|mbox)\s*\{\s*[^{}\d]*\}(?:\^\{?\d\}?)?$")
_LETTER = re.compile(r"^[A-Za-z]\w?\s*(?:=|\\in(?![a-z]))\s*(?=\S)")
_COMMAND = re.compile(r"\\(?:frac|sqrt)(?![A-Za-z])")


def is_same(given: str, answer: str) -> bool:
    """Whether two answers are equal after `normalize`."""
    return normalize(given) == normalize(answer)


def normalize(answer: str) -> str:
    """One spelling for all answers that say the same."""
    text = answer.strip().rstrip(".").strip()
    text = text.replace("\u2212", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _UNIT.sub("", text)
    for silent in _SILENT:
        # a command that goes on is another (\leftarrow), and so is one behind a line break (\\)
        end = r"(?![A-Za-z])" if silent[-1].isalpha() else ""
        text = re.sub(r"(?<!\\)" + re.escape(silent) + end, "", text)
    text = _TEXT.sub(r"\1", text)
    text = _LETTER.sub("", text.strip())
    text = _number(text) or _braced(text)
    text = re.sub(r"\s+", "", text)
    if match := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", text):
        return _number(f"{match[1]}1/1", times=(int(match[2]), int(match[3]))) or text
    if number := _number(text):
        return number
    # words are words in any case; a letter of a formula is not its capital
    return text.lower() if re.fullmatch(r"\(?[A-Za-z]{2,}\)?|\([A-Za-z]\)", text) else text


def find_answer(text: str, answer: str, *, at_once: bool = False) -> str:
    """The final answer within what the model wrote; "" if there is none.

    In this order: the last \\boxed{}; what follows the last `####`, `Answer:` or `answer is`, of
    that the first number if the known answer is written as one, else the first $...$ if any; for
    such a known answer the last number, or with `at_once` (the answer follows immediately) the
    first of the first line; else the first line.
    """
    if (boxed := _boxed(text)) is not None:
        return boxed
    marked = _MARKERS.findall(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    place = marked[-1].strip() if marked else (lines[0] if lines else "")
    if not _FOUND_NUMBER.fullmatch(answer.strip()):
        formula = re.search(r"\$([^$]+)\$", place)
        return formula[1] if formula else place
    if marked or at_once:
        numbers = _FOUND_NUMBER.findall(place)
        return numbers[0] if numbers else place
    numbers = _FOUND_NUMBER.findall(text)
    return numbers[-1] if numbers else place


def _number(text: str, times: tuple[int, int] = (1, 1)) -> str | None:
    """A number, multiplied by a fraction, in lowest terms; None for what is no number."""
    text = text.strip()
    if not any(map(str.isdigit, text)) or not _NUMBER.fullmatch(text):
        return None
    try:
        top, _, bottom = text.replace(",", "").replace(" ", "").partition("/")
        return str(Fraction(top) / Fraction(bottom or 1) * Fraction(*times))
    except (ValueError, ZeroDivisionError):
        return None


def _braced(text: str) -> str:
    """Braces around what \\frac and \\sqrt are given bare: \\frac12 is \\frac{1}{2}."""
    out, at = [], 0
    while match := _COMMAND.search(text, at):
        out.append(text[at : match.end()])
        at = match.end()
        for _ in range(2 if match[0] == "\\frac" else 1):
            group, at = _group(text, at)
            out.append(group)
    return "".join(out) + text[at:]


def _group(text: str, at: int) -> tuple[str, int]:
    """The argument of a command that starts there, in braces, and where it ends."""
    while at < len(text) and text[at].isspace():
        at += 1
    if at == len(text) or text[at] in "[}":
        return "", at
    if text[at] != "{":
        command = re.match(r"\\[A-Za-z]+|.", text[at:], flags=re.S)
        assert command is not None
        return "{" + command[0] + "}", at + len(command[0])
    end = _closing(text, at)
    return "{" + _braced(text[at + 1 : end]) + "}", min(end + 1, len(text))


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes; the end of the text if it does not."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


def _boxed(text: str) -> str | None:
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    start = at + len("\\boxed")
    return text[start + 1 : _closing(text, start)]
