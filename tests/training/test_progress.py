"""Bars count, outer bars move along, and lines go to stdout."""

import io

from effkern.training import also_on_draw, progress, say


def test_bars_run_over_iterables_and_counts():
    assert list(progress(range(5), "five")) == [0, 1, 2, 3, 4]
    with progress(3, "three") as bar:
        bar.update(2)
        assert (bar.n, bar.total) == (2, 3)


def test_drawing_tells_the_outer_bar_and_stops_telling():
    told = []
    with also_on_draw(lambda: told.append("outer")):
        with also_on_draw(lambda: told.append("inner")):
            list(progress(range(3), "x", file=io.StringIO(), mininterval=0, miniters=1, delay=0))
        assert told == ["inner"] * 3
        list(progress(range(1), "x", file=io.StringIO(), mininterval=0, miniters=1, delay=0))
    list(progress(range(2), "x", file=io.StringIO(), mininterval=0, miniters=1, delay=0))
    assert told == ["inner"] * 3 + ["outer"]


def test_a_log_is_not_filled_with_what_is_over_in_seconds(capsys):
    for _ in progress(range(1000), "fast"):
        pass
    say("a line")
    said = capsys.readouterr()
    assert said.err == "" and said.out == "a line\n"
