# runtime-TARGET: a bundle's folder as an image, on a minimal Debian or, for a Jetson, on NVIDIA's base. `toolchain pack
# --form image` makes the same without a container engine; this is for those who build everything by Docker.
#
#   docker build -f docker/runtime.Dockerfile --build-arg BUNDLE=work/bundle-x86-cpu/…/my-model-1.0-x86-cpu -t runtime-x86-cpu .
#   … for arm64: --platform linux/arm64;  for a Jetson: --build-arg SYSTEM=device --build-arg BASE=nvcr.io/nvidia/…, the
#   image that its profile names: image.base in targets/, [images] in docker/versions.toml
ARG DEBIAN=debian:bookworm-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716
ARG BASE=${DEBIAN}
ARG SYSTEM=minimal

FROM --platform=${BUILDPLATFORM:-linux/amd64} ${DEBIAN} AS packages
ARG TARGETARCH
COPY docker/minimal-base.sh /
RUN sh /minimal-base.sh "${TARGETARCH:-amd64}" /base

FROM scratch AS minimal
COPY --from=packages /base /

# A base that brings the device's own libraries, such as CUDA's for a Jetson.
FROM ${BASE} AS device
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

FROM ${SYSTEM} AS runtime
ARG BUNDLE
# What changes least comes first: another model leaves the programs' layer as it is.
COPY ${BUNDLE}/runtime /bundle/runtime
COPY ${BUNDLE}/device /bundle/device
COPY ${BUNDLE}/LICENSES /bundle/LICENSES
COPY ${BUNDLE}/edgectl /bundle/edgectl
COPY ${BUNDLE}/web /bundle/web
COPY ${BUNDLE}/model /bundle/model
COPY ${BUNDLE}/eval /bundle/eval
COPY ${BUNDLE}/manifest.json ${BUNDLE}/SHA256SUMS* ${BUNDLE}/sbom.cdx.json ${BUNDLE}/MODEL_CARD.md ${BUNDLE}/Modelfile ${BUNDLE}/presets.json /bundle/
USER 65532:65532
WORKDIR /
EXPOSE 8080
STOPSIGNAL SIGTERM
LABEL org.opencontainers.image.title="Language model for an edge device" \
      org.opencontainers.image.description="llama-server by edgectl, read-only and not as root"
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python3", "-I", "-S", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["python3", "-I", "-S", "/bundle/edgectl", "serve"]
# It listens to the network, so it wants a key: docker run -v ./key:/run/secrets/api_key:ro
CMD ["--host", "0.0.0.0", "--port", "8080", "--api-key-file", "/run/secrets/api_key"]
