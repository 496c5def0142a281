#!/usr/bin/env bash
# Start one training under torchrun; every argument goes to `leanlight fit`.
#
#   scripts/torchrun.sh --config classifier/cifar10 --run.id first                    all GPUs of this machine
#   PROCESSES=2 ACCELERATOR=cpu scripts/torchrun.sh --config classifier/digits_small  two processes on the CPU
#   NODES=2 NODE_RANK=0 MASTER=node0:29500 scripts/torchrun.sh --config …   once on each node
set -euo pipefail

accelerator=${ACCELERATOR:-gpu}
processes=${PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
nodes=${NODES:-1}

if [ "$nodes" -gt 1 ]; then
  : "${MASTER:?several nodes need MASTER=host:port of the first one}"
  place=(--nnodes "$nodes" --node-rank "${NODE_RANK:?each node needs its NODE_RANK}" --rdzv-backend static
    --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}")
else
  place=(--standalone)
fi

exec torchrun "${place[@]}" --nproc-per-node "$processes" -m leanlight fit "$@" --config trainer/ddp \
  --trainer.accelerator="$accelerator" --trainer.devices="$processes" --trainer.num_nodes="$nodes"
