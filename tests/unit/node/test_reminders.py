"""What the log says again and again: at once, then once an interval, with the count of what was left out."""

from shoal.node.reminders import Reminders


def test_the_first_is_said_at_once_and_the_next_after_the_interval_with_what_was_left_out() -> None:
    reminders: Reminders[str] = Reminders(every_s=60.0)
    assert reminders.take("a", 0.0) == ""
    assert [reminders.take("a", at) for at in (0.1, 30.0, 59.9)] == [None] * 3
    assert reminders.take("b", 59.9) == "", "of another it is the first"
    assert reminders.take("a", 60.0) == " (and 3 times more since it was last said)"
    assert reminders.take("a", 119.9) is None
    assert reminders.take("b", 119.9) == "", "nothing was left out"


def test_many_keys_are_no_way_around_it() -> None:
    reminders: Reminders[int] = Reminders(every_s=60.0, keys_max=2)
    said = [reminders.take(key, float(key)) for key in range(50)]
    assert said == ["", "", *[None] * 48]
    assert [reminders.take(60, 60.0), reminders.take(61, 60.0)] == ["", None], "the oldest made room, and only that one"
    assert reminders.take(1, 61.0) == "", "the other one's turn is over too"
