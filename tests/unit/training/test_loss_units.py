"""What a loss is in: of every task that is built in, and how it is shown."""

import pytest

from shoal.node.training.loss_units import LOSS_UNITS, find_loss_unit, has_perplexity, write_loss
from shoal.node.training.tasks import TASKS


def test_every_task_that_is_built_in_has_one_and_no_other() -> None:
    assert LOSS_UNITS.keys() == TASKS.keys()
    assert find_loss_unit("custom") == ""


@pytest.mark.parametrize(
    ("unit", "shown", "perplexity"),
    [("nats a token", "1.5 nats a token", True), ("squares", "1.5 squares", False), ("", "1.5", False)],
)
def test_a_loss_is_shown_with_it(unit: str, shown: str, perplexity: bool) -> None:
    assert write_loss("1.5", unit) == shown
    assert has_perplexity(unit) == perplexity
