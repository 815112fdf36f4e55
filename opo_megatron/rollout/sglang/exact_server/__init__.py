"""Exact mode inside SGLang: the part that runs in the server's processes.

`rollout.sglang.exact=true` starts the server with SGLANG_EXTERNAL_MODEL_PACKAGE naming this folder, which
lies beside `serve.py` and so is on the server's path.  SGLang imports it when it looks for models, before it
makes its attention backend and sampler, and three of its registries then hold the project's operations:

    model.py       the model classes: the local engine's decoder
    attention.py   the attention backend: `kernels/exact.py` over SGLang's paged cache
    sampler.py     the sampler: `kernels/exact_sampling.py`, with the seeds that come with each request

Nothing of SGLang is patched.  `operations.py` imports the few files that trainer and server share; SGLang's
environment has torch, but not the trainer's packages.
"""
