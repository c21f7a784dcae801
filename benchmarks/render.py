"""Writes the figures of benchmarks/results/*.jsonl into the pages: `make results`.

    python benchmarks/render.py [--check]    # --check: only name the pages that differ, and fail

A page holds a figure or a table between `<!-- results: NAME -->` and `<!-- end -->`; pages.py says
what NAME shows. Of a case the newest row counts, and a ratio is of one row, so of one run. Bold:
short of the goal.
"""

import functools
import json
import pathlib
import re
import sys
import textwrap

import pages

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks/RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- results: (\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)
FIELDS = ("case", "metric", "backend", "device")


@functools.cache
def rows(script):
    text = (ROOT / f"benchmarks/results/{script}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def matching(where):
    """Rows that have the fields of `where`, whose cases match the pattern `cases`."""
    for row in rows(where["script"]):
        same = all(row[name] == where[name] for name in FIELDS if name in where)
        if same and re.search(where.get("cases", ""), row["case"]):
            yield row


def bounds(figure):
    """A figure, or the least and the most of several runs."""
    return (figure[0], figure[-1]) if isinstance(figure, list) else (figure, figure)


def value(row, of):
    """(least, most) of "name", or of the ratio "name / name"; None where the row has it not."""
    figures = row["ours"] | row["peer"]
    names = of.split(" / ")
    if any(name not in figures for name in names):
        return None
    least, most = bounds(figures[names[0]])
    if len(names) == 1:
        return least, most
    below = bounds(figures[names[1]])
    return least / below[1], most / below[0]


def words(x, form):
    if form == "x":
        return f"{x:.1f}x" if x < 9.95 else f"{x:.0f}x"
    return form.format(x)


def number(text):
    return float(re.search(r"[\d.,]+", text)[0].replace(",", ""))


def missed(text, goal, case):
    """`goal`: ">= 3.5", or {pattern of cases: goal}. What is printed has to reach it."""
    if isinstance(goal, dict):
        goal = next((g for pattern, g in goal.items() if re.search(pattern, case)), None)
    if not goal:
        return False
    sign, least = goal.split()
    return number(text) < float(least) if sign == ">=" else number(text) > float(least)


def figure(where, used):
    """The text of a figure: of all its cases the least and the most."""
    newest = {}
    for of in where["of"] if isinstance(where["of"], list) else [where["of"]]:
        of = of.format_map(where)
        for row in matching(where):
            if found := value(row, of):
                newest[row["case"], row["backend"], of] = row, found
    if not newest:
        return "-"
    used += [(where["script"], row) for row, _ in newest.values()]
    least, most = (pick(x for _, found in newest.values() for x in found) for pick in (min, max))
    form, goal = where.get("form", "{:.2f}"), where.get("goal")
    texts = list(dict.fromkeys(words(x, form) for x in (least, most)))
    bad = any(missed(text, goal, case) for text in texts for case, *_ in newest)
    return f"**{' to '.join(texts)}**" if bad else " to ".join(texts)


def keys(table):
    """What the rows of a table are about: given one by one, or each value of the fields `by`."""
    if "rows" in table:
        yield from table["rows"]
        return
    known = [tuple(row[name] for name in table["by"]) for row in matching(table)]
    for key in dict.fromkeys(known):
        label = re.sub(table.get("strip", "$^"), "", ", ".join(key))
        yield {"label": label, **dict(zip(table["by"], key, strict=True))}


def grid(table):
    head, columns, used = table["head"], table["columns"], []
    lines = [head, ["---"] * len(head)]
    for key in keys(table):
        cells = []
        for column in columns:
            texts = [figure({**table, **key, **part}, used) for part in column]
            cells.append("-" if set(texts) == {"-"} else ", ".join(texts))
        if set(cells) != {"-"}:
            lines.append([*key["label"].split(" | "), *cells])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + (source(used, table.get("options", "")) if table.get("source", True) else "")


def source(used, options):
    """Where the figures of a table come from."""
    scripts = ", ".join(dict.fromkeys(f"`python benchmarks/{s}.py{options}`" for s, _ in used))
    devices, dates, commits = (
        ", ".join(sorted({row[name] for _, row in used if row[name]}))
        for name in ("device", "date", "commit")
    )
    known = {f"{name} {x}" for _, row in used for name, x in row["versions"].items()}
    at = f" (commit {commits})" if commits else ""
    parts = (devices, dates + at, ", ".join(sorted(known)))
    return f"\n\n{scripts}: {'; '.join(part for part in parts if part)}."


def swapped(table):
    """Losses with the epoch that reaches LSTM's; bold where none does. Then how many do."""
    lines, there, no_later = [], {}, {}
    losses, epochs_of = (
        {row["case"]: row for row in matching(table | {"metric": metric})}  # the newest stay
        for metric in ("loss at the end", "LSTM's loss")
    )
    for loss in losses.values():
        epochs = epochs_of[loss["case"]]
        task, reached = loss["case"].partition(",")[0], epochs["peer"] | epochs["ours"]
        cells = [task]
        for name, end in (loss["peer"] | loss["ours"]).items():
            at = reached.get(name)
            cells.append(f"{end:.2g} ({at:.0f})" if at else f"**{end:.2g}**")
            if task not in table["not counted"]:
                there[name] = there.get(name, 0) + bool(at)
                no_later[name] = no_later.get(name, 0) + bool(at and at <= reached["LSTM"])
        lines.append(cells)
    lines = [["", *there], ["---"] * (len(there) + 1), *lines]
    lines.append(["gets there, of 12", *map(str, there.values())])
    lines.append(["no later than LSTM, of 12", *map(str, no_later.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(name):
    table = pages.TABLES[name]
    if "not counted" in table:
        return swapped(table)
    return grid(table) if "columns" in table else figure(table, [])


def wrapped(line):
    """Prose in lines of a page; a table's line, and an empty one, as they are."""
    return (
        [line]
        if not line or line.startswith("|")
        else textwrap.wrap(line, 100 - len("<!-- end -->"))
    )


def rendered(page):
    """The text of a page with its figures as the data have them."""

    def filled(match):
        text = shown(match[2])
        if match[3].startswith("\n"):  # else: within a sentence
            lines = text.splitlines()
            if page.name != "RESULTS.md":  # which counts its lines
                lines = [part for line in lines for part in wrapped(line)]
            text = "\n".join(lines)
            text = f"\n{text}" + "\n" * text.endswith("|")
        return match[1] + text + match[4]

    return MARKED.sub(filled, page.read_text(encoding="utf-8"))


def main(check):
    differ = [page for page in PAGES if rendered(page) != page.read_text(encoding="utf-8")]
    for page in differ:
        print(f"{'differs' if check else 'written'}: {page.relative_to(ROOT)}")
        if not check:
            page.write_text(rendered(page), encoding="utf-8")
    return bool(check and differ)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
