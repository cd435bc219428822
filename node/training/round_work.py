"""What a trainer has done towards its contributions: the counts, when a hand-over is due, what commands change of that.

The built-in inner loop and a script of one's own (attached_loop) differ in who computes the steps; this they have in
common. No tensor, no socket, no clock. `training` is False while there is nothing to do but wait for a command.

Invariant: work is in one of three places, and moves in this order: in the local parameters, handed over, or beside
what was handed over (`ahead`). When a base with the handed-over work in it is adopted, only `ahead` is left. After
RESTARTS_MAX times in a row at the base it is over.
"""

from shoal.node.training.checkpoint import Tally
from shoal.node.training.messages import BASE_TORN, NOT_FINITE, Failed, Progress
from shoal.protocol.manifest import Training

PROGRESS_PERIOD_S = 0.5
RESTARTS_MAX = 3


class RunningTally:
    """Steps, tokens and losses since some moment."""

    __slots__ = ("loss_sum", "since_s", "steps", "tokens")

    def __init__(self, since_s: float = 0.0) -> None:
        self.since_s = since_s
        self.steps = 0
        self.tokens = 0
        self.loss_sum = 0.0

    def add(self, tokens: int, loss: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.loss_sum += loss

    def read(self, now_s: float) -> Tally:
        """As a value, for a checkpoint."""
        age_s = max(0.0, now_s - self.since_s)
        return Tally(steps=self.steps, tokens=self.tokens, loss_sum=self.loss_sum, age_s=age_s)

    @classmethod
    def of(cls, tally: Tally, now_s: float) -> "RunningTally":
        """As it was when it was read; the time in between does not count."""
        made = cls(since_s=now_s - tally.age_s)
        made.steps, made.tokens, made.loss_sum = tally.steps, tally.tokens, tally.loss_sum
        return made


class RoundWork:
    """One trainer's. `overlap_steps` is how far it trains on beside an exchange."""

    def __init__(self, training: Training) -> None:
        self.rules = training
        self.overlap_steps = training.overlap_steps
        self.round = 0
        self.since_round = 0  # that was begun with the base that was last adopted
        self.training = False
        self.handed_over = False
        self.local = RunningTally()  # what the local parameters hold beyond the base
        self.pace = RunningTally()  # towards the next Ready
        self.ahead: RunningTally | None = None  # since the hand-over, while training goes on after it
        self._shown = RunningTally()  # since the last Progress
        self._frozen = False
        self._restarts = 0  # since the last hand-over

    def begin(self, round: int, now_s: float, *, adopted: bool) -> None:
        """Train for this round; with `adopted` what was handed over is in the base now."""
        ahead, self.ahead = self.ahead, None
        if adopted:
            self.local = RunningTally() if ahead is None else ahead
            self.since_round = round
        # A peer that was not ready when its round ended trains on towards its own Ready, however slow it is.
        if ahead is not None:
            self.pace = RunningTally.of(ahead.read(now_s), now_s)
            self._frozen = False
        elif adopted or not self.training:
            self.pace = RunningTally(since_s=now_s)
            self._shown = RunningTally(since_s=now_s)
            self._frozen = False
        self.round = round
        self.handed_over = False
        self.training = True

    @property
    def loose_steps(self) -> int:
        """Steps in the local parameters that no hand-over of this round has."""
        return self.local.steps if self.ahead is None else self.ahead.steps

    @property
    def has_handed_work(self) -> bool:
        """Whether the local parameters hold what was handed over for this round. After a way back to the base they do
        not, and nobody can move them away from it."""
        return self.handed_over and self.local.steps > (0 if self.ahead is None else self.ahead.steps)

    def start_over(self, what: str, now_s: float) -> Failed:
        """The local parameters are the base again, since `what` was not finite, and nothing of the work is left; fatal
        where that happened too often."""
        dropped = self.loose_steps
        waits, self.ahead = self.ahead is not None, None
        self.begin(self.round, now_s, adopted=True)
        if waits:  # what was handed over before may be counted, and nothing else of this round
            self.handed_over, self.ahead = True, RunningTally(since_s=now_s)
        self._restarts += 1
        self.training = self._restarts <= RESTARTS_MAX
        detail = f"not finite: {what}, in round {self.round}"
        return Failed(reason=NOT_FINITE, detail=detail, fatal=not self.training, steps_dropped=dropped)

    def drop_ahead(self) -> Failed | None:
        """What was made beside the exchange stood upon a base that was half another one: what to tell of it."""
        ahead, self.ahead = self.ahead, None
        return tell_torn(0 if ahead is None else ahead.steps, self.round)

    def take(self, local: Tally, pace: Tally, since_round: int, now_s: float) -> None:
        """Stand where a checkpoint stood."""
        self.since_round = since_round
        self.local, self.pace = RunningTally.of(local, now_s), RunningTally.of(pace, now_s)

    def freeze(self) -> None:
        """Be due after the next step, unless this round's work is handed over."""
        self._frozen = self.training and not self.handed_over

    def count(self, tokens: int, loss: float) -> None:
        """One step was made."""
        for tally in (self.local, self.pace, self._shown, self.ahead):
            if tally is not None:
                tally.add(tokens, loss)

    def is_due(self, now_s: float) -> bool:
        """Whether the local parameters are to be handed over."""
        if self.ahead is not None:
            return False
        steps, rules = self.pace.steps, self.rules
        in_time = now_s - self.pace.since_s >= rules.round_time_s and steps >= rules.steps_min
        return steps >= rules.inner_steps or in_time or self._frozen

    def is_far_ahead(self) -> bool:
        """Whether it has trained beside the exchange for as long as it may."""
        return self.ahead is not None and self.ahead.steps >= self.overlap_steps

    def hand_over(self) -> None:
        """The local parameters are handed over."""
        self.training = self.overlap_steps > 0
        self.handed_over = True
        self._restarts = 0

    def train_ahead(self, now_s: float) -> None:
        """From here on steps are made beside what was handed over."""
        self.ahead = RunningTally(since_s=now_s)
        self.training = True

    @property
    def loss_mean(self) -> float:
        """Over the steps since the last Ready."""
        return self.pace.loss_sum / self.pace.steps

    def tell_progress(self, loss: float, now_s: float) -> Progress | None:
        """What to report, where so much time has passed."""
        shown = self._shown
        if now_s - shown.since_s < PROGRESS_PERIOD_S:
            return None
        self._shown = RunningTally(since_s=now_s)
        rate = shown.tokens / (now_s - shown.since_s)
        steps, tokens = self.local.steps, self.local.tokens
        return Progress(round=self.round, steps=steps, tokens=tokens, loss=loss, tokens_per_s=rate)


def tell_torn(steps: int, round: int) -> Failed | None:
    """So many steps were dropped because of a base that was replaced while it was read; None: there were none."""
    if not steps:
        return None
    count = "1 step was" if steps == 1 else f"{steps} steps were"
    detail = f"{count} dropped, made in round {round} upon a base that was replaced while it was read"
    return Failed(reason=BASE_TORN, detail=detail, fatal=False, steps_dropped=steps)


def tell_unshifted(round: int) -> Failed:
    """The parameters stay where they are."""
    detail = f"not finite: the local parameters with the move that begins round {round}; training goes on without it"
    return Failed(reason=NOT_FINITE, detail=detail, fatal=False)
