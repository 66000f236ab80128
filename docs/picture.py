"""Draws docs/decode.svg from a trace of one decode.

    python -m refusion_jax.sample --prompt="What is 68 times 93?" --verify=threshold --gen_length=48 \
        --slot_size=4 --slot_threshold=0.8 --token_threshold=0.8 --trace=docs/decode_trace.json
    python docs/picture.py docs/decode_trace.json docs/decode.svg

Columns are the response's tokens, rows the phases of each plan. The drawing takes every cell from the trace.
A trace has no text of rejected drafts, so their cells are crossed out. The SVG has no external resources; its
colours follow the reader's light or dark theme.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, MARGIN, LABEL = 880, 14, 104  # px; LABEL is the column of row names
ROW, GAP = 23, 20  # px of a row of cells, and between plans


class Theme(NamedTuple):
    """Colours: of the page and what is on it, of text on a filled cell, and of the plans."""

    paper: str
    ink: str
    soft: str
    line: str
    rejected: str
    on_filled: str
    plans: Sequence[str]


LIGHT = Theme(
    *("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#cf222e", "#ffffff"),
    plans=("#0969da", "#bc4c00", "#1a7f37", "#8250df"),
)
DARK = Theme(
    *("#0d1117", "#e6edf3", "#9198a1", "#3d444d", "#ff7b72", "#0d1117"),
    plans=("#58a6ff", "#f0883e", "#56d364", "#bc8cff"),
)

STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
.t{font:600 13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;text-anchor:middle}
.h{font-weight:700}.s{font-size:12px}.e{text-anchor:end}.eos{font-size:8px}
.masked,.slot,.x{fill:none}.slot{stroke-width:2}.x{stroke-width:1.8;stroke-linecap:round}
.old{opacity:.22}.draft{opacity:.16}.kept{opacity:.4}
"""


def colours(theme: Theme) -> str:
    """CSS of one theme. Plain rules: not every renderer of SVG knows CSS variables."""
    filled = "".join(f".p{i}{{fill:{plan}}}.b{i}{{stroke:{plan}}}" for i, plan in enumerate(theme.plans))
    return (
        f".paper{{fill:{theme.paper};stroke:{theme.line}}}text{{fill:{theme.ink}}}.s{{fill:{theme.soft}}}"
        f".masked{{stroke:{theme.line}}}.x{{stroke:{theme.rejected}}}.on{{fill:{theme.on_filled}}}{filled}"
    )


class Cell(NamedTuple):
    """How one token is drawn in one row: masked, draft, rejected, kept, committed, or old (committed before).

    Attributes:
      kind: which of these.
      plan: the plan whose colour it has; of no meaning where masked or rejected.
    """

    kind: str
    plan: int = 0


class Row(NamedTuple):
    """A row of cells.

    Attributes:
      name: of its phase.
      cells: one per column.
      framed: the first token of each slot to frame.
      plan: the plan whose colour the frames have.
    """

    name: str
    cells: list[Cell]
    framed: Sequence[int] = ()
    plan: int = 0


def phases(step: Mapping[str, Any], plan: int, before: Mapping[int, int], width: int, size: int) -> list[Row]:
    """The rows of one plan: plan, verify, and each round of infill.

    Args:
      step: its entry of the trace, with positions that count from the response's first token.
      plan: its number.
      before: token -> the plan that committed it, of earlier plans.
      width: columns.
      size: tokens per slot.
    """
    now, slots = set(step["committed"]), step["planned"]
    iterative = step["branch"] == "iterative"

    def row(name: str, judged: int | None) -> Row:
        """The row after verifying (judged 0) or after a round of infill; None is the plan itself."""
        last = judged is not None and (not iterative or judged == step["rounds"])
        cells = [Cell("old", before[t]) if t in before else Cell("masked") for t in range(width)]
        for first, accepted in zip(slots, step["accepted"], strict=True):
            for token in range(first, first + size):
                kept = judged is not None and token - first < accepted[min(judged, len(accepted) - 1)]
                if judged is None:
                    kind = "draft"
                elif last and token in now:
                    kind = "committed"
                else:
                    kind = "kept" if kept and iterative else "rejected"
                # Nothing follows an EOS: what was drafted there is dropped.
                cells[token] = Cell("masked") if last and iterative and token not in now else Cell(kind, plan)
        return Row(f"{name}, commit" if last else name, cells, slots, plan)

    rounds = [row("infill", number) for number in range(1, step["rounds"] + 1)] if iterative else []
    return [row("plan", None), row("verify", 0), *rounds]


def sentence(step: Mapping[str, Any], size: int) -> str:
    """A plan in words."""
    chosen, masked, tokens = len(step["planned"]), len(step["confidences"]), len(step["committed"])
    begin = f"{chosen} of {masked} masked slots chosen and drafted. "
    if step["branch"] == "iterative":
        return begin + f"None verifies whole, so each is infilled, in parallel: {tokens} tokens committed."
    whole = len({token // size for token in step["committed"]})
    if whole == chosen:
        return begin + f"Verified whole: {tokens} tokens committed."
    return begin + f"The first {whole} verify whole: {tokens} tokens committed. The others are rejected."


def cells_svg(row: Row, texts: Sequence[str], y: float, size: int) -> Iterator[str]:
    """One row of cells with its name, at height y."""
    cell = (WIDTH - 2 * MARGIN - LABEL) / len(row.cells)
    left = MARGIN + LABEL
    yield f'<text class="s" x="{MARGIN}" y="{y + 13:g}">{row.name}</text>'
    for token, (kind, plan) in enumerate(row.cells):
        x, colour = left + token * cell, f"p{plan % len(LIGHT.plans)}"
        box = f'x="{x + 0.75:.2f}" y="{y:g}" width="{cell - 1.5:.2f}" height="{ROW - 5}" rx="2"'
        filled = {"old": f"{colour} old", "draft": f"{colour} draft", "kept": f"{colour} kept"}
        if kind == "rejected":
            a, b, c = x + cell / 2 - 3.5, x + cell / 2 + 3.5, y + ROW / 2 - 2.5
            up, down = c - 3.5, c + 3.5
            yield f'<path class="x" d="M{a:.2f} {up:g}L{b:.2f} {down:g}M{b:.2f} {up:g}L{a:.2f} {down:g}"/>'
            continue
        yield f'<rect class="{filled.get(kind, colour if kind == "committed" else "masked")}" {box}/>'
        if kind in ("old", "kept", "committed") and token < len(texts):
            word = texts[token]
            tone = " on" if kind == "committed" else ""
            small = " eos" if word == "EOS" else ""
            yield (
                f'<text class="t{tone}{small}" x="{x + cell / 2:.2f}" y="{y + 13.5 - 2 * bool(small):g}">'
                f"{escape(word)}</text>"
            )
    for first in row.framed:
        x, wide = left + first * cell, size * cell
        colour = f"b{row.plan % len(LIGHT.plans)}"
        yield (
            f'<rect class="slot {colour}" x="{x:.2f}" y="{y - 1.5:g}" width="{wide:.2f}" '
            f'height="{ROW - 2}" rx="3"/>'
        )


def legend(y: float) -> Iterator[str]:
    """What the kinds of cells mean."""
    entries = (
        ("masked", "masked"),
        ("p0 draft", "drafted by the plan"),
        ("x", "draft rejected"),
        ("p1 kept", "accepted, slot not whole yet"),
        ("p0", "committed now"),
        ("p0 old", "committed before (cached)"),
    )
    for number, (kind, text) in enumerate(entries):
        x, top = MARGIN + LABEL + 230 * (number % 3), y + 20 * (number // 3)
        if kind == "x":
            yield f'<path class="x" d="M{x + 3} {top + 2}l7 7m0 -7l-7 7"/>'
        else:
            yield f'<rect class="{kind}" x="{x}" y="{top - 1}" width="13" height="13" rx="2"/>'
        yield f'<text class="s" x="{x + 19}" y="{top + 10}">{text}</text>'


def render(trace: Mapping[str, Any]) -> str:
    """The SVG of a trace as `sample --trace=FILE` writes it."""
    size, start = trace["settings"]["slot_size"], len(trace["prompt_ids"])
    eos = trace["settings"]["eos_id"]
    ids = zip(trace["raw_ids"], trace["token_texts"], strict=True)
    texts = ["EOS" if token == eos else "·" if text == " " else text for token, text in ids]
    width = -(-len(texts) // size) * size  # columns: whole slots
    parts, y, committed = [], 54.0, {}
    parts.append(f'<text class="h" x="{MARGIN}" y="27">Prompt</text>')
    parts.append(f'<text x="{MARGIN + LABEL}" y="27">{escape(trace["prompt"])}</text>')
    layout = f"{width} masks in slots of {size}"
    parts.append(f'<text class="s e" x="{WIDTH - MARGIN}" y="27">the response begins as {layout}</text>')
    for plan, step in enumerate(trace["trace"]):
        step = step | {name: [at - start for at in step[name]] for name in ("planned", "committed")}
        parts.append(
            f'<text class="h p{plan % len(LIGHT.plans)}" x="{MARGIN}" y="{y + 3:g}">Plan {plan + 1}</text>'
        )
        parts.append(f'<text x="{MARGIN + LABEL}" y="{y + 3:g}">{sentence(step, size)}</text>')
        y += 13
        for row in phases(step, plan, committed, width, size):
            parts += cells_svg(row, texts, y, size)
            y += ROW
        committed |= dict.fromkeys(step["committed"], plan)
        y += GAP
    tokens, passes = trace["num_tokens"], trace["num_forwards"]
    parts.append(f'<text class="h" x="{MARGIN}" y="{y + 3:g}">Answer</text>')
    parts.append(
        f'<text x="{MARGIN + LABEL}" y="{y + 3:g}">{tokens} tokens in {passes} forward passes, coloured by '
        f"the plan that committed them. Left to right takes {tokens} passes.</text>"
    )
    y += 13
    cells = [Cell("committed", committed[t]) if t in committed else Cell("masked") for t in range(width)]
    parts += cells_svg(Row("", cells), texts, y, size)
    y += ROW + 12
    parts += legend(y)
    return page(f"A decode of {trace['prompt']}", parts, y + 44)


def page(title: str, parts: Sequence[str], height: float) -> str:
    """The SVG around its parts."""
    styles = f"{STYLE}{colours(LIGHT)}\n@media (prefers-color-scheme:dark){{{colours(DARK)}}}"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{styles}</style>\n"
        f'<rect class="paper" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8"/>\n'
        f"{body}\n</svg>\n"
    )


def main(trace: str, picture: str) -> None:
    svg = render(json.loads(Path(trace).read_text(encoding="utf-8")))
    Path(picture).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
