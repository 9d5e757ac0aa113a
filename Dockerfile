# Two images of the server, built by `make image` and `make image-gpu`:
#
#   cpu   the default target
#   gpu   with CuPy, JAX's CUDA plugin and the CUDA libraries they need
#
# docs/gpu-operations.md says how to run them. Both start from a plain Python: every CUDA library comes as
# a wheel of the version that CuPy and JAX were built with. An nvidia/cuda base would add a second copy of
# each, of another version, and 2 to 5 GB. The driver is the host's; the NVIDIA Container Toolkit mounts it.
ARG PYTHON_IMAGE=python:3.12.13-slim-bookworm

# --- What is built with pip stays in /opt/nann, an environment without pip ------------------------------
FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/nann
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY nann ./nann

FROM build AS build-cpu
ARG EXTRAS=pjrt
RUN pip --python /opt/nann/bin/python install --constraint constraints.txt ".[${EXTRAS}]"

FROM build AS build-gpu
ARG EXTRAS=gpu
RUN pip --python /opt/nann/bin/python install --constraint constraints.txt ".[${EXTRAS}]"

# --- What both images share -----------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
RUN pip uninstall --yes --root-user-action ignore pip \
 && groupadd --gid 10001 nann \
 && useradd --uid 10001 --gid nann --home-dir /var/cache/nann --no-create-home --shell /usr/sbin/nologin nann \
 && install --directory --owner nann --group nann /var/cache/nann /var/lib/nann
# Everything that is ever written goes to these two, so the root file system may be read-only. The cache
# may be lost (the next start compiles again); /var/lib/nann holds the users' live histories.
VOLUME ["/var/cache/nann", "/var/lib/nann"]
ENV PATH=/opt/nann/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/nann \
    XDG_CACHE_HOME=/var/cache \
    NUMBA_CACHE_DIR=/var/cache/nann/numba \
    CUDA_CACHE_PATH=/var/cache/nann/cuda \
    NANN_HOST=0.0.0.0 \
    NANN_REPOSITORY=/models \
    NANN_USER_STORE=/var/lib/nann/users.sqlite3
COPY docker/healthcheck.py /opt/healthcheck.py
EXPOSE 8500 8501
# A large version takes minutes to load and warm. Plain Docker only shows the outcome, and Compose waits
# for it; Kubernetes has probes of its own.
HEALTHCHECK --start-period=15m --interval=10s --timeout=3s --retries=3 \
    CMD ["python", "/opt/healthcheck.py"]
WORKDIR /var/lib/nann
USER 10001:10001
ENTRYPOINT ["nann"]
CMD ["serve"]

FROM runtime AS gpu
# What an nvidia/cuda base would have set for the container toolkit.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Not "auto": a container that was meant for a GPU and has none should not serve slowly, but say so and end.
ENV NANN_DEVICE=cuda:0
COPY --from=build-gpu /opt/nann /opt/nann

FROM runtime AS cpu
ENV NANN_DEVICE=cpu
COPY --from=build-cpu /opt/nann /opt/nann
