"""The figure of a search: which lines it has, and what they are called."""

from distill_llm.report.search_figure import draw_search


def search(plain=2.0, best=1.0):
    return {"plain": plain, "best": best, "history": [[plain, None], [best, plain]], "tried": 4}


def names(rounds):
    return [each.get_text() for each in draw_search({"rounds": rounds}).legends[0].get_texts()]


def test_searches_are_named_by_round_and_by_cut_where_there_are_several():
    assert names([{"search": [search()]}]) == ["best", "median", "plain plan"]
    assert names([{"search": [search()]}, {"search": [search()]}])[:2] == ["round 1", "round 2"]
    assert names([{"search": [search(), search()]}, {}])[:2] == ["round 1, cut 1", "round 1, cut 2"]
    assert draw_search({"rounds": [{}]}) is None


def test_what_is_not_finite_has_no_place_in_it():
    (axes,) = draw_search({"rounds": [{"search": [search(plain=None)]}]}).axes
    lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata())]
    assert [[y == y for y in line] for line in lines] == [
        [False, False],
        [False, True],
    ]  # median and best; no plain plan
