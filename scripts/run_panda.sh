#!/usr/bin/env bash
# Fine-tuning of the slide encoder on the published tile embeddings of PANDA, with their split.
#
#   bash scripts/run_panda.sh data/GigaPath_PANDA_embeddings/h5_files [OPTIONS of xtuner-add finetune-slides]
#
# DATASETCSV, PRESPLITDIR: PANDA.csv and the folder of train_0.csv, val_0.csv, test_0.csv, from
# dataset_csv/PANDA of the prov-gigapath repository. RECIPE=panda_flash takes the small encoder.
# OUTPUT: where results go. NPROC_PER_NODE: processes, one per GPU.
set -euo pipefail
ROOTPATH=${1:-data/GigaPath_PANDA_embeddings/h5_files}
DATASETCSV=${DATASETCSV:-dataset_csv/PANDA/PANDA.csv}
PRESPLITDIR=${PRESPLITDIR:-dataset_csv/PANDA}
RECIPE=${RECIPE:-panda}
OUTPUT=${OUTPUT:-outputs/PANDA}
exec xtuner-add finetune-slides "$ROOTPATH" --recipe "$RECIPE" --labels "$DATASETCSV" \
  --splits "$PRESPLITDIR" --output "$OUTPUT" "${@:2}"
