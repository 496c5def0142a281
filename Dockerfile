# The suite with its tested versions; the same image trains on a CPU and, with `--gpus all`, on NVIDIA GPUs.
#
#   docker build -t leanlight .
#   docker run --rm -v "$PWD/work:/work" leanlight fit --config classifier/fashion_mnist_small
#   docker run --rm --gpus all --ipc=host -v "$PWD/work:/work" -e WANDB_API_KEY leanlight fit --config classifier/cifar10 --config trainer/gpus
#
# Runs, data and results land in the mounted folder. EXTRAS chooses optional packages: --build-arg EXTRAS=all
FROM python:3.11-slim

ARG EXTRAS=rl
WORKDIR /opt/leanlight
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

ENV LEANLIGHT_DATA=/work/data MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["leanlight"]
CMD ["--help"]
