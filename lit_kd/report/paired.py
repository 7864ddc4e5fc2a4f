"""The verdict of a comparison: which student is best, and by how much, seed by seed."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from lit_kd.report.charts import mean_and_deviation
from lit_kd.report.runs import Job, Result, score_of


class Verdict(NamedTuple):
    """What stands on top of a page."""

    numbers: list[tuple[str, str]]  # three, each with what it means
    reference: str | None  # the best fixed weight, or without one the best student that has no teacher
    differences: dict[str, list[float]]  # of each other student to it, by seed, points of the test score; best first


def verdict(done: Sequence[tuple[Job, Result]]) -> Verdict:
    """Compare students' test scores at the same seeds [ours]; the best of a kind is the one with the best mean."""
    students: dict[str, dict[int, float]] = {}
    kinds: dict[str, Job] = {}
    for job, result in done:
        if not job.is_teacher:
            students.setdefault(job.method, {})[job.seed] = 100 * score_of(result)[1]
            kinds[job.method] = job

    def best(wanted: Callable[[Job], bool]) -> str | None:
        found = [name for name in students if wanted(kinds[name])]
        return max(found, key=lambda name: mean(students[name].values()), default=None)

    def difference(name: str, other: str) -> list[float]:
        return [students[name][seed] - students[other][seed] for seed in students[name] if seed in students[other]]

    def against(name: str | None, other: str | None, what: str, none: str) -> tuple[str, str]:
        if name is None or other is None:
            return "–", none
        values = difference(name, other)
        won = f"; better in {sum(value > 0 for value in values)} of {len(values)} seeds" if len(values) > 1 else ""
        return signed(values), f"{what}: {name} against {other}{won}"

    first, fixed, alone = best(lambda job: True), best(_fixed), best(lambda job: not _taught(job))
    learned = best(lambda job: not _fixed(job))
    word = score_of(done[0][1])[0] if done else "accuracy"
    top = f"{mean_and_deviation(list(students[first].values()), 1)}%" if first else "–"
    numbers = [
        (top, f"test {word} of the best student, {first}" if first else "no student"),
        against(learned, fixed, "points over the best fixed weight", "no student has a fixed weight (KD)"),
        against(best(_taught), alone, "points that a teacher is worth", "no pair to compare"),
    ]
    reference = fixed or alone
    others = [name for name in students if name != reference] if reference else []
    differences = {name: values for name in others if reference and (values := difference(name, reference))}
    ranked = dict(sorted(differences.items(), key=lambda item: -mean(item[1])))
    return Verdict(numbers, reference, ranked)


def signed(values: Iterable[float]) -> str:
    """Mean and standard deviation of differences, with a sign."""
    text = mean_and_deviation(list(values), 1)
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"


def _fixed(job: Job) -> bool:
    """Whether the weight of the teacher is the same number for all rows, from begin to end."""
    return _taught(job) and job.config["model"]["class_path"].split(".")[-1] == "KD"


def _taught(job: Job) -> bool:
    """Whether there is a teacher, the recipe's or one that the method's own options name, such as a file."""
    return bool(job.teachers or job.config["model"].get("init_args", {}).get("teacher"))
