"""Progress outside a terminal: whole lines, now and then, that are never written over."""

import io

from distill_llm.common import progress
from distill_llm.common.progress import PlainLines, is_live, progress_bar


class Clock:
    """A clock that each look at it moves on."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def lines_of(monkeypatch, step: float, **options) -> list[str]:
    """The lines of 100 rounds of work, where each look at the clock is `step` seconds after the one before."""
    monkeypatch.setattr(progress, "time", Clock(step))
    out = io.StringIO()
    bar = PlainLines(total=100, desc="Training", unit=" steps", file=out, leave=False, **options)
    bar._time = lambda: progress.time.now
    bar.start_t = bar.last_print_t = 0.0
    for _ in range(100):
        progress.time.now += step
        bar.set_postfix_str("loss 0.5", refresh=False)
        bar.update()
    bar.close()
    text = out.getvalue()
    assert "\r" not in text and (not text or text.endswith("\n"))
    return text.splitlines()


def test_a_line_now_and_then_says_what_is_done_and_how_long_the_rest_takes(monkeypatch):
    lines = lines_of(monkeypatch, step=5.0)
    assert 5 <= len(lines) <= 40
    assert all(line.startswith("Training: ") and ", loss 0.5" in line for line in lines)
    assert " of 100 steps (" in lines[0] and lines[0].endswith(" left")


def test_short_work_gives_no_line(monkeypatch):
    assert lines_of(monkeypatch, step=0.01) == []


def test_tests_are_no_terminal_and_quiet_shows_nothing(monkeypatch, capsys):
    assert not is_live() and isinstance(progress_bar(range(3)), PlainLines)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
