"""Exact mode inside SGLang: the part that runs in the server's processes.

`rollout.sglang.exact=true` starts the server with SGLANG_EXTERNAL_MODEL_PACKAGE naming this package.  SGLang
imports all its modules when it looks for models, before it makes its attention backend and sampler, and three
of its registries then hold the project's operations:

    model.py       the model classes: the local engine's decoder
    attention.py   the attention backend: `kernels/exact.py` over SGLang's paged cache; on GPUs, with CUDA
                   graphs, `slot_attention.py`
    sampler.py     the sampler: `kernels/exact_sampling.py`, with the seeds that come with each request

Nothing of SGLang is patched.  Its environment has torch, but not what the trainer needs; so `serve.py` makes
the trainer's packages importable without their `__init__.py`, and the files that are imported here (those of
exact mode in `kernels/`, the local decoder) need nothing but torch, and Triton on GPUs.
"""
