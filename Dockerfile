# docker build --target cpu -t xtuner-add:cpu .        (or: --target cuda)
FROM python:3.11-slim AS base
# g++: DeepSpeed compiles its CPU communication extension; libgl1 and libglib: OpenCV in MMEngine.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libgl1 libglib2.0-0 \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1
WORKDIR /data
ENTRYPOINT ["xtuner-add"]
CMD ["--help"]

FROM base AS cpu
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install "/src[all]" && xtuner-add setup-host && rm -rf /src

# The CUDA libraries come with torch; the machine needs a driver of series 580 and NVIDIA's runtime.
FROM base AS cuda
COPY . /src
RUN pip install "/src[all]" && xtuner-add setup-host && rm -rf /src
