"""How it is learned and where it runs: training, the federation, and the jobs made of several runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedlam_app.tables.base import Natural, Positive, Table, split, split_integers

SMALL_MODELS = ("rnn", "lstm", "gru", "cnn", "transformer")
CLASSICAL = ("repeat-last", "ar", "pad", "wiener-ar", "ridge")
COMPETITORS = (
    "llm4cp-local",
    *(f"{name}-local" for name in SMALL_MODELS),
    "central",
    "central-small",
    *CLASSICAL,
)
Competitor = Literal[COMPETITORS]  # type: ignore[valid-type]


class TrainConfig(Table):
    """How it is learned."""

    devices: Positive
    """Edge servers (devices) of the job ``train``; the case study has ``case-study.servers`` instead."""
    cohort: Natural
    """Devices that take part in a step, drawn by a keyed generator; 0 is all of them."""
    rounds: Positive
    """Federated rounds."""
    local_steps: Positive
    """Optimiser steps in one round: a device's own, or the edge server's where the model is split."""
    batch_rows: Positive
    """Rows in a device's batch: a row is one antenna of one user, one text, or one example. Where shards of
    texts are unequal it is the mean over devices, and batches are as unequal as the shards."""
    optimiser: Literal["adamw", "sgd"]
    """The devices' own optimiser: AdamW, or plain gradient descent. Where the model is split, the edge
    server's is ``server.optimiser``."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate of the devices' optimiser, or of the edge server's where the model is split."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Decoupled weight decay."""
    clip_norm: Annotated[float, Field(ge=0)]
    """Largest gradient norm; 0 clips nothing."""
    ranks: Annotated[tuple[Positive, ...], BeforeValidator(split_integers)]
    """LoRA ranks of the device profiles, comma-separated; device k has the k-th, in turns. Empty:
    ``model.rank`` for all. The largest must be ``model.rank``."""
    proximal_mu: Annotated[float, Field(ge=0)]
    """FedProx's mu (``strategy = "fedprox"``)."""
    evaluate_every: Positive
    """Rounds between two evaluations; the last round is always evaluated."""
    evaluate_antennas: Positive
    """Antennas of each held-out user that the periodic evaluation takes; the final one takes all."""

    @property
    def wanted(self) -> int:
        """Devices that a step asks for."""
        return self.cohort or self.devices

    @property
    def share(self) -> float:
        """Share of the steps that a device takes part in on average."""
        return min(1.0, self.wanted / self.devices)

    def steps(self, space: str) -> int:
        """Return the steps of a rule of that space in a run: a round each, or a local step each."""
        return self.rounds * (self.local_steps if space == "gradient" else 1)


class FederationConfig(Table):
    """Where it runs; nothing here changes a number."""

    supernodes: Annotated[int, Field(ge=1, le=1024)]
    """SuperNodes that carry the devices; one Ray actor each is best, so: the CPU cores."""
    side_by_side: Annotated[int, Field(ge=1, le=64)]
    """Experiments of one job that run at the same time, so that one with a single device idles no core."""
    server_threads: Natural
    """Torch threads of the edge server's large model; 0 is every core. Another may change last bits."""
    timeout_s: Annotated[float, Field(gt=0)]
    """Wall seconds after which an exchange goes on without those who have not answered."""
    placement: Literal["packed", "sites"]
    """``packed`` spreads the devices over all SuperNodes; ``sites``: each SuperNode is the one device that
    its operator named in ``--node-config "partition-id=K"``, and a device's work goes to its own site."""


class CaseStudyConfig(Table):
    """The paper's case study: numbers of edge servers, seeds, and who they are compared with."""

    servers: Annotated[tuple[Positive, ...], BeforeValidator(split_integers), Field(min_length=1)]
    """Numbers of edge servers, comma-separated."""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(split_integers), Field(min_length=1)
    ]
    """Seeds, comma-separated; every figure is a mean over them."""
    competitors: Annotated[tuple[Competitor, ...], BeforeValidator(split)]
    """Who stands beside the federated model, comma-separated; ``X-local`` trains on each shard alone."""


class CompareConfig(Table):
    """The job ``compare``: the same task under several strategies, in one warm run."""

    strategies: Annotated[tuple[str, ...], BeforeValidator(split)]
    """Strategies, comma-separated."""
    policies: Annotated[tuple[str, ...], BeforeValidator(split)]
    """Selection policies, comma-separated, each under each strategy (with a fleet); empty: the run's own."""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(split_integers), Field(min_length=1)
    ]
    """Seeds, comma-separated; every figure is a mean over them."""


class SweepConfig(Table):
    """The job ``sweep``: every combination of some values of some keys, in one warm run."""

    over: str
    """Axes, ``key=value,value``, separated by ``;``: an experiment for every combination. Within a value
    ``|`` is the comma of a list; the axis ``seed`` repeats them all."""
