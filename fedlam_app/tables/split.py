"""The split round: who keeps what, what crosses the cuts and how it is coded, how gradients become a step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlam_app.tables.base import Natural, Positive, Share, Table

_Dense = Literal["fp64", "fp32", "fp16", "bf16", "int8", "int4"]


class SplitConfig(Table):
    """The cut: embedding and head on the device, backbone with LoRA on the edge server."""

    heads: Literal["personal", "averaged", "frozen"]
    """What becomes of the device's modules: each device trains its own and they never travel; or they are
    averaged every ``split.average-every`` rounds; or all devices keep the one that the seed draws."""
    average_every: Positive
    """Rounds between two averages of the device's modules."""
    head_lr: Annotated[float, Field(gt=0)]
    """Learning rate of the device's modules (plain gradient descent)."""
    freeze_embedding_after: Natural
    """Rounds after which a trained embedding (the CSI front end) stands still, which saves the gradient down
    and half of the exchanges; 0 is never."""
    cache: bool
    """Whether the server keeps embeddings that cannot change, so that each goes up once."""
    batched: bool
    """Whether the server runs its backbone once over all devices; false is the plain reference, device after
    device through the model's own modules: in float32 the same bits as the unsplit model."""
    kept_tokens: Natural
    """Tokens whose graph waits on the server for their Jacobians; those of further devices are computed
    again, so that memory does not grow with the devices of a step."""
    proximal_mu: Annotated[float, Field(ge=0)]
    """FedProx's mu on the device's modules, towards their last average; 0 is none."""
    device_blocks: Natural
    """Backbone blocks that stay on the device, with their adapters (SplitLoRA has 3 of 12); 0 is the paper's
    cut. More than 0 trains them there, so nothing can be cached."""


class WireConfig(Table):
    """How each link is coded."""

    embedding: Literal["fp64", "fp32", "fp16", "bf16", "int8", "int4", "token-ids"]
    """Device to server, first cut. ``token-ids`` sends the tokens themselves: smallest, privacy none."""
    representation: _Dense
    """Server to device, second cut."""
    jacobian: Literal["fp64", "fp32", "fp16", "bf16", "int8", "int4", "top-k"]
    """Device to server, second cut; ``top-k`` sends the largest elements in fp16, with error feedback."""
    stochastic: bool
    """Whether integer Jacobians are rounded at random, without bias, by a draw that the server subtracts."""
    top_k: Annotated[float, Field(gt=0, le=1)]
    """Share of a Jacobian's elements that ``top-k`` sends."""
    delta: bool
    """Whether a representation is coded as its change since the sample's last visit."""


class ServerConfig(Table):
    """The edge server's optimiser of the LoRA (gradient strategies)."""

    optimiser: Literal["sgd", "adamw", "adam", "yogi", "adagrad"]
    """Rule of the step; its rate is ``train.lr``."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of ``sgd``."""
    beta_1: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the first moment."""
    beta_2: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)]
    """Added to the root of the second moment."""


class RobustConfig(Table):
    """What the robust rules assume."""

    byzantine: Natural
    """Devices that may lie in a step (``multi-krum``, and all rules with ``robust.mix``)."""
    mix: bool
    """Whether a robust rule sees gradients mixed with their nearest neighbours; false is the published rule
    alone."""
    trim: Annotated[float, Field(ge=0, lt=0.5)]
    """Share cut off at each end of every coordinate (``trimmed-mean``)."""
    clip_norm: Annotated[float, Field(gt=0)]
    """Largest norm of one device's gradient (``norm-clip``), in multiples of the step's median norm."""


class AsyncConfig(Table):
    """FedBuff, and the virtual clock by which devices are fast or slow."""

    buffer: Positive
    """Gradients that make a step."""
    spread: Annotated[float, Field(ge=1)]
    """Slowest device over the fastest; speeds are log-uniform, keyed by the seed."""


class FaultsConfig(Table):
    """Faults made on purpose, on the device side, to see what the server does with them."""

    vanish: Share
    """Chance that a device, in a step, is gone before its Jacobian (or its vector) is sent."""
    attack: Literal["none", "sign-flip", "nan", "shape"]
    """What the attackers do to what they send."""
    attackers: Natural
    """How many devices attack; the first ones."""
    attack_scale: Annotated[float, Field(gt=0)]
    """Factor of a flipped Jacobian."""
