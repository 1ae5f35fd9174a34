"""A real federation, as processes: a SuperLink with TLS and node authentication, three sites of one device.

Each site has its own Flower home, its own memory and a key that the SuperLink was told of.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file

from fedlam_app.client_app import app
from fedlam_app.config import Scalar, parse
from fedlam_app.experiments.cells import cells_of
from fedlam_app.experiments.run import run_cells
from fedlam_app.experiments.track import RunFolder, read_metrics
from fedlam_app.grid import InProcessGrid
from fedlam_app.launch import status_of
from tests.processes import free_port, processes_in
from tests.tiny import tiny_run

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SITES = 3
PATIENCE_S = 120.0
PEM, OPENSSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH

pytestmark = pytest.mark.slow


@dataclass
class Field:
    """The processes, and where their files are."""

    folder: Path
    port: int
    sites: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def env(self, who: str) -> dict[str, str]:
        """The environment of one of the machines that this one stands for."""
        home = self.folder / who
        home.mkdir(exist_ok=True)
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(home),
            "FEDLAM_CACHE": str(home / "cache"),
            "FEDLAM_DEVICES": str(home / "devices"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, who: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a program of Flower's; its output goes to a file."""
        with self.log(who).open("ab") as log:
            return subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],
                env=self.env(who), stdout=log, stderr=subprocess.STDOUT, cwd=self.folder,
            )  # fmt: skip

    def log(self, who: str) -> Path:
        return self.folder / f"{who}.log"

    def flwr(self, *words: str) -> str:
        """Run ``flwr`` on the user's machine."""
        done = subprocess.run(
            [str(BIN / "flwr"), *words], env=self.env("user"), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def supernode(self, who: str, device: int) -> subprocess.Popen[bytes]:
        """Start the SuperNode of a device, with the key of that name."""
        return self.start(
            who,
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.folder / "ca.pem")),
            *("--auth-supernode-private-key", str(self.folder / f"{who}.key")),
            *("--node-config", f"partition-id={device}"),
            *("--port", str(free_port())),
        )

    def submit(self, flat: dict[str, Scalar]) -> tuple[subprocess.Popen[bytes], Callable[[], str]]:
        """Start ``flwr run``; returns the process, and what reads its output so far."""
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in flat.items())
        name = f"run-{Path(str(flat['results'])).name}"
        self.log(name).unlink(missing_ok=True)
        with self.log(name).open("wb") as log:
            run = subprocess.Popen(
                [str(BIN / "flwr"), "run", str(ROOT), "field", "--stream", "--run-config", pairs],
                env=self.env("user"), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return run, lambda: self.log(name).read_text(encoding="utf-8", errors="replace")

    def status(self, output: str) -> str:
        """How the run ended that this output is of."""
        found = re.search(r"Successfully started run (\d+)", output)
        assert found, output
        run_id = int(found[1])
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self.flwr("list", "field", "--run-id", str(run_id), "--format", "json")
            status, _ = status_of(answer, run_id)
            if status.startswith("finished") or time.monotonic() > deadline:
                return status
            time.sleep(1.0)

    def processes(self) -> list[psutil.Process]:
        """Every process of this field."""
        return processes_in(str(self.folder))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """A SuperLink that knows the keys of three SuperNodes, and the SuperNodes; all are gone at the end."""
    with (tmp_path_factory.getbasetemp().parent / "flower.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one = Field(tmp_path_factory.mktemp("field"), free_port())
        try:
            _raise(one)
            yield one
        finally:
            for process in one.processes():
                process.terminate()
            _, left = psutil.wait_procs(one.processes(), timeout=30)
            for process in left:
                process.kill()
        assert not left, f"these did not stop when asked to: {left}"


def _raise(one: Field) -> None:
    _write_certificates(one.folder)
    (one.folder / "user").mkdir()
    (one.folder / "user" / "config.toml").write_text(
        f'[superlink]\ndefault = "field"\n\n[superlink.field]\naddress = "127.0.0.1:{one.port}"\n'
        f'root-certificates = "{one.folder / "ca.pem"}"\n'
    )
    superlink = one.start(
        "superlink",
        "flower-superlink",
        *("--host", "127.0.0.1", "--port", str(one.port), "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(one.folder / "ca.pem")),
        *("--ssl-certfile", str(one.folder / "server.pem"), "--ssl-keyfile", str(one.folder / "server.key")),
    )
    _until(lambda: "Uvicorn running" in one.log("superlink").read_text() or superlink.poll() is not None)
    assert superlink.poll() is None, one.log("superlink").read_text()
    for device in range(SITES):
        public = _write_key(one.folder, f"site{device}")
        one.flwr("supernode", "register", str(public), "field")
        one.sites[device] = one.supernode(f"site{device}", device)
    for device in range(SITES):
        _until(lambda device=device: "SuperNode ID" in one.log(f"site{device}").read_text())  # type: ignore[misc]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scalar]:
    return tiny_run(tmp_path_factory.mktemp("data")) | {
        "train.devices": SITES,
        "train.rounds": 2,
        "federation.supernodes": SITES,
        "federation.placement": "sites",
    }


def test_a_supernode_with_an_unknown_key_is_refused(running: Field) -> None:
    _write_key(running.folder, "stranger")
    stranger = running.supernode("stranger", 0)
    assert stranger.wait(PATIENCE_S) != 0
    said = running.log("stranger").read_text()
    assert "Failed to initialize the connection to the SuperLink" in said
    assert "SuperNode ID" not in said
    answer = json.loads(running.flwr("supernode", "list", "field", "--format", "json"))
    assert [node["status"] for node in answer["nodes"]] == ["online"] * SITES


def test_three_sites_train_two_rounds_over_tls_and_equal_the_in_process_run_bit_for_bit(
    running: Field, flat: dict[str, Scalar], tmp_path: Path
) -> None:
    results = tmp_path / "tls"
    run, output = running.submit({**flat, "results": str(results)})
    assert run.wait(600) == 0, output()
    assert running.status(output()) == "finished:completed", output()

    plain = {
        **flat,
        "results": str(tmp_path / "plain"),
        "federation.placement": "packed",
        "federation.supernodes": 1,
    }
    folder = RunFolder.open(parse(plain))
    run_cells(InProcessGrid(app, 1, plain), plain, cells_of(parse(plain)), folder, 1, lambda line: None)
    (theirs,) = (results / "state").glob("*.safetensors")
    (ours,) = (folder.path / "state").glob("*.safetensors")
    arrays = load_file(theirs)
    assert set(arrays) == set(load_file(ours))
    for key, array in load_file(ours).items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)
    assert _computed(read_metrics(results)) == _computed(read_metrics(folder.path))
    for device in range(SITES):
        log = running.log(f"site{device}").read_text()
        assert log.count("Receiving: query message") == 1 and log.count("Receiving: train message") == 2


def test_a_site_that_is_killed_in_a_round_is_counted_and_the_run_completes(
    running: Field, flat: dict[str, Scalar], tmp_path: Path
) -> None:
    results, victim = tmp_path / "killed", 1
    before = running.log(f"site{victim}").read_text().count("Receiving: train message")
    run, output = running.submit({**flat, "results": str(results)})
    log = running.log(f"site{victim}")
    _until(lambda: log.read_text().count("Receiving: train message") > before or run.poll() is not None)
    running.sites[victim].send_signal(signal.SIGKILL)
    assert run.wait(600) == 0, output()
    assert running.status(output()) == "finished:completed", output()
    last = read_metrics(results)[-1]
    assert (last["kind"], last["round"], last["failures"]) == ("final", 2, 2), output()
    assert re.search(
        rf"round 1: train of \[{victim}\]: SuperNode \d+: .*unavailable", output(), re.IGNORECASE
    )
    assert f"device {victim} was left out: no SuperNode answers for it" in output()


def _computed(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """What does not depend on the machine: every measured time ends in _s."""
    return [{k: v for k, v in r.items() if not k.endswith("_s") and k != "peak_rss_bytes"} for r in records]


def _write_certificates(folder: Path) -> None:
    """Write a certificate authority of our own and the server's certificate for this host."""
    now, keys = datetime.datetime.now(datetime.UTC), [ec.generate_private_key(ec.SECP384R1()) for _ in "ab"]
    names = [
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("field-ca", "server")
    ]

    def certificate(place: int) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(names[place])
            .issuer_name(names[0])
            .public_key(keys[place].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=place == 0, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(keys[place].public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False
            )
        )

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    authority = certificate(0).add_extension(usage, critical=True).sign(keys[0], hashes.SHA384())
    here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = (
        certificate(1)
        .add_extension(x509.SubjectAlternativeName(here), critical=False)
        .sign(keys[0], hashes.SHA384())
    )
    (folder / "ca.pem").write_bytes(authority.public_bytes(PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(PEM))
    (folder / "server.key").write_bytes(
        keys[1].private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _write_key(folder: Path, name: str) -> Path:
    """Write a node's key pair, as ``ssh-keygen -t ecdsa -b 384`` does; returns the public key's file."""
    key, public = ec.generate_private_key(ec.SECP384R1()), folder / f"{name}.key.pub"
    private = key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(private)
    public.write_bytes(key.public_key().public_bytes(OPENSSH, serialization.PublicFormat.OpenSSH))
    return public


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
