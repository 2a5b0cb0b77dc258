# syntax=docker/dockerfile:1
# This package on NVIDIA GPUs. CI has no Docker and does not build this file.
#
#   docker build --tag spin .
#   docker build --tag spin-vllm --build-arg EXTRAS=vllm .
#   docker run --rm --gpus all --ipc=host -v /data/models:/models -v $PWD:/workspace spin \
#     --nproc_per_node 2 spin_recipe --config my.yaml

# The CUDA libraries come with torch's wheel, here for CUDA 13.0 (driver 580 or later). For older drivers: a torch of an
# older CUDA, such as --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 with a CUDA_IMAGE to match.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${CUDA_IMAGE}

ARG TORCH=2.11.0
ARG TORCH_INDEX=https://pypi.org/simple
# Names of extras in pyproject.toml, with commas: vllm, wandb, tensorboard, eval
ARG EXTRAS=
# Number of the user inside: your own (id -u) makes files in mounted folders yours
ARG UID=1001

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/spin/bin:$PATH

# Triton compiles a few lines of C for each kernel, with Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/spin

# A layer of its own: it is large, and what follows changes more often.
RUN pip install --index-url "${TORCH_INDEX}" "torch==${TORCH}"

COPY pyproject.toml README.md LICENSE /src/
COPY spin /src/spin
COPY recipes /src/recipes
COPY configs /src/configs
# torch is named again, so that nothing else, vLLM included, is of a version that wants another one.
RUN pip install "torch==${TORCH}" "/src${EXTRAS:+[${EXTRAS}]}"

# Ubuntu's image has a user of its own, whose number is the one that most people have.
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "${UID}" spin \
    && install --directory --owner spin /workspace
USER ${UID}
WORKDIR /workspace

ENTRYPOINT ["spin", "run"]
CMD ["--help"]
