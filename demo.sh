#!/bin/sh
# `make demo`: draw faces, train on Ray Train, evaluate, predict a photograph. RUN: folder of the environment's programs, DEMO: where results go.
set -eu
say() { printf '\n== %s\n' "$*" >&2; }

say "1/4 drawing faces in RAF-CE's layout into $DEMO/faces"
if [ -d "$DEMO/faces" ]; then echo "already there: $DEMO/faces" >&2; else "$RUN/rafce" data synthesize --out "$DEMO/faces" --num-images 2000; fi

say "2/4 training on Ray Train"
if [ -d "$DEMO/runs/demo/bundle" ]; then
  echo "already there: $DEMO/runs/demo" >&2
else
  "$RUN/rafce" train --recipe demo data.root="$DEMO/faces" run.storage="$DEMO/runs" run.name=demo
fi

say "3/4 evaluating on the test split"
"$RUN/rafce" evaluate --bundle "$DEMO/runs/demo/bundle"

say "4/4 predicting a photograph"
photo=$(find "$DEMO/faces/aligned" -name '*.jpg' | sort | head -n 1)
"$RUN/rafce" predict --bundle "$DEMO/runs/demo/bundle" --faces aligned "$photo"

cat >&2 <<EOF

Made: $DEMO/faces (drawn faces), $DEMO/runs/demo (the run), $DEMO/runs/demo/bundle (the model).
Next, with your own faces:
  $RUN/rafce data audit PATH              what is in them, and may they be trained on
  $RUN/rafce train data.root=PATH         the reference recipe (resnet50; add --recipe demo for a small model)
  $RUN/rafce predict --bundle $DEMO/runs/demo/bundle PHOTO.jpg
EOF
