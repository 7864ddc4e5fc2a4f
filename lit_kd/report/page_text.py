"""The words of a comparison's report, and its frame."""

from __future__ import annotations

from string import Template

CURVES = (
    "Measured after each pass over the training data (an epoch), on validation samples that nobody trains on. A curve "
    "that rises and then falls has begun to learn wrong labels by heart. Dashed: teachers."
)
RELIABILITY = (
    "A network says how sure it is of each answer. Each dot gathers the test samples of which it was about equally "
    "sure; the larger, the more samples (the smallest may be a single one). On the dashed line it is right as often as "
    "it says. Below the line it is too sure of itself, above too modest; the red bars are these gaps."
)
CONFIDENCE = (
    "Each dot is a test sample: to the right, how sure the teacher is of the class that it names; upwards, how sure "
    "the student is of that same class, on a scale that shows 99% and 99.99% apart (log-odds). On the dashed line both "
    "are equally sure. The red line is the least-squares fit: with a slope of 1 the student is sure where the teacher "
    "is sure; near 0 it does not care how sure the teacher is; above 1 it exaggerates."
)


def results(teachers: int, several: bool) -> str:
    """Of how many teachers, and whether there are several seeds."""
    numbers = (
        "are means over the random seeds ± their standard deviation" if several else "are those of one random seed"
    )
    mark = "a circle with a bar is a mean with its standard deviation, each grey dot one seed" if several else ""
    marks = [mark] * several + ["the dashed line is the teacher"] * (teachers == 1)
    picture = f" In the picture, {', and '.join(marks)}." if marks else ""
    return f"Each row is a way to train; numbers {numbers}, and the best student is <b>bold</b>.{picture}"


def weights(known: bool, several: bool) -> str:
    """Whether it is known which labels are wrong, and whether there are several seeds."""
    truth = (
        "Blue are labels that are right, red those known to be wrong, which the methods are not told. The better the "
        "colours are apart, the better a method has found out. The AUC says how well: 1 is perfect, 0.5 is chance."
        if known
        else "Which labels are wrong is not known here."
    )
    seeds = " All seeds together; bands: from the lowest to the highest seed." if several else ""
    return f"These methods learn a weight for each training label: how much to listen to it. {truth}{seeds}"


def distrusted(known: bool, several: bool) -> str:
    """As `weights`."""
    first = " (first seed)" if several else ""
    frames = "A red frame: the label is wrong indeed; blue: it is right." if known else "Which are wrong is not known."
    return (
        f"The training samples whose label was believed least, the most distrusted first{first}. Under each: the label "
        f"that it came with, what the student takes it for and how sure it is, and the weight of the label. {frames}"
    )


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: a comparison by lit_kd</title>
<style>
:root { color-scheme: light dark; --paper: #fbfbfa; --ink: #1f2328; --soft: #5c6570; --line: #d9dde2; --card: #ffffff;
  --right: #2a78b5; --wrong: #d1495b; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7ea; --soft: #9aa4ae; --line: #343a42; --card: #1c2025; --right: #5aa7e0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2rem); max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
p { max-width: 46rem; margin: .3rem 0 1rem; color: var(--soft); }
p b { color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
tbody th { font-weight: normal; white-space: normal; min-width: 7rem; }
thead th { color: var(--soft); font-weight: 600; }
thead th[title]:not([title=""]) { text-decoration: underline dotted; text-underline-offset: 3px; cursor: help; }
details { margin: .6rem 0 1.2rem; color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; max-width: 46rem; }
dt { font-weight: 600; } dd { margin: 0; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.cards.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
figure { margin: 0; }
.cards figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  display: flex; flex-direction: column-reverse; justify-content: flex-end; }
figcaption { font-size: .9rem; margin-bottom: .4rem; }
.cards svg { width: 100%; height: auto; max-width: 34rem; }
svg text { font-family: system-ui, sans-serif !important; }
.chart { width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.samples { display: grid; gap: 1rem .8rem; grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); }
.samples img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  border: 4px solid var(--line); border-radius: 6px; }
.samples .right img { border-color: var(--right); } .samples .wrong img { border-color: var(--wrong); }
.samples figcaption { font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
</style>
</head>
<body>
<header><h1>$title</h1><p>$lead</p></header>
<main>
$body
</main>
<footer>Written by lit_kd $version. The numbers of each training are in results.csv beside this page.</footer>
</body>
</html>
""")
