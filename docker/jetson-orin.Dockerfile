# llama.cpp for the target jetson-orin, in NVIDIA's image with JetPack 6's compiler; what it made goes into the toolchain's
# cache on the host, where `toolchain run --target jetson-orin` finds it. On an arm64 host, or under qemu (hours).
#
#   docker build -f docker/jetson-orin.Dockerfile --platform linux/arm64 --output type=local,dest="$HOME/.cache/toolchain/llama.cpp" .
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0@sha256:34ccf0f3b63c6da9eee45f2e79de9bf7fdf3beda9abfd72bbf285ae9d40bb673

FROM ${BASE} AS build
ARG PYTHON=python3.11
RUN apt-get update && apt-get install --yes --no-install-recommends binutils ca-certificates g++ ${PYTHON} ${PYTHON}-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml wheel[s]* /wheels/
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docker docker
COPY licences licences
COPY targets targets
COPY toolchain toolchain
ENV PATH=/opt/venv/bin:$PATH TOOLCHAIN_CACHE=/opt/cache PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_OPTIONS=""
RUN ${PYTHON} -m venv /opt/venv && pip install --quiet ${PIP_OPTIONS} -c constraints.txt ".[gguf]"
# Another profile for the same base: its name in targets/, or a file below this folder.
ARG TARGET=jetson-orin
# Where it fails, the log is lost with the container: its end is shown.
RUN toolchain runtime build --target ${TARGET} || { tail -n 40 /opt/cache/llama.cpp/*.log; exit 1; }; \
    rm -f /opt/cache/llama.cpp/*.lock /opt/cache/llama.cpp/*.log

FROM scratch AS out
COPY --from=build /opt/cache/llama.cpp /
