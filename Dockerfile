# vitmed on NVIDIA GPUs: CUDA comes with the wheels, so the host needs a driver (525 or newer for CUDA 12) and the container toolkit alone.
#   docker build --tag=vitmed .
#   docker run --rm --gpus=all --volume=/data/vitmed:/share vitmed -m vitmed.main --config=configs/vit2d.py:patch=7 --workdir=/share/runs/p7
FROM python:3.11-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /vitmed
# The exact versions first, without torch; then JAX's CUDA plugin of the same version, whose other needs are there already.
COPY requirements.lock ./
RUN pip install --no-deps --requirement requirements.lock \
    && pip install "jax[cuda12]==$(python -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')"

COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY launch launch
COPY vitmed vitmed
RUN pip install --no-deps --no-build-isolation --editable . \
    && useradd --uid 1000 --create-home vitmed

USER 1000
# Kubernetes names the whole command; by hand it is: docker run IMAGE -m vitmed.main ...
ENTRYPOINT ["python"]
CMD ["-m", "vitmed.main", "--help"]
