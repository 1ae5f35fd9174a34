"""DP-SGD on a trusted edge server: every sample's LoRA gradient clipped, one noise for their sum.

    g_i = (dr_i / d(A, B))^T dl_i/dr_i                                    one sample's gradient
    G = sum_k sum_(i in batch k) g_i min(1, C_k / ||g_i||) + N(0, (z C)^2 I_p)
    (A, B) <- Optimiser(A, B; G / sum_k q_k n_k)                          the expected batch: a constant

M. Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv:1607.00133, where gradients are
put together on a server that sees clear embeddings and Jacobians: the guarantee is towards whoever gets the
adapter, and not towards the server. Against noise on the devices (``clients/split_private.py``) the noise is
added once and not once a sample, so the signal grows with the batch; for small batches, noise on pooled
Jacobians is less (and holds against the server, but for labels alone).

Batches are Poisson: device k's samples each have a coin of chance q_k at every step (``TextTask.ids``). A
step at which nobody is drawn is a step of noise alone, and is charged like every other. A device's samples
are in no other device, so device k's book has the events (q_k, z_k), one for each step of which it was asked
to be part, whether or not an answer came. Coins are of the run's seed, as the devices must throw them too:
whoever knows the seed knows the batches, and for him there is no amplification.

Budgets may differ (``privacy.device-epsilons``), and so may rates: device k needs z_k. The noise is one for
all, so z = min_k z_k, and who needs more clips lower, C_k = C z / z_k: its samples meet z C / C_k = z_k.

A device sends the Jacobians of its samples' own losses, not of the batch's mean, and they are rounded to
nearest, so that what is sent of one sample does not depend on the others. The heads stand still, norms and
losses of single devices are told to no policy, and a rule that needs more than the sum is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlam_app.config import RunConfig, experiment
from fedlam_app.models.split import SplitModel
from fedlam_app.privacy.accounting import BudgetSpent, Ledger, Release
from fedlam_app.privacy.noise import Stream, digest
from fedlam_app.rules_wireless import has_fleet
from fedlam_app.tasks.base import Task
from fedlam_app.tasks.text import TextTask
from strategies.algorithm import Algorithm
from strategies.base import Cost, Grid
from strategies.device_books import Books, server_secret
from strategies.hands import Hands
from strategies.large_model import PerSample
from strategies.link import Answer, Ids, Rows
from strategies.split_lora import SplitFederation

CRUMB = 1e-3  # of epsilon: what calibration leaves of a budget is not worth its noise


class TrustedFederation(SplitFederation):
    """A split federation whose server clips, adds the noise and keeps the ledgers."""

    def __init__(
        self,
        algorithm: Algorithm,
        cell: str,
        devices: Sequence[int],
        config: RunConfig,
        task: Task,
        model: SplitModel,
        hands: Hands | None = None,
    ) -> None:
        super().__init__(algorithm, cell, devices, config, task, model, hands)
        assert isinstance(task, TextTask)
        self.large = self.samples = PerSample(model, config.split)
        self.books = Books(config.privacy, devices, together=False)
        self.rates = {k: task.rate(k) for k in devices}
        self.expected = {k: self.rates[k] * task.examples(k) for k in devices}  # samples a step
        self.noise = self._planned()
        self._run, self._secret = experiment(config), server_secret(config)
        self._paying: list[int] = []

    def train_round(self, grid: Grid, number: int) -> Cost:
        """Run round ``number`` (1-based) and return its cost."""
        cost = super().train_round(grid, number)
        self.ledgers = self.books.texts()
        return cost

    # --- a step -------------------------------------------------------------------------------------

    def _cohort(self, step: int) -> list[int]:
        """Charge the devices of a step, before anything is asked; return those with samples in it."""
        self._paying = [k for k in self.turn.ids if self._pays(k, step)]
        clip, asked = self.config.privacy.clip, {k: self.noise[k] for k in self._paying}
        least = min((z for z in asked.values() if z > 0.0), default=0.0)
        self._std = least * clip
        self._clips = {k: clip * least / z if z > 0.0 else clip for k, z in asked.items()}
        self._total = np.zeros(self.algorithm.models().shape[1])
        return [k for k in self._paying if self.link.has_batch(k, step)]

    def _learn(
        self, step: int, group: list[int], jacobians: list[Rows], answers: dict[int, Answer], ends: Ids
    ) -> None:
        """Add the clipped gradients of a group's samples; who did not answer has Jacobians of zero."""
        clips = np.repeat([self._clips[k] for k in group], [len(own) for own in jacobians])
        self._total += self.samples.clipped(np.concatenate(jacobians), clips)
        self.cost.server_cpu_s += self.large.spent_s()

    def _close(self, step: int) -> None:
        """Add the noise, and give the rule one gradient."""
        # A step that is begun again, with other answers than at first, is another release, and is charged.
        name = digest(self._run, step, self._total, self._std)
        said = Stream(self._secret, "said", name).bytes(16).hex()
        if self._paying and all(self._pays(k, step, "sum", said) for k in self._paying):
            expected = sum(self.expected[k] for k in self._paying)
            stream = Stream(self._secret, "server-dp-sgd", step, name)
            noised = self._total + stream.normal(self._total.shape, self._std)
            self.algorithm.fold(self._paying[0], noised / expected, 1.0)  # type: ignore[arg-type]  # float64
        super()._close(step)

    def _pays(self, device: int, step: int, part: str = "", said: str = "") -> bool:
        """Charge a device for a step, or for another sum of it; false where its budget does not allow it."""
        group, z = f"{self._run} step {step}", self.noise[device]
        release = Release(group=group, part=part, digest=said or group, z=z, q=self.rates[device])
        try:
            self.books.charge([device], release)
        except BudgetSpent as error:
            if device not in self.refused:
                self.failed(f"step {step}: device {device} was left out: {error}")
            self.refused.add(device)
            return False
        return True

    def _planned(self) -> dict[int, float]:
        """Return each device's noise multiplier: as asked for, or the least for the steps it will have."""
        config, known = self.config, dict[tuple[str, float, int], float]()
        if config.privacy.noise_multiplier:
            return dict.fromkeys(self.devices, config.privacy.noise_multiplier)
        last = config.train.steps("gradient")
        steps = Counter(dict.fromkeys(self.devices, last))
        if not has_fleet(config):  # then who takes part is known beforehand
            steps = Counter(k for number in range(1, last + 1) for k in self.algorithm.cohort(number))
        planned = {}
        for k in self.devices:
            book = self.books.of(k)
            key = book.to_json(), self.rates[k], max(1, steps[k])
            if key not in known:
                known[key] = _least(book, *key[1:])
            planned[k] = known[key]
        return planned

    # --- resumption -----------------------------------------------------------------------------------

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Return the split's arrays, the ledgers, and the noise that was planned when all was unspent."""
        noise = np.array([self.noise[k] for k in self.devices])
        return super().state() | self.books.state() | {"privacy.noise": noise}

    def load(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Continue from the arrays of an earlier round."""
        self.books.load(state)
        self.noise = dict(zip(self.devices, state.pop("privacy.noise").tolist(), strict=True))
        super().load(state)
        self.ledgers = self.books.texts()


def _least(book: Ledger, q: float, steps: int) -> float:
    """Return the least noise that the rest of a budget allows; 0, which is refused, where none is left."""
    if book.budget - book.epsilon < CRUMB:
        return 0.0
    return book.calibrate(q, steps)
