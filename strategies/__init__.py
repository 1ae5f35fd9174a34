"""Aggregation rules by name. Adding one: a file beside this one, and a line here."""

from strategies.algorithm import Algorithm
from strategies.fedavg_lora import FedAvgLora
from strategies.local import Local

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg-lora": FedAvgLora,
    "local": Local,
    # The pooled upper bound is FedAvg with one device that owns every shard (see tasks: ``pool``).
    "central": FedAvgLora,
}
