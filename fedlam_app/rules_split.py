"""Combinations of the split round that cannot run: held against strategies of gradient space.

The sentences are as those of ``rules.py``; ``checks.py``, which knows the strategies, asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlam_app.rules import TEXT_TASKS, has_backbone, without_backbone
from fedlam_app.rules_wireless import has_fleet

if TYPE_CHECKING:
    from fedlam_app.config import RunConfig

PRETRAINED = ("minilm", "smollm2", "gpt2")  # whose words have vectors that everybody knows
_SLACK = 1e-9  # as in the trimmed mean: 0.29 of 100 devices are 29


def broken(config: RunConfig) -> str | None:
    """Return what makes ``config`` impossible in gradient space, in one sentence, or ``None``."""
    for rule in (_server, _ranks, _wire, blocks, _robust, _buffer, _once, _trusted):
        for sentence in rule(config):
            return sentence
    return None


def _server(config: RunConfig) -> Iterator[str]:
    model, strategy = config.model, config.strategy
    if not has_backbone(config):
        what, remedy = without_backbone(config)
        yield (
            f"'strategy' = '{strategy}' is not allowed with {what}, which has no backbone to stay on the"
            f" edge server; {remedy}"
        )
    if model.backbone == "none":
        yield (
            f"'strategy' = '{strategy}' is not allowed with 'model.backbone' = 'none', which leaves nothing"
            " on the edge server; the backbone must be another, or the strategy one of adapter space"
        )
    if model.tuning != "lora":
        yield (
            f"'strategy' = '{strategy}' is not allowed with 'model.tuning' = '{model.tuning}': the edge"
            " server trains LoRA factors; the tuning must be 'lora'"
        )


def _ranks(config: RunConfig) -> Iterator[str]:
    if len(set(config.train.ranks)) > 1:
        yield (
            f"'train.ranks' = '{','.join(map(str, config.train.ranks))}' is not allowed with 'strategy' ="
            f" '{config.strategy}': the one LoRA vector is the server's; it must be empty"
        )


def _wire(config: RunConfig) -> Iterator[str]:
    wire, texts = config.wire, config.task in TEXT_TASKS
    if texts:
        return
    if wire.embedding == "token-ids":
        yield (
            f"'wire.embedding' = 'token-ids' is not allowed with 'task' = '{config.task}', which has no"
            " tokens of a vocabulary; it must be a number format"
        )
    for key, value, instead in (
        ("wire.jacobian", "'top-k'" if wire.jacobian == "top-k" else "", "a number format"),
        ("wire.delta", "true" if wire.delta else "", "false"),
    ):
        if value:
            yield (
                f"'{key}' = {value} is not allowed with 'task' = '{config.task}', whose samples never come"
                f" twice; it must be {instead}"
            )


def blocks(config: RunConfig) -> Iterator[str]:
    """Yield why blocks cannot stay on the device; the task cuts its model so, whatever the strategy."""
    kept = config.split.device_blocks
    if not kept:
        return
    key = f"'split.device-blocks' = {kept}"
    if config.task not in TEXT_TASKS:
        yield f"{key} is not allowed with 'task' = '{config.task}'; it must be 0"
    if kept >= config.model.blocks:
        yield (
            f"{key} must be below 'model.blocks' = {config.model.blocks}: at least one block stays on the"
            " edge server"
        )
    if config.split.heads == "frozen" and config.privacy.mechanism != "release-once":  # whose front is still
        yield (
            f"{key} is not allowed with 'split.heads' = 'frozen': blocks on the device train there; it must"
            " be 0, or the heads 'personal' or 'averaged'"
        )
    if config.wire.embedding == "token-ids":
        yield (
            f"{key} is not allowed with 'wire.embedding' = 'token-ids': what leaves those blocks is no word;"
            " it must be 0, or the embedding a number format"
        )


def _robust(config: RunConfig) -> Iterator[str]:
    n, robust = config.train.wanted, config.robust
    if config.strategy == "multi-krum" and n <= 2 * robust.byzantine + 2:
        yield (
            f"'robust.byzantine' = {robust.byzantine} needs more than {2 * robust.byzantine + 2} devices in a"
            f" step, and there are {n}; {_at_most((n - 3) // 2)}"
        )
    if config.strategy == "trimmed-mean" and math.floor(robust.trim * n + _SLACK) < 1:
        yield (
            f"'robust.trim' = {robust.trim:g} of the {n} devices in a step cuts nobody;"
            f" {f'it must be at least {1 / n:.3g}' if n > 2 else 'at least 3 devices are needed'}"
        )


def _buffer(config: RunConfig) -> Iterator[str]:
    n, buffer = config.train.wanted, config.fedbuff.buffer
    if config.strategy == "fedbuff" and buffer > n:
        yield f"'fedbuff.buffer' = {buffer} could never fill: {n} devices are at work; it must be 1 to {n}"


def _once(config: RunConfig) -> Iterator[str]:
    """Yield what a single release of projected vectors has no use for, or must not be made of."""
    privacy, key = config.privacy, "'privacy.mechanism' = 'release-once'"
    if privacy.mechanism != "release-once":
        return
    if config.wire.embedding == "token-ids":
        yield (
            f"'wire.embedding' = 'token-ids' is not allowed with {key}, under which no token leaves a device;"
            " it must be a number format"
        )
    if config.split.device_blocks == 0 and config.text.pool != "mean":
        yield (
            f"'text.pool' = '{config.text.pool}' is not allowed with 'split.device-blocks' = 0 and {key}: one"
            " word stands for itself alone before any block; it must be 'mean', or blocks be on the device"
        )
    kept, least = config.split.device_blocks, config.model.blocks // 2
    if kept < least and config.model.backbone in PRETRAINED:
        yield (
            f"'split.device-blocks' = {kept} is not allowed with {key}: so early in the backbone a vector"
            f" still gives away the words of its text; it must be at least {least} of 'model.blocks' ="
            f" {config.model.blocks}"
        )
    if privacy.public_texts == config.text.source:
        yield (
            f"'privacy.public-texts' = '{privacy.public_texts}' is not allowed with 'text.source' ="
            f" '{config.text.source}' and {key}: the texts that devices hold are not public; it must be"
            " another source"
        )


def _trusted(config: RunConfig) -> Iterator[str]:
    """Yield what the trusted server cannot give a guarantee for."""
    key = "'privacy.mechanism' = 'server-dp-sgd'"
    if config.privacy.mechanism != "server-dp-sgd":
        return
    if config.strategy != "fedsgd-lora":
        yield (
            f"'strategy' = '{config.strategy}' is not allowed with {key}, which noises one sum of all"
            " samples' gradients; it must be 'fedsgd-lora'"
        )
    if config.wire.jacobian == "top-k":
        yield (
            f"'wire.jacobian' = 'top-k' is not allowed with {key}: what is sent of one sample would depend on"
            " the others; it must be a number format"
        )
    if has_fleet(config) and config.wireless.transport != "ofdma":
        yield (
            f"'wireless.transport' = '{config.wireless.transport}' is not allowed with {key}, whose clipping"
            " needs every sample's gradient as it was sent; it must be 'ofdma'"
        )


def _at_most(byzantine: int) -> str:
    return f"it must be at most {byzantine}" if byzantine >= 0 else "at least 3 devices are needed"
