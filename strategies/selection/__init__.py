"""Selection policies by name. Adding one: a file beside this one, and a line here.

Equations are written as their authors' ideas are remembered, or read in public code, and were not compared
with the papers' text again: before quoting one as a paper's own, look it up.
"""

from strategies.selection.age import Age
from strategies.selection.base import Policy
from strategies.selection.best_channel import BestChannel
from strategies.selection.fedcs import FedCs
from strategies.selection.fedft import FedFt
from strategies.selection.importance import Importance
from strategies.selection.lyapunov import Lyapunov
from strategies.selection.oort import Oort
from strategies.selection.power_of_choice import PowerOfChoice, PowerOfChoiceStale
from strategies.selection.proportional_fair import ProportionalFair
from strategies.selection.tifl import Tifl
from strategies.selection.uniform import Uniform
from strategies.selection.update_aware import UpdateAware

POLICIES: dict[str, type[Policy]] = {
    "random": Uniform,
    "best-channel": BestChannel,
    "proportional-fair": ProportionalFair,
    "fedcs": FedCs,
    "tifl": Tifl,
    "oort": Oort,
    "power-of-choice": PowerOfChoice,
    "power-of-choice-stale": PowerOfChoiceStale,
    "importance": Importance,
    "age": Age,
    "update-aware": UpdateAware,
    "lyapunov": Lyapunov,
    "fedft": FedFt,
}
