"""Tasks by name. Adding one: a file beside this one, and a line here."""

from collections.abc import Callable

from fedlam_app.config import RunConfig
from fedlam_app.tasks.base import Task
from fedlam_app.tasks.channel_prediction import ChannelPrediction
from fedlam_app.tasks.language_modelling import LanguageModelling
from fedlam_app.tasks.mixture import Mixture
from fedlam_app.tasks.text_classification import TextClassification

TASKS: dict[str, Callable[[RunConfig], Task]] = {
    "channel-prediction": ChannelPrediction,
    "text-classification": TextClassification,
    "language-modelling": LanguageModelling,
    "mixture": Mixture,
}
