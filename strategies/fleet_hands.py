"""What a federation of a wireless fleet works with: a policy and its clock, its models, its receiver.

Whoever's memory does not hold its part of the work is never asked (``memory_gate.py``).
"""

from __future__ import annotations

import numpy as np

from fedlam_app.config import RunConfig
from fedlam_app.models.split import SplitModel
from fedlam_app.tasks.base import Task
from strategies.algorithm import Algorithm
from strategies.analog import receiver
from strategies.concurrent import Concurrent
from strategies.device_dp import DeviceDp
from strategies.hands import Hands
from strategies.loads import Doubles, WholeLoad, passes
from strategies.memory_gate import gate
from strategies.over_air import OverAir
from strategies.private_air import PrivateAir
from strategies.reception import Straight, Summed
from strategies.split_meter import SplitMeter, Unmetered
from strategies.versions import Newest, Versions
from strategies.wireless import Wireless


def on_air(
    config: RunConfig, algorithm: Algorithm, task: Task, model: SplitModel, examples: Doubles
) -> Hands:
    """Return what the fleet of ``config`` makes of them; ``examples`` (N,) are the devices'.

    ValueError where no device's memory holds its part of the work.
    """
    split = algorithm.space == "gradient"
    concurrent = config.selection.mode == "asynchronous" or not algorithm.waits
    steps = 1 if split else config.train.local_steps
    participation = (Concurrent if concurrent else Wireless)(config, steps, examples.astype(np.float32))
    participation.by_examples, participation.forward = not split, 1.0 / passes(config)
    cost, ram = task.cost(), participation.fleet.devices.ram
    participation.able, algorithm.limits = gate(config, cost, model, algorithm, ram)
    reception = Straight(algorithm)
    if config.privacy.mechanism == "client":
        over_air = config.wireless.transport == "air"
        reception = (PrivateAir if over_air else DeviceDp)(algorithm)
    elif config.wireless.transport == "air":
        reception = OverAir(algorithm, config.wireless, config.seed)
    elif algorithm.linear and participation.policy.unbiased and not split:
        reception = Summed(algorithm)
    versions = Versions(algorithm) if concurrent else Newest(algorithm)
    return Hands(
        participation,
        versions,
        reception,
        SplitMeter(config, cost, task.selection, model, examples) if split else Unmetered(),
        None if split else WholeLoad(config, cost, model, examples),
        receiver(config, algorithm, versions),
    )
