"""Aggregation rules by name. Adding one: a file beside this one, and a line here."""

from strategies.algorithm import Algorithm
from strategies.fed_sb import FedSb
from strategies.fedavg_lora import FedAvgLora
from strategies.fedbuff import FedBuff
from strategies.fedex_lora import FedExLora
from strategies.fedprox import FedProx
from strategies.fedsa_lora import FedSaLora
from strategies.fedsgd_lora import FedSgdLora
from strategies.ffa_lora import FfaLora
from strategies.flexlora import FlexLora
from strategies.flora import Flora
from strategies.hetlora import HetLora
from strategies.local import Local
from strategies.median import Median
from strategies.multi_krum import MultiKrum
from strategies.norm_clip import NormClip
from strategies.rolora import RoLora
from strategies.scaffold import Scaffold
from strategies.splitlora import SplitLora
from strategies.trimmed_mean import TrimmedMean

ALGORITHMS: dict[str, type[Algorithm]] = {
    # Gradient space: the large model is split, and stays on the edge server.
    "fedsgd-lora": FedSgdLora,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "multi-krum": MultiKrum,
    "norm-clip": NormClip,
    "scaffold": Scaffold,
    "fedbuff": FedBuff,
    "splitlora": SplitLora,
    # Adapter space: a device trains the whole model for some steps of its own.
    "fedavg-lora": FedAvgLora,
    "fedit": FedAvgLora,  # its name where the federation is of language models
    "fedavg-full": FedAvgLora,  # with model.tuning = "full": plain FedAvg of the whole model
    "fedprox": FedProx,
    "ffa-lora": FfaLora,
    "rolora": RoLora,
    "flora": Flora,
    "fedex-lora": FedExLora,
    "flexlora": FlexLora,
    "hetlora": HetLora,
    "fedsa-lora": FedSaLora,
    "fed-sb": FedSb,
    # The two bounds: no sharing, and FedAvg with one device that owns every shard.
    "local": Local,
    "central": FedAvgLora,
}
