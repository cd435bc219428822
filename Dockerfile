# One image for every role: trainer, bootstrap peer, and the commands beside them.
#
#     docker build -t shoal .
#     docker build -t shoal:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#
# TORCH_INDEX is where torch comes from: PyTorch's own index of CPU builds, or PyPI, whose build for Linux has CUDA.
# How to run it: docker/README.md.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build

# py-libp2p needs fastecdsa, which has no wheel: pip compiles it against GMP.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev libgmp-dev \
 && rm -rf /var/lib/apt/lists/*

# The dependencies are a layer of their own, so that a change of the source installs none of them again.
WORKDIR /src
COPY pyproject.toml .
RUN python -m venv --without-pip /opt/shoal \
 && python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], sep='\n', file=open('needs.txt', 'w')); \
print(*project['optional-dependencies']['train'], sep='\n', file=open('train.txt', 'w'))"
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/shoal install --no-cache-dir --index-url "$TORCH_INDEX" --requirement train.txt \
 && pip --python /opt/shoal install --no-cache-dir --requirement needs.txt

COPY . .
RUN pip --python /opt/shoal install --no-cache-dir --no-deps .


FROM python:${PYTHON}-slim-bookworm

# The default data folder is a link to /data, so that every command finds what is mounted there.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgmp10 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home --no-log-init shoal \
 && install -d -o shoal -g shoal -m 700 /data \
 && install -d -o shoal -g shoal /home/shoal/.local /home/shoal/.local/share \
 && ln -s /data /home/shoal/.local/share/shoal

COPY --from=build /opt/shoal /opt/shoal
ENV PATH=/opt/shoal/bin:$PATH HOME=/home/shoal

# The number and not the name, so that an orchestrator can see that it is not root.
USER 1000:1000
WORKDIR /data
VOLUME /data
# Control, tensors, and metrics with the live page, as in node/config.py.
EXPOSE 9460 9461 9464

# http.client, because urllib would ask a proxy of the environment for this very container.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import http.client, sys; web = http.client.HTTPConnection('127.0.0.1', 9464, timeout=4); web.request('GET', '/healthz'); sys.exit(web.getresponse().status != 200)"]

ENTRYPOINT ["shoal"]
CMD ["--help"]
