"""A job of slurm/opo_70b.sh without a cluster: `srun`, `curl` and `scontrol` are fakes, the rest is real."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.paths import ROOT

FAKES = {
    # Prints and exits as the test sets for the launched module; records its arguments.
    "srun": """
        printf '%s\\n' "$*" >>"$FAKE/srun.arguments"
        { printf '%s\\n' "$@" && printf '\\0\\n'; } >>"$FAKE/srun.words"
        for word; do case $word in --output=*) log=${word#--output=} ;; esac; done
        finish() {
            code=$(cat "$FAKE/$which.code" 2>/dev/null || echo 0)
            case $code in 75 | 76) echo "$code" >"$OPO_AGAIN" ;; esac  # as node.sh does
            mkdir -p "$OPO_RANKS_FOLDER/node0" # and what a rank writes
            cat "$FAKE/$which.outcome" >"$OPO_RANKS_FOLDER/node0/0.outcome" 2>/dev/null ||
                echo "exit $code" >"$OPO_RANKS_FOLDER/node0/0.outcome"
            [ "$code" != 75 ] || code=0
            exit "$code"
        }
        case "$*" in
        *"opo_megatron preflight"*) which=preflight ;;
        *"opo_megatron serve"*)
            which=engine
            echo "$OPO_ENGINE_ADDRESSES" >"$FAKE/addresses"
            cat "$OPO_LOGS"/attempt_*/engine_key >"$FAKE/stale" 2>/dev/null
            touch "$OPO_LOGS/attempt_0/engine_key" ;;
        *) which=train ;;
        esac
        log=${log/%-%n.log/-0.log}
        cat "$FAKE/$which.output" >"${log//%%/%}" 2>/dev/null
        [ ! -e "$FAKE/$which.waits" ] || {
            trap 'sleep 0.2; finish' USR1
            touch "$FAKE/$which.waiting"
            while :; do sleep 0.05; done
        }
        finish""",
    # The engine's node is healthy once the engine runs.
    "curl": """
        printf '%s\\n' "$*" >>"$FAKE/curl.arguments"
        [ -e "$FAKE/engine.waiting" ]""",
    "scontrol": """
        case $1 in
        show) printf "${FAKE_NAME:-node}%s\\n" $FAKE_NODES ;;
        requeue) cp "$OPO_LOGS/status" "$FAKE/status.requeued"; kill -TERM "$PPID" ;;
        esac""",
}


class Job:
    """A run of opo_70b.sh with fake programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs = folder, folder / "logs"
        (folder / "bin").mkdir()
        for name, text in FAKES.items():
            program = folder / "bin" / name
            program.write_text("#!/bin/bash\n" + text)
            program.chmod(0o755)

    def set_result(self, which: str, text: str = "", code: int = 0) -> None:
        (self.folder / f"{which}.output").write_text(text)
        (self.folder / f"{which}.code").write_text(str(code))

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "FAKE_NODES": "1",
            "OPO_LOGS": str(self.logs),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_CPUS_ON_NODE": "16",
        } | variables
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm/opo_70b.sh"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code and final status."""
        process = self.start(*arguments, **variables)
        self.output, _ = process.communicate(timeout=30)
        return process.returncode, (self.logs / "status").read_text().strip()

    @property
    def calls(self) -> list[str]:
        return (self.folder / "srun.arguments").read_text().splitlines()


NAMES = {
    "spaces": "two  words ",
    "unicode": "gewürze-日本-é",
    "quotes": """it's "quoted" `here`""",
    "dollars": "$HOME $PATH $(false) !x",
    "globs": "a*b?[c]{d,e}~",
    "dashes": "-n --out -- #x",
    "percents": "100%n%j%%",
    "backslashes": "a\\b\\n;&|<>()",
}
