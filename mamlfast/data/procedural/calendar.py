"""Families about days, months and hours."""

from random import Random

from mamlfast.data.procedural.family import Hidden, Items, draw_labels, families
from mamlfast.data.procedural.lexicon import DAYS, MONTHS


def _hour_and_day(rng: Random) -> Items:
    return [str(rng.randrange(24)), rng.choice(DAYS)]


def _day_and_month(rng: Random) -> Items:
    return [str(rng.randint(1, 28)), rng.choice(MONTHS)]


def weekday_shift(rng: Random) -> Hidden:
    """The day a hidden number of days later, at the same hour: ``9 monday`` -> ``wednesday``."""
    by = rng.randint(1, 6)
    return Hidden(inputs=_hour_and_day, answer=lambda items: DAYS[(DAYS.index(items[1]) + by) % 7])


def month_shift(rng: Random) -> Hidden:
    """The month a hidden number of months later: ``3 may`` -> ``jul``."""
    by = rng.randint(1, 3)
    return Hidden(inputs=_day_and_month, answer=lambda items: MONTHS[(MONTHS.index(items[1]) + by) % 12])


def hour_shift(rng: Random) -> Hidden:
    """The hour in another time zone: ``9 monday`` -> ``14``."""
    by = rng.randint(1, 6)
    return Hidden(inputs=_hour_and_day, answer=lambda items: str((int(items[0]) + by) % 24))


def date_format(rng: Random) -> Hidden:
    """Day and month in a hidden order, with a hidden mark: ``3 may`` -> ``may / 3``."""
    order, mark = rng.choice((1, -1)), rng.choice("/-.")
    return Hidden(inputs=_day_and_month, answer=lambda items: f" {mark} ".join(items[::order]))


def opening_hours(rng: Random) -> Hidden:
    """Open or closed on hidden days, under hidden labels: ``9 monday`` -> ``dax``."""
    labels, closed = draw_labels(rng, 2), rng.sample(DAYS, 3)
    return Hidden(inputs=_hour_and_day, answer=lambda items: labels[items[1] in closed], labels=labels)


def season(rng: Random) -> Hidden:
    """A hidden name for each quarter of the year: ``3 may`` -> ``dax``."""
    labels = draw_labels(rng, 4)
    return Hidden(inputs=_day_and_month, answer=lambda items: labels[MONTHS.index(items[1]) // 3], labels=labels)


FAMILIES = (
    *families("multi-choice", weekday_shift, month_shift, hour_shift, date_format),
    *families("classification", opening_hours, season),
)
