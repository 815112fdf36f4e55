# opo_megatron for H100 (sm_90): trainer and SGLang, each in its own environment.
#
#   docker build -t opo .          then, with enroot:  enroot import dockerd://opo:latest
#   OPO_CONTAINER=pyxis:$PWD/opo+latest.sqsh OPO_PYTHON=/opt/opo/bin/python \
#       sbatch slurm/opo_70b.sh RECIPE rollout.sglang.python=/opt/sglang/bin/python
#
# Versions and their reasons are in opo_megatron/environment/versions.toml, which is read below.
#
# Tested by tools/check_container.py, which carries out this file's commands without Docker (records/container.json):
# Transformer Engine's torch extension compiles against torch 2.13.0 with nvcc 13.0, both environments install,
# and on a machine without a GPU Megatron-Core with Transformer Engine's layers, and SGLang's server, are imported.
#
# NOT TESTED, for lack of a GPU and Docker:
#   - the base image: its tag, and the packages of its distribution;
#   - that Transformer Engine's and SGLang's CUDA kernels run with torch 2.13.0, also with cuda-tile 1.6.0rc7
#     (see requirements/sglang-cuda.txt).

# CUDA 13.0 for torch's and SGLang's wheels; devel for nvcc and headers; Ubuntu 24.04 for Python 3.12.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Distribution packages are pinned by the release only: its archive drops old versions.
# curl checks the engines' health.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# Hopper only: other architectures would make the build longer.
ENV TORCH_CUDA_ARCH_LIST=9.0 \
    NVTE_CUDA_ARCHS=90 \
    NVTE_FRAMEWORK=pytorch \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
ARG BUILD_JOBS=8

WORKDIR /build
COPY opo_megatron/environment/versions.py opo_megatron/environment/versions.toml requirements/build.txt ./
RUN python3.12 -m venv /opt/opo && python3.12 versions.py > constraints.txt
ENV PATH=/opt/opo/bin:$PATH

# Build tools and torch first: the extension is compiled against the installed torch.
RUN pip install --requirement build.txt \
    && pip install --constraint constraints.txt torch

# The core library is a wheel that includes sm_90; only the torch extension is compiled.
RUN MAX_JOBS=${BUILD_JOBS} pip install --no-build-isolation --constraint constraints.txt \
        'transformer-engine[core_cu13,pytorch]'

# SGLang pins many packages, so it never shares an environment with the trainer.  Its list is complete.
COPY requirements/sglang-cuda.txt ./
RUN python3.12 -m venv /opt/sglang && /opt/sglang/bin/pip install --no-deps --requirement sglang-cuda.txt

COPY . /opt/opo_megatron
WORKDIR /opt/opo_megatron
RUN pip install --constraint /build/constraints.txt '.[data,math,modelopt,reasoning-gym,wandb]' \
    && opo doctor --sglang-python /opt/sglang/bin/python \
        --need sglang --need transformer-engine --need nvidia-modelopt

# One thread per rank: more on a busy node make steps many times slower.
ENV OMP_NUM_THREADS=1
CMD ["opo", "doctor", "--need", "gpu", "--need", "fp8", "--need", "sglang", "--sglang-python", "/opt/sglang/bin/python"]
