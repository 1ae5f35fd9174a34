"""What the devices hold, and what is learned from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedlam_app.tables.base import Natural, Positive, Snr, Speed, Table, known_scenarios


class DataConfig(Table):
    """What the devices hold: channels, how they are shared out, how noisy they are."""

    source: str
    """``sionna`` (TR 38.901 channels, generated and cached), or the absolute path of an ``.npz`` file or of a
    folder of LLM4CP ``.mat`` files."""
    test_source: str
    """Held-out channels: a path as in ``source``, or empty to split them from the same source, by user."""
    scenario: Annotated[str, AfterValidator(known_scenarios)]
    """TR 38.901 scenario and line of sight; a comma list is a mixture in equal parts (sionna only)."""
    duplex: Literal["tdd", "fdd"]
    """Whether the future is on the history's own band (tdd) or on the downlink band beside it (fdd)."""
    users: Positive
    """Users from whom the devices' shards are drawn."""
    test_users: Positive
    """Held-out users, never in any shard."""
    speed_min_kmh: Speed
    """Slowest user [km/h]; speeds are uniform between the two."""
    speed_max_kmh: Speed
    """Fastest user [km/h]."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Part of the users that one device holds; shards are disjoint."""
    shards: Positive
    """Shards that exist, one an edge server; the global training loss is over the union of all of them,
    however many take part."""
    partition: Literal["iid", "speed", "scenario"]
    """How users are shared out: at random, sorted by speed, or by scenario."""
    snr_train_min_db: Snr
    """Lowest SNR of a training history [dB]; drawn uniformly, per user and batch."""
    snr_train_max_db: Snr
    """Highest SNR of a training history [dB]."""
    snr_test_db: Snr
    """SNR of every held-out history [dB]."""
    cache: str
    """Absolute folder of what can be made again (channels, converted weights); empty: $FEDLAM_CACHE, or else
    ~/.cache/fedlam."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The parts of the mixture."""
        return tuple(self.scenario.split(","))


class TextConfig(Table):
    """What the devices hold in the text tasks; ``data`` is about channels."""

    source: Annotated[str, Field(min_length=1)]
    """``rotten-tomatoes``, ``imdb``, ``bbc-news``, the absolute path of a .csv or .jsonl file or of a folder
    of them, or ``hub:OWNER/NAME`` for a Hugging Face data set (the package ``datasets``, and the hub)."""
    text_column: Annotated[str, Field(min_length=1)]
    """Column that holds the text (files and hub)."""
    label_column: Annotated[str, Field(min_length=1)]
    """Column that holds the label (files and hub)."""
    train: Natural
    """Training texts, drawn by the seed; 0 is all that the source has."""
    test: Natural
    """Held-out texts, drawn by the seed; 0 is all that the source holds out."""
    max_tokens: Annotated[int, Field(ge=4, le=512)]
    """Longest text [tokens]; the rest is cut off."""
    partition: Literal["iid", "dirichlet"]
    """How training texts are shared out: at random, or with Dirichlet shares of each label."""
    dirichlet: Annotated[float, Field(gt=0)]
    """Concentration of those shares: the smaller, the more unlike the devices."""
    pool: Literal["mean", "first", "last"]
    """What the head sees of a text: the mean of its tokens, the first (CLS), or the last (causal models)."""
    supervise: Literal["answer", "all"]
    """Language modelling: learn the answer after the text alone, or every next token."""


class MixtureConfig(Table):
    """What the devices of the task ``mixture`` hold: points of Gaussians, made for each device on demand."""

    classes: Annotated[int, Field(ge=2)]
    """Classes, each several Gaussians."""
    features: Annotated[int, Field(ge=2)]
    """Features of an example."""
    clusters: Positive
    """Gaussians of a class; with one alone a linear model is as good as any."""
    noise: Annotated[float, Field(gt=0)]
    """Standard deviation of a feature around its Gaussian's mean, whose own root mean square is 1."""
    examples: Positive
    """Median of a device's training examples; sizes are lognormal, and at least 16."""
    spread: Annotated[float, Field(ge=0, le=5)]
    """Standard deviation of ln(examples) over devices."""
    dirichlet: Annotated[float, Field(gt=0)]
    """Concentration of each device's shares of the classes: the smaller, the more unlike the devices."""
    test: Positive
    """Held-out examples, of all classes alike."""
    hidden: Positive
    """Hidden units of the perceptron that learns it."""


class ModelConfig(Table):
    """What is learned: embedding | frozen backbone + tuned parameters | head."""

    name: Annotated[str, Field(min_length=1)]
    """The predictor: a name in ``fedlam_app/models/predictors.py`` (`fedlam ls`)."""
    backbone: Annotated[str, Field(min_length=1)]
    """Pretrained transformer in the middle of an llm4cp model; ``random`` has its shape with random frozen
    weights, ``none`` joins embedding and head directly. The small models have no backbone and ignore it."""
    blocks: Positive
    """Transformer blocks kept, from the first."""
    tuning: Literal["lora", "ln", "full", "none"]
    """What trains inside the backbone: low-rank adapters, the layer norms, everything, or nothing."""
    lora_on: Literal["all", "attention"]
    """Which linears LoRA adapts: every one, or the queries and values of attention alone."""
    rank: Positive
    """LoRA rank r."""
    alpha: Positive
    """LoRA scale: the adapter is multiplied by alpha / r."""
    anchor: Literal["none", "ar"]
    """Forecast to which the model adds a gated residual that starts at zero (llm4cp-clean only)."""
    precision: Literal["float32", "float64"]
    """Arithmetic of the model; float64 is for proofs of equality."""
    weights: str
    """Absolute path of the backbone's weights; empty: installed weight package, hub cache, then hub."""
