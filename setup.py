"""The package and what it needs.  Versions are exact: this set was tried together.

`install_requires` holds only what training needs.  SGLang is no extra: rollout servers run in an
environment of their own, which `rollout.sglang.python` names.
"""

from setuptools import find_packages, setup

MODELOPT = "nvidia-modelopt==0.45.0"  # never its extras, which bring CUDA packages
MATH_VERIFY = "math-verify[antlr4-13-2]==0.9.0"
MATPLOTLIB = "matplotlib==3.11.2"
WANDB = "wandb==0.31.0"

setup(
    name="opo-megatron",
    version="0.1.0",
    description="On-policy RL of language models with the optimal reward baseline, on Megatron-Core",
    license="Apache-2.0",
    # megatron-core 0.16.1 is the last that runs on Python 3.11; the CPU backend is fitted to its source.
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["opo_megatron", "opo_megatron.*"]),
    install_requires=[
        "megatron-core==0.16.1",
        "numpy==2.4.6",
        "omegaconf==2.4.0",
        "psutil==7.2.2",  # imported by megatron-core, which does not say so
        "PyYAML==6.0.3",
        "rich==15.0.0",
        "safetensors==0.8.0",
        "tensorboard==2.21.0",
        "torch==2.13.0",  # never a range: a newer one brings gigabytes of other CUDA packages
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],  # the range that megatron-core 0.16.1 accepts
        "modelopt": [MODELOPT, "transformers==5.12.1"],
        "reasoning-gym": ["reasoning-gym==0.1.25"],
        "wandb": [WANDB],
        "report": [MATPLOTLIB],
        "math": [MATH_VERIFY],
        "data": ["transformers==5.12.1", "datasets==5.2.0", "pyarrow==26.0.1"],
        "dev": [
            "accelerate==1.15.0",  # without it transformers loads no FP8 weights
            MATPLOTLIB,
            MATH_VERIFY,
            "mypy==2.4.1",
            "nltk==3.10.4",  # an independent BLEU
            MODELOPT,
            "pyarrow==26.0.1",
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "reasoning-gym==0.1.25",
            "ruff==0.17.5",
            "scipy==1.17.1",
            "triton>=3.6,<4",  # a range: CUDA builds of torch pin their own
            "transformers==5.12.1",  # an independent implementation to compare with
            WANDB,
        ],
    },
    entry_points={"console_scripts": ["opo=opo_megatron.cli:entry"]},
)
