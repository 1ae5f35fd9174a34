"""A run small enough for a test and whole enough to mean something: made channels, one random block."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedlam_app.config import Scalar


def tiny_run(folder: Path, users: int = 36) -> dict[str, Scalar]:
    """Return overrides of a run on ``users`` made users: 4 servers, three rounds of two steps."""
    return {
        "job": "train",
        "seed": 7,
        "data.source": str(write_channels(folder / "channels.npz", users)),
        "data.users": 24,
        "data.test-users": 12,
        "data.shards": 4,
        "data.share": 0.25,
        "model.backbone": "random",
        "model.blocks": 1,
        "train.devices": 4,
        "train.rounds": 3,
        "train.local-steps": 2,
        "train.batch-rows": 8,
        "train.evaluate-every": 2,
        "train.evaluate-antennas": 2,
    }


def tiny_text_run(folder: Path, texts: int = 90) -> dict[str, Scalar]:
    """Return overrides of a run on made texts: 4 devices, two rounds of two steps."""
    return {
        "job": "train",
        "seed": 7,
        "task": "text-classification",
        "text.source": str(write_texts(folder / "texts.jsonl", texts)),
        "text.train": 48,
        "text.test": 16,
        "text.max-tokens": 16,
        "model.backbone": "random",
        "model.blocks": 1,
        "train.devices": 4,
        "train.rounds": 2,
        "train.local-steps": 2,
        "train.batch-rows": 4,
        "train.evaluate-every": 2,
        "federation.server-threads": 1,
    }


def tiny_mixture_run() -> dict[str, Scalar]:
    """Return overrides of a run on made points: 4 devices, four rounds of three steps."""
    return {
        "job": "train",
        "seed": 7,
        "task": "mixture",
        "mixture.test": 200,
        "train.devices": 4,
        "train.rounds": 4,
        "train.local-steps": 3,
        "train.batch-rows": 16,
        "train.evaluate-every": 2,
        "train.optimiser": "sgd",
        "train.lr": 0.1,
        "train.clip-norm": 0.0,
    }


def write_texts(path: Path, texts: int) -> Path:
    """Write short texts of two classes that some of their words give away."""
    draw = np.random.default_rng(texts)
    told = {"bad": ["dull", "cold", "grim", "awful"], "good": ["fine", "warm", "bright", "lovely"]}
    other = ["the", "a", "film", "plot", "of", "and", "very", "it", "was", "scene"]
    lines = []
    for number in range(texts):
        label = ("bad", "good")[number % 2]
        tells = draw.random(draw.integers(4, 10)) < 0.4
        text = " ".join(draw.choice(told[label] if tell else other) for tell in tells)
        lines.append(json.dumps({"text": text, "label": label}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_channels(path: Path, users: int) -> Path:
    """Write a small set of three-ray channels in the .npz layout: enough physics to learn from."""
    draw = np.random.default_rng(users)
    slots, carriers = np.arange(20)[:, None, None], np.arange(48)[None, :, None]
    channels = np.zeros((users, 20, 48, 16, 2), np.float16)
    for user in range(users):
        rays = sum(
            (draw.standard_normal() + 1j * draw.standard_normal())
            * np.exp(2j * np.pi * (draw.uniform(-0.1, 0.1) * slots + draw.uniform(0, 0.1) * carriers))
            * np.exp(2j * np.pi * draw.uniform() * np.arange(16))
            for _ in range(3)
        )
        channels[user] = np.stack([rays.real, rays.imag], -1)
    speed = np.linspace(10, 100, users, dtype=np.float32)
    np.savez(path, H=channels, speed_kmh=speed, gain_db=np.zeros(users, np.float32))
    return path
