#!/usr/bin/env bash
# Linear probe on the published tile embeddings of PatchCamelyon; the zip is read as it is.
#
#   bash scripts/run_pcam.sh data/GigaPath_PCam_embeddings.zip [OPTIONS of xtuner-add probe-tiles]
#
# DATASETCSV: columns input, label, split; pcam.csv of the prov-gigapath repository
# (dataset_csv/pcam). Unset and not there: the csv in the zip. OUTPUT: where results go.
set -euo pipefail
INPUTPATH=${1:-data/GigaPath_PCam_embeddings.zip}
DATASETCSV=${DATASETCSV:-dataset_csv/pcam/pcam.csv}
OUTPUT=${OUTPUT:-outputs/pcam}
LABELS=()
if [ -e "$DATASETCSV" ]; then LABELS=(--labels "$DATASETCSV"); fi
exec xtuner-add probe-tiles "$INPUTPATH" ${LABELS[@]+"${LABELS[@]}"} --recipe pcam --output "$OUTPUT" "${@:2}"
