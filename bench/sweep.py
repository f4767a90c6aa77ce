"""What is measured of meta-gradients by default, in under three minutes on two cores, and what ``--full`` adds."""

from dataclasses import dataclass, replace

from bench.contenders import DOUBLE_BACKWARD, DOUBLE_BACKWARD_MATH, FLOOR, REPLAY, REPLAY_KEPT
from bench.models import LLAMA_5M, LLAMA_30M, Setting
from bench.peak import Case

# The setting of the memory targets. Double backward needs nearly 13 GB for it, on either attention.
MEMORY = Setting(shape=LLAMA_30M, steps=3, batch=2, tokens=1024)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """``times``: settings, each with its rounds; ``growth``: where K = 1 meets K = 6; ``peaks``: further memory."""

    times: tuple[tuple[Setting, int], ...]
    growth: Setting
    peaks: tuple[Case, ...]

    @property
    def few_steps(self) -> Setting:
        """Where growth is measured from."""
        return replace(self.growth, steps=1)

    @property
    def many_steps(self) -> Setting:
        """Where growth is measured to."""
        return replace(self.growth, steps=6)


QUICK = Sweep(
    times=(
        (Setting(shape=LLAMA_5M, steps=1, batch=1, tokens=512), 3),
        (Setting(shape=LLAMA_5M, steps=3, batch=1, tokens=128), 3),
    ),
    growth=replace(MEMORY, tokens=128),
    peaks=(),
)

_SHORT = replace(MEMORY, tokens=256)

FULL = Sweep(
    times=(
        *((Setting(shape=LLAMA_5M, steps=steps, batch=1, tokens=512), 10) for steps in (1, 2, 4, 8)),
        *((Setting(shape=LLAMA_5M, steps=2, batch=1, tokens=tokens), 10) for tokens in (256, 1024, 2048)),
        (Setting(shape=LLAMA_30M, steps=1, batch=1, tokens=512), 5),
    ),
    growth=MEMORY,
    peaks=(
        *((contender, MEMORY) for contender in (FLOOR, REPLAY_KEPT, DOUBLE_BACKWARD_MATH)),
        *((c, replace(_SHORT, steps=steps)) for steps in (1, 2, 4, 8) for c in (FLOOR, REPLAY, DOUBLE_BACKWARD)),
        *(
            (c, replace(_SHORT, steps=1, tokens=tokens))
            for tokens in (512, 1024, 2048)
            for c in (FLOOR, REPLAY, DOUBLE_BACKWARD)
        ),
    ),
)
