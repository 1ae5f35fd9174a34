"""What a mechanism promises, in words: printed before a run starts, and kept beside its numbers.

An epsilon without its unit, its adversary and its gaps is no promise. The threat model of the paper
(arXiv:2505.00321) noises gradients at the cut and sends embeddings clear: that hides labels, given the
embeddings, and nothing of the inputs (a clear embedding gives away every token; the row space of the LoRA
gradients gives away who took part, whatever the noise). So the modes that do so are called label-DP here, and
print no epsilon for inputs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedlam_app.config import RunConfig

LABELS = "label-DP given embeddings"
INPUTS = "input and label DP"
DEVICES = "device-level DP"


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One run's promise."""

    mechanism: str
    label: str  # what kind of privacy this is, in a few words
    unit: str  # whose data an epsilon is about
    adjacency: str  # which neighbours the epsilon compares
    released: str  # what leaves
    adversary: str  # against whom the epsilon holds
    trusted: str  # who sees more than that
    sampling: str  # what the accountant assumes of who takes part
    randomness: str
    epsilon: float  # the largest budget of a device
    delta: float
    uncovered: tuple[str, ...]  # what the epsilon says nothing of
    accountant: str = "Rényi DP, at the orders of Opacus and larger ones"

    def text(self) -> str:
        """Return the promise as lines to print."""
        budget = "none: nothing is promised" if math.isinf(self.epsilon) else f"{self.epsilon:g}"
        lines = [
            f"privacy: {self.label} ({self.mechanism}), epsilon at most {budget} at delta = {self.delta:g}",
            f"  unit: {self.unit}; {self.adjacency}",
            f"  released: {self.released}",
            f"  holds against: {self.adversary}; trusted: {self.trusted}",
            f"  sampling: {self.sampling}; noise: {self.randomness}",
            f"  NOT covered: {'; '.join(self.uncovered)}",
        ]
        return "\n".join(lines)

    def record(self) -> dict[str, object]:
        """Return the promise as JSON."""
        return asdict(self)


def statement(config: RunConfig) -> Statement | None:
    """Return what a run promises; ``None`` where it promises nothing."""
    privacy = config.privacy
    if not privacy.on:
        return None
    words = _WORDS[privacy.mechanism]
    sampling, uncovered = words["sampling"], [*_ALWAYS, *words["uncovered"]]
    adversary, trusted = words["adversary"], words["trusted"]
    if privacy.mechanism == "client":
        if privacy.cohort == "poisson":
            sampling = "a secret coin a device and round; every round counts, at that rate"
            adversary += ", and does not learn whom the coins chose"
        if privacy.secure:
            adversary += (
                "; of single updates the server learns nothing but their sum, if it follows the protocol and"
                " fewer devices help it than open a mask"
            )
            trusted = "the server, to add the noise to the sum"
    if privacy.count_channel_noise:
        trusted += "; and the receiver's noise floor, which counts towards the noise"
        adversary = "whoever hears no better than the worst case that was assumed, or gets the model"
        uncovered += ["the server, which owns the receiver", "whoever knows the seed of the channel's noise"]
    if not privacy.ledgers:
        uncovered.append("other runs on the same data (privacy.ledgers = a folder counts them)")
    if privacy.randomness == "seed":
        uncovered.append("whoever knows the run's seed (privacy.randomness = 'device' closes this)")
    owner = "server" if privacy.mechanism in ("client", "server-dp-sgd") else "device"
    return Statement(
        mechanism=privacy.mechanism,
        label=words["label"],
        unit=words["unit"],
        adjacency=words["adjacency"],
        released=words["released"],
        adversary=adversary,
        trusted=trusted,
        sampling=sampling,
        randomness="AES-256 keyed by "
        + ("the run's seed" if privacy.randomness == "seed" else f"a secret of the {owner}'s own"),
        epsilon=max(privacy.device_epsilons or [privacy.target_epsilon]),
        delta=privacy.delta,
        uncovered=tuple(uncovered),
    )


_ALWAYS = (
    "who takes part and when",
    "how many samples a device has",
    "how long a device computes, and with how much memory",
    "evaluation metrics, on training samples too",
    "the tuning of hyper-parameters",
    "floating-point attacks on the noise",
    "a server that has devices run another program or another configuration than this one",
)
_COPIES = "the same sample twice, on a device or on several"
_VISIBLE = "none claimed: batches are visible to the server, so every release counts in full"
_CLEAR = (
    "the inputs: embeddings go up clear, and every token can be read from them",
    "membership: LoRA gradients span the embeddings of those who took part",
    _COPIES,
)

_WORDS: dict[str, dict[str, Any]] = {
    "dp-sgd": {
        "label": "sample-level DP",
        "unit": "one training sample of a device, input and label",
        "adjacency": "neighbours differ in one sample that is there or not",
        "released": "the device's adapter after its local DP-SGD steps, every round",
        "adversary": "the server and whoever gets the model",
        "trusted": "nobody but the device itself",
        "sampling": "Poisson, each sample by its own secret coin at every step",
        "uncovered": (_COPIES,),
    },
    "client": {
        "label": DEVICES,
        "unit": "all data of one device",
        "adjacency": "neighbours differ in one device that is there or not",
        "released": "the noised mean of the clipped updates, every round (of the split: every step)",
        "adversary": "whoever gets the model",
        "trusted": "the server, which sees the updates and adds the noise",
        "sampling": "none claimed: every round in which a device takes part counts in full",
        "uncovered": (),
    },
    "server-dp-sgd": {
        "label": "sample-level DP towards model recipients",
        "unit": "one training sample of a device, input and label",
        "adjacency": "neighbours differ in one sample that is there or not",
        "released": "the noised sum of the clipped per-sample LoRA gradients, every step",
        "adversary": "whoever gets the LoRA adapter, and not the server",
        "trusted": "the server, which sees clear embeddings and Jacobians and adds the noise",
        "sampling": "Poisson, each sample by a coin that the trusted server throws",
        "uncovered": (_COPIES, "who is drawn for a batch, from whoever knows the run's seed"),
    },
    "jacobian": {
        "label": LABELS,
        "unit": "the label of one training sample",
        "adjacency": "neighbours differ in one label",
        "released": "clipped and noised Jacobians, and all that follows from them and the clear embeddings",
        "adversary": "the server and whoever gets the model",
        "trusted": "nobody but the device itself",
        "sampling": _VISIBLE,
        "uncovered": _CLEAR,
    },
    "logit": {
        "label": LABELS,
        "unit": "the label of one training sample",
        "adjacency": "neighbours differ in one label",
        "released": "Jacobians, and the head, made from noised logit gradients",
        "adversary": "the server and whoever gets the model",
        "trusted": "nobody but the device itself",
        "sampling": _VISIBLE,
        "uncovered": _CLEAR,
    },
    "randomised-response": {
        "label": LABELS,
        "unit": "the label of one training sample",
        "adjacency": "neighbours differ in one label; pure epsilon, delta is not used",
        "released": "labels, each replaced once by a random one with a fixed chance, and all that follows",
        "adversary": "the server and whoever gets the model",
        "trusted": "nobody but the device itself",
        "sampling": "none needed: a label is randomised once, however often it is used",
        "uncovered": _CLEAR,
    },
    "release-once": {
        "label": INPUTS,
        "unit": "one training sample of a device, input and label",
        "adjacency": "neighbours differ in one sample that is there or replaced by an empty one",
        "released": "one clipped, noised, projected vector a sample, its randomised label, and what follows",
        "adversary": "the server and whoever gets the model",
        "trusted": "nobody but the device itself",
        "sampling": "none needed: a sample is released once, however often it is used",
        "uncovered": (
            "the public texts that the projection is made of",
            "test inputs, which are scored clear",
            _COPIES,
        ),
    },
}
